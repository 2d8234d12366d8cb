"""Every key of every family's config.json is read, known to change nothing, or refused by name."""

import functools
import json

import jax
import pytest
from flax import nnx

from research.models.families import family_of, model_config
from research.models.hub import Keys, ModelViews
from research.models.hub.keys import INERT
from research.models.language_model import LanguageModel
from tests.interop import flips
from tests.interop.checkpoints import NAMES

# What decides the shapes of tensors, which are held against the config.json: another value is another checkpoint.
SHAPES = {
    "d_model", "expand", "hidden_size", "intermediate_size", "intermediate_size_mlp", "kv_lora_rank", "linear_key_head_dim",
    "linear_value_head_dim", "mamba_head_dim", "moe_intermediate_size", "n_heads", "n_layers", "n_routed_experts",
    "num_attention_heads", "num_experts", "num_hidden_layers", "num_local_experts", "qk_nope_head_dim", "qk_rope_head_dim",
    "shared_expert_intermediate_size", "v_head_dim", "vocab_size", "index_head_dim", "attn_config", "ffn_config", "model",
}  # fmt: skip
# Read as another spelling of a key that is flipped, or in the flips of a family that shares the code.
SPELLINGS = {"rope_theta", "partial_rotary_factor", "rope_scaling", "max_position_embeddings", "mlp_layer_types"}
# Read, and not flipped in transformers.
UNFLIPPED = {
    # Its class doesn't tie, or refuses to.
    ("dbrx", "tie_word_embeddings"), ("kimi_linear", "tie_word_embeddings"), ("nemotron_h", "tie_word_embeddings"),
    # It has one value only; any other is refused.
    ("deepseek_v32", "layer_types"), ("glm_moe_dsa", "layer_types"), ("qwen2_moe", "layer_types"), ("qwen3", "layer_types"),
    # The index reads what queries are made from: there is no other way.
    ("deepseek_v32", "q_lora_rank"), ("glm_moe_dsa", "q_lora_rank"),
    # transformers has no heads ahead: ``test_heads_ahead``.
    ("deepseek_v3", "num_nextn_predict_layers"),
    # The class of transformers clamps by another key, in one of its forms; mamba2 has its flips.
    ("nemotron_h", "time_step_limit"),
}  # fmt: skip
# Marked inert without a flip in transformers, and why.
ARGUED = {
    # Derived from others: the classes of transformers overwrite them, or their attention fails where they disagree.
    "head_dim", "qk_head_dim", "num_key_value_heads",
    # Losses in training, and where experts live; transformers' classes don't have them.
    "aux_loss_alpha", "seq_aux", "ep_size",
    # Grok-1's run.py: sharding, initialisation, and the tokenizer. Its capacity_factor is never read by model.py's MoELayer.
    "embedding_init_scale", "eos_token", "fprop_dtype", "pad_token", "sequence_len", "shard_embeddings",
    # One object spelled two ways; its keys are read one by one.
    "rope_parameters", "rope_scaling",
    # Positions that Kimi Linear's attention doesn't have, and a length.
    "rope_theta", "model_max_length",
    # The published code of Kimi Linear limits groups whatever it says; without groups it means nothing.
    "use_grouped_topk",
    # The clamp that transformers has in Nemotron-H's chunked form alone, and the published kernels don't.
    "time_step_min",
    # Of drafts of several tokens by one head ahead.
    "index_share_for_mtp_iteration",
    # Block sizes: sums in another order.
    "chunk_size",
    # What layer_types, layers_block_type and tensors say as well.
    "hybrid_override_pattern", "full_attention_interval", "shared_moe_mode", "mtp_use_dedicated_embeddings",
}  # fmt: skip


