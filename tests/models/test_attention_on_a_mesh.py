"""Sparse and latent attention, multi-token heads and learned chunks on an explicit mesh: the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.layers.attention import AttentionConfig
from research.layers.dsa import DSAConfig
from research.layers.mlp import MLPConfig
from research.models.auxiliaries import Auxiliaries, auxiliary_losses
from research.models.config import HNetConfig, ModelConfig, MTPConfig, Residual
from research.models.language_model import LanguageModel
from research.models.multi_token import multi_token_sums
from research.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from research.training.runs import placed

LATENT = {
    "heads": 2,
    "nope_width": 6,
    "rope_width": 4,
    "value_width": 4,
    "latent": 8,
    "index_heads": 2,
    "index_width": 8,
}
WINDOW = Residual("window", AttentionConfig(heads=2, key_heads=1, head_width=8, window=3, sinks=True, bias=True))
MLP = Residual("mlp", MLPConfig(hidden=16))
SPARSE = (
    Residual("given", DSAConfig(**LATENT, top_k=4, indices="given")),
    Residual("shared", DSAConfig(**LATENT, top_k=4, indices="shared")),
)
CONFIGS = {
    "sparse, shared, two heads ahead": ModelConfig(
        31, 16, (*SPARSE, WINDOW), ("given", "shared"), repeats=2, mtp=MTPConfig(("window",), depth=2)
    ),
    "chunks": ModelConfig(
        31, 16, (WINDOW, Residual("chunks", HNetConfig((WINDOW, MLP), ("window", "mlp"), width=20), skip_scale=0.0)),
        ("window", "chunks"),
    ),
}  # fmt: skip
B, T = 4, 9
IDS = np.asarray([[1] * 5 + [2] * 4, [1] * 7 + [0] * 2, [3] * 9, [1] * 3 + [4] * 6], np.int32)


def trained(config):
    """Loss and gradients under whatever mesh is set; every parameter is drawn at random."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        scale = leaf.shape[-2] ** -0.5 if leaf.ndim > 2 else 0.3
        return jax.device_put((scale * rng.normal(size=leaf.shape)).astype(leaf.dtype), leaf.sharding)

    model = jax.tree.map(draw, placed(jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))))
    tokens_BT = np.random.default_rng(1).integers(0, 31, (B, T)).astype(np.int32)
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    batch = [tokens_BT, np.roll(tokens_BT, -1, axis=1), IDS > 0, IDS, positions_BT]
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        batch = [jax.device_put(x, batch_sharding(mesh)) for x in batch]

    @jax.jit
    def gradient(model, tokens_BT, targets_BT, mask_BT, ids_BT, positions_BT):
        def loss(model):
            key = jax.random.key(0)
            x_BTD, _, aux = model.hidden(tokens_BT, ids_BT, positions_BT, key=key)
            total = jnp.sum(jnp.sin(model.logits(x_BTD)), where=(ids_BT > 0)[..., None])
            aux = Auxiliaries(aux)
            if model.mtp is not None:
                arrays = (tokens_BT, targets_BT, mask_BT, ids_BT, positions_BT)
                ahead, heads = multi_token_sums(model, x_BTD, *arrays, key=key)
                aux = aux._replace(ahead=ahead, heads=heads)
            return total + sum(auxiliary_losses(model, aux).values())

        return jax.value_and_grad(loss)(model)

    return jax.tree.map(np.asarray, jax.tree.leaves(gradient(model, *batch)))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_mesh_changes_nothing(name):
    alone = trained(CONFIGS[name])
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:4])):
        spread = trained(CONFIGS[name])
    for ours, expected in zip(spread, alone, strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-4, rtol=1e-4)
