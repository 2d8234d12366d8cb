"""Linear, sliding-window, full, latent and sparse mixers in one model, by its configuration alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from research.layers.attention import AttentionConfig
from research.layers.dsa import DSAConfig
from research.layers.gated_deltanet import GatedDeltaNetConfig
from research.layers.mla import MLAConfig
from research.models.config import ModelConfig, Residual
from tests.models.small import small_model

T = 12
LATENT = {"heads": 2, "nope_width": 4, "rope_width": 4, "value_width": 4, "latent": 8}
CONFIG = ModelConfig(
    vocab_size=31,
    width=12,
    branches=(
        Residual("linear", GatedDeltaNetConfig(heads=2, key_heads=1, key_width=6, value_width=6)),
        Residual("sliding", AttentionConfig(heads=2, key_heads=1, head_width=8, window=3)),
        Residual("full", AttentionConfig(heads=2, key_heads=1, head_width=8)),
        Residual("mla", MLAConfig(**LATENT)),
        Residual("dsa", DSAConfig(**LATENT, index_heads=8, index_width=8, top_k=4)),
    ),
    pattern=("linear", "linear", "sliding", "full", "mla", "linear", "dsa"),
)
call = jax.jit(lambda model, *args, **kwargs: model(*args, **kwargs))
TOKENS_BT = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, T)), jnp.int32)


@functools.cache
def model():
    return small_model(CONFIG)


def test_prefill_is_decode_at_any_split():
    """One shape for all cuts: what is left out stands behind, as padding."""
    whole = call(model(), TOKENS_BT, jnp.ones((2, T), jnp.int32)).logits_BTV
    first = lambda count: jnp.broadcast_to(jnp.arange(T) < count, (2, T)).astype(jnp.int32)  # noqa: E731
    for cut in range(1, T):
        before = call(model(), TOKENS_BT, first(cut), cache=model().init_cache(2, T))
        after = call(model(), jnp.roll(TOKENS_BT, -cut, axis=1), first(T - cut), cache=before.cache)
        both = jnp.concatenate([before.logits_BTV[:, :cut], after.logits_BTV[:, : T - cut]], axis=1)
        chex.assert_trees_all_close(both, whole, atol=3e-5)


def test_packed_is_separate():
    ids_BT = jnp.asarray([[1] * 7 + [2] * 5, [0] + [4] * 9 + [0, 0]], jnp.int32)
    packed = call(model(), TOKENS_BT, ids_BT).logits_BTV
    for row, start, stop in ((0, 0, 7), (0, 7, 12), (1, 1, 10)):
        # As another row of the same shape, to compile once.
        alone_BT = jnp.zeros((2, T), jnp.int32).at[0, : stop - start].set(TOKENS_BT[row, start:stop])
        alone_ids_BT = jnp.zeros((2, T), jnp.int32).at[0, : stop - start].set(1)
        alone = call(model(), alone_BT, alone_ids_BT).logits_BTV
        chex.assert_trees_all_close(packed[row, start:stop], alone[0, : stop - start], atol=3e-5)
