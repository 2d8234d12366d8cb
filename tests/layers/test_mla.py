"""Multi-head latent attention: both forms against a definition in float64, and the size of the cache."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.layers.attention import AttentionConfig
from research.layers.context import Context
from research.layers.gated_deltanet import GatedDeltaNetConfig
from research.layers.mla import MLAConfig
from research.models.cache_size import cache_bytes, cache_bytes_per_token
from research.models.config import ModelConfig, Residual
from research.ops.rope import YarnScaling

B, T, D = 2, 11, 12
YARN = YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
SMALL = MLAConfig(
    heads=3, nope_width=6, rope_width=4, value_width=5, latent=8, query_latent=7, rope_theta=100.0, rope_scaling=YARN
)
DEEPSEEK_V3 = MLAConfig(
    heads=128, nope_width=128, rope_width=64, value_width=128, latent=512, query_latent=1536, rope_scaling=YARN
)


def mla_of(config):
    return config.build(D, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.float32)


@jax.jit
def call(mla, x_BTD, positions_BT, segment_ids_BT=None, state=None, cached_B=None):
    return mla(x_BTD, state, Context(positions_BT, segment_ids_BT, None, cached_B))[:2]


def definition(mla, x):
    """Eq. 37-47 of the paper, token by token and head by head, in float64."""
    from research.ops.rope import frequencies

    c = mla.config
    w = {name: np.asarray(getattr(mla, name)[...], np.float64) for name in (
        "w_query_down_DR", "w_query_RN", "w_down_DK", "w_key_HKN", "w_value_HVK", "w_out_ND")}  # fmt: skip

    def normed(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def turn(x, t):
        pairs = (x[0::2] + 1j * x[1::2]) * np.exp(1j * t * frequencies(c.rope_width, c.rope_theta, YARN))
        return np.stack([pairs.real, pairs.imag], -1).reshape(-1)

    ups = w["w_key_HKN"], np.swapaxes(w["w_value_HVK"], 1, 2)
    out = np.zeros((*x.shape[:2], D))
    for b in range(x.shape[0]):
        down = x[b] @ w["w_down_DK"]
        key, value = (normed(down[:, : c.latent]) @ up for up in ups)
        query = (normed(x[b] @ w["w_query_down_DR"]) @ w["w_query_RN"]).reshape(x.shape[1], c.heads, -1)
        for t in range(x.shape[1]):
            heads = []
            for h in range(c.heads):
                q = np.concatenate([query[t, h, : c.nope_width], turn(query[t, h, c.nope_width :], t)])
                k = [np.concatenate([key[h, s], turn(down[s, c.latent :], s)]) for s in range(t + 1)]
                weight = np.exp(np.asarray(k) @ q * 10**-0.5 * (0.1 * np.log(40) + 1) ** 2)
                heads.append(weight / weight.sum() @ value[h, : t + 1])
            out[b, t] = np.concatenate(heads) @ w["w_out_ND"]
    return out


def test_both_forms_equal_the_definition():
    x_BTD, positions_BT = jax.random.normal(jax.random.key(1), (B, T, D)), jnp.broadcast_to(jnp.arange(T), (B, T))
    oracle = definition(mla_of(SMALL), np.asarray(x_BTD, np.float64))
    for form in ("unabsorbed", "absorbed"):
        y_BTD, none = call(mla_of(dataclasses.replace(SMALL, form=form)), x_BTD, positions_BT)
        assert none is None
        np.testing.assert_allclose(y_BTD, oracle, atol=1e-5 * np.abs(oracle).max())


@pytest.mark.parametrize("form", ["unabsorbed", "absorbed", None])
def test_a_cache_of_latents_continues_at_any_split(form):
    mla = mla_of(dataclasses.replace(SMALL, form=form))
    x_BTD, positions_BT = jax.random.normal(jax.random.key(1), (B, T, D)), jnp.broadcast_to(jnp.arange(T), (B, T))
    whole, _ = call(mla, x_BTD, positions_BT)
    for split in (1, 6):
        empty = mla.init_state(B, T, jnp.float32)
        first, state = call(mla, x_BTD[:, :split], positions_BT[:, :split], None, empty, jnp.zeros(B, jnp.int32))
        rest, state = call(mla, x_BTD[:, split:], positions_BT[:, split:], None, state, jnp.full(B, split))
        chex.assert_trees_all_close(jnp.concatenate([first, rest], axis=1), whole, atol=1e-5)
        assert state.latent_BSK.shape == (B, T, 12)


def test_decoding_absorbs_and_prefill_does_not():
    assert DEEPSEEK_V3.absorbs(1) and DEEPSEEK_V3.absorbs(4) and not DEEPSEEK_V3.absorbs(1024)


def model_of(mixer, layers):
    return ModelConfig(vocab_size=8, width=64, branches=(Residual("mixer", mixer),), pattern=("mixer",), repeats=layers)


def test_deepseek_v3_caches_70272_bytes_a_token():
    assert cache_bytes_per_token(model_of(DEEPSEEK_V3, 61), jnp.bfloat16) == 576 * 2 * 61 == 70_272
    # Llama 3.1 405B, for comparison: 126 layers of 8 key heads of 128.
    llama = AttentionConfig(heads=128, key_heads=8, head_width=128, gated=False)
    assert cache_bytes_per_token(model_of(llama, 126), jnp.bfloat16) == 516_096


def test_windows_and_states_cache_nothing_more():
    window = model_of(AttentionConfig(heads=2, key_heads=1, head_width=16, window=128), 3)
    assert cache_bytes_per_token(window) == 0
    assert cache_bytes(window, 1 << 20, jnp.float32) == 3 * 2 * 128 * 16 * 4
    assert cache_bytes_per_token(model_of(GatedDeltaNetConfig(), 3)) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_width": 3}, "rope_width must be even and not negative, got 3"),
        ({"latent": 0}, "latent must be at least 1, got 0"),
        ({"query_latent": 0}, "query_latent must be None or at least 1, got 0"),
    ],
)
def test_configurations_refuse_what_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        MLAConfig(**fields)
