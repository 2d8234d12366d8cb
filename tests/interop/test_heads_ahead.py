"""Published heads ahead compute what was published: h' = norm(layer(W [norm(embed(t_{i+1})) ; norm(h_i)])), then the shared head.

h_i, after the final norm, is taken from transformers' logits, and everything round the layer is NumPy. The layer is the one of
a checkpoint of that layer alone, which ``test_families`` holds against transformers, with W's outcome as its embedding.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.interop import huggingface
from research.layers.context import Context
from tests.interop.checkpoints import GOLDEN, golden, stored_in, write_checkpoint
from tests.interop.weights import weight

QWEN = (
    "model.layers.3.",
    "mtp.layers.0.",
    [f"mtp.{name}.weight" for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")],
    {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
)
# Family → the layer whose tensors the head's are like, the head's layer, names of (norms of token, of h, W, last norm), and the
# config.json of a model of the layer alone.
HEADS = {
    "deepseek_v3": (
        "model.layers.2.",
        "model.layers.3.",
        [f"model.layers.3.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")],
        {"num_hidden_layers": 1, "first_k_dense_replace": 0},
    ),
    "qwen3_next": QWEN,
    "qwen3_5": QWEN,
}


@jax.jit
def read_at_once(model, tokens_BT):
    return model(tokens_BT).logits_BTV


@jax.jit
def logits_ahead(model, tokens_1T):
    """Of the first head at the places that have a token after them."""
    hidden_1TD, _, _ = model.hidden(tokens_1T)
    context = Context(jnp.arange(tokens_1T.shape[1] - 1)[None])
    head = model.mtp.heads[0]
    hidden_1TD, _, _ = head(hidden_1TD[:, :-1], model.embed(tokens_1T[:, 1:]), (None, None), context)
    return model.logits(hidden_1TD)[0]


@pytest.mark.parametrize(
    "name", ["deepseek_v3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3_next", "qwen3_5"))]
)
def test_logits_of_a_published_head(name, tmp_path):
    g, (like, prefix, (enorm, hnorm, merge, last), alone) = golden(name), HEADS[name]
    tiny, tokens, D = json.loads((GOLDEN / name / "tiny.json").read_text()), g.documents[1], g.hub["hidden_size"]
    shapes = {prefix + t.removeprefix(like): array.shape for t, array in g.tensors.items() if t.startswith(like)}
    shapes |= {enorm: (D,), hnorm: (D,), last: (D,), merge: (D, 2 * D)}
    centred = "norm" if "centred" in tiny else "(?!)"
    heads = {tensor: weight(tensor, shape, tiny["seed"], centred) for tensor, shape in shapes.items()}

    def normed(x, scale):
        root = np.sqrt(np.mean(x**2, -1, keepdims=True) + g.hub["rms_norm_eps"])
        return x / root * (scale + ("centred" in tiny))

    embedding, head = g.tensors["model.embed_tokens.weight"], np.float64(g.tensors["lm_head.weight"])
    h_TD = np.linalg.lstsq(head, np.float64(g.logits[1]).T, rcond=None)[0].T[:-1]
    both = np.concatenate([normed(np.float64(embedding[tokens[1:]]), heads[enorm]), normed(h_TD, heads[hnorm])], -1)
    x_TD = np.float32(both @ heads[merge].T)
    own = {
        tensor.replace(prefix, "model.layers.0."): heads[tensor]
        for tensor in heads
        if tensor.replace(prefix, like) in g.tensors
    }
    own |= {"model.embed_tokens.weight": x_TD, "lm_head.weight": np.eye(len(x_TD), D, dtype=np.float32)}
    hub = {**g.hub, **alone, "vocab_size": len(x_TD)}
    block = huggingface.load(write_checkpoint(tmp_path / "layer", hub, {**own, "model.norm.weight": heads[last]}))
    h_ahead_TD = np.float64(read_at_once(block, jnp.arange(len(x_TD))[None])[0, :, :D])

    hub = {**g.hub, "mtp_num_hidden_layers" if name == "qwen3_5" else "num_nextn_predict_layers": 1}
    model = huggingface.load(write_checkpoint(tmp_path / "whole", hub, {**g.tensors, **heads}))
    np.testing.assert_allclose(logits_ahead(model, tokens[None]), h_ahead_TD @ head.T, rtol=0, atol=5 * g.atol)
    huggingface.save(model, hub, tmp_path / "again")
    again = stored_in(tmp_path / "again")
    for tensor, values in heads.items():
        np.testing.assert_array_equal(again[tensor], values, err_msg=tensor)