class Noted(Keys):
    """Keys that remember how they were read: ``noted`` holds, by kind, names and what ``only`` allows."""

    def __init__(self, values, path="", problems=None, noted=None):
        super().__init__(values, path, problems)
        self.noted = {"read": set(), "inert": set(), "only": {}} if noted is None else noted

    def __getitem__(self, name):
        self.noted["read"].add(self._path + name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.noted["read"].add(self._path + name)
        return super().get(name, default)

    def only(self, name, *allowed):
        self.noted["only"][self._path + name] = allowed
        return super().only(name, *allowed)

    def inert(self, *names):
        self.noted["inert"].update(self._path + name for name in names)
        super().inert(*names)

    def inside(self, name):
        keys = super().inside(name)
        inner = Noted(keys._values, keys._path, keys._problems, self.noted)
        self._inside[-1] = inner
        return inner


def noted(hub):
    keys = Noted(hub)
    family_of(hub).config(keys)
    keys.check()
    return keys.noted


def changed(hub, path, value):
    """With another value under a dotted path."""
    name, _, rest = path.partition(".")
    return {**hub, name: changed(hub[name], rest, value) if rest else value}


@pytest.mark.parametrize("name", NAMES)
def test_a_key_that_nobody_reads(name):
    hub = flips.golden_config(name)
    objects = [key for key, value in hub.items() if isinstance(value, dict) and key != "quantization_config"]
    for path in ("novelty", *(f"{key}.novelty" for key in objects)):
        with pytest.raises(ValueError, match=f"nothing here reads {path}"):
            model_config(changed(hub, path, 1))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_model_cannot_do(name):
    hub = flips.golden_config(name)
    for path, allowed in noted(hub)["only"].items():
        *outer, key = path.split(".")
        if functools.reduce(lambda inner, name: inner.get(name, {}), outer, hub) == {}:
            continue
        another = not allowed[0] if isinstance(allowed[0], bool) else "another"
        with pytest.raises(ValueError, match=f"{key} must be .*, got {another!r}"):
            model_config(changed(hub, path, another))


@pytest.mark.parametrize("family", flips.families())
def test_what_is_inert_or_flipped(family):
    """A key has a flip in transformers, or is named above."""
    hub = flips.golden_config(family)
    told = noted(hub)
    flipped = {key for flip in flips.flips(family) for key in flip.change}
    inert = {key for flip in flips.inert(family) for key in flip.change}
    outer = {path for path in told["inert"] if "." not in path}
    assert outer - inert - ARGUED == set()
    read = {path for path in told["read"] - told["inert"] - set(told["only"]) if "." not in path and path in hub}
    assert {key for key in read - flipped - SHAPES - SPELLINGS if (family, key) not in UNFLIPPED} == set()
    assert INERT - set(flips.EVERYWHERE) == {"architectures", "model_type", "dtype", "quantization_config"}
    plain = {flip.model: model_config(flip.hub) for flip in flips.flips(family) if not flip.change}
    for flip in flips.inert(family):
        assert model_config(flip.hub) == plain[flip.model], flip.label


# Where an absent key is another thing here than in transformers, and why.
OTHERWISE = {
    # As published: attn_config says it, and the class of transformers (5.23) doesn't look there.
    ("dbrx", "rope_parameters"),
    # The class of transformers begins with YaRN's values of the released sizes.
    ("gpt_oss", "rope_parameters"),
}  # fmt: skip


@pytest.mark.parametrize("family", json.loads((flips.FOLDER / "absences.json").read_text()))
def test_what_absence_means(family):
    """What it means in transformers; or it is refused; or the tensors have other shapes, which is refused on loading."""
    hub = flips.golden_config(family)
    taken = json.loads((flips.FOLDER / "absences.json").read_text())[family]
    for key in set(hub) - {"architectures", "dtype", "model_type"}:
        value = taken.get(key, hub[key])
        absent = described(flips.changed(hub, {key: flips.ABSENT}))
        if absent is None or value == flips.ABSENT or (family, key) in OTHERWISE:
            continue
        said = described({**hub, key: value})
        assert said is None or absent == said or shapes(absent) != shapes(said), key


def described(hub):
    try:
        return model_config(hub), family_of(hub)
    except ValueError:
        return None


def shapes(described):
    config, family = described
    model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(params=0)))
    return flips.digest({tensor.name: tensor.shape for tensor in family.tensors(ModelViews(model))})
