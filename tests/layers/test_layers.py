"""Every mixer: parallel equals recurrent, packed equals separate, rows don't see each other. Add yours to MIXERS."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from research.layers.attention import AttentionConfig
from research.layers.context import Context
from research.layers.gated_deltanet import GatedDeltaNetConfig
from research.layers.mlp import MLPConfig
from research.layers.moe import MoEConfig, TopKRouter

B, T, D = 2, 9, 12
MIXERS = {
    "gated_deltanet": GatedDeltaNetConfig(heads=4, key_heads=2, key_width=6, value_width=5),
    "attention": AttentionConfig(heads=4, key_heads=2, head_width=8, rotary_fraction=0.5),
    "attention, plain": AttentionConfig(
        heads=2, key_heads=2, head_width=6, gated=False, qk_norm=None, rotary_fraction=0.0
    ),
    "moe": MoEConfig(experts=4, per_token=2, hidden=6, shared_hidden=6, shared_gate=True),
    "moe, no shared expert": MoEConfig(
        experts=4, per_token=1, hidden=6, shared_hidden=0, router=TopKRouter("sigmoid", renormalise=False)
    ),
    "mlp": MLPConfig(hidden=10),
}


@functools.cache
def mixer_of(name):
    mixer = MIXERS[name].build(D, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.float32)
    leaves, structure = jax.tree.flatten(mixer)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


@jax.jit
def call(mixer, x_BTD, positions_BT, segment_ids_BT=None, state=None, cached_B=None):
    context = Context(positions_BT, segment_ids_BT, None, cached_B)
    y_BTD, state, _ = mixer(x_BTD, state, context)
    return y_BTD, state


def inputs():
    return jax.random.normal(jax.random.key(2), (B, T, D)), jnp.broadcast_to(jnp.arange(T), (B, T))


@pytest.mark.parametrize("name", MIXERS)
def test_parallel_equals_recurrent(name):
    mixer, (x_BTD, positions_BT) = mixer_of(name), inputs()
    parallel, none = call(mixer, x_BTD, positions_BT)
    assert none is None  # no state in, none out
    state, outputs = mixer.init_state(B, T, jnp.float32), []
    for t in range(T):
        y_B1D, state = call(mixer, x_BTD[:, t : t + 1], positions_BT[:, t : t + 1], None, state, jnp.full(B, t))
        outputs.append(y_B1D)
    chex.assert_trees_all_close(jnp.concatenate(outputs, axis=1), parallel, atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_equals_separate(name):
    mixer, (x_BTD, _) = mixer_of(name), inputs()
    ids_BT = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 0], [5, 5, 0, 5, 0, 0, 8, 8, 8]], jnp.int32)
    positions_BT = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 3], [0, 1, 1, 2, 2, 2, 0, 1, 2]], jnp.int32)
    packed, _ = call(mixer, x_BTD, positions_BT, ids_BT)
    for row, places in ((0, [0, 1, 2, 3]), (0, [4, 5, 6, 7]), (1, [0, 1, 3]), (1, [6, 7, 8])):
        x_1TD = x_BTD[row, jnp.asarray(places)][None]
        alone, _ = call(mixer, x_1TD, jnp.arange(len(places))[None])
        chex.assert_trees_all_close(packed[row, jnp.asarray(places)], alone[0], atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_a_row_does_not_depend_on_its_neighbours(name):
    mixer, (x_BTD, positions_BT) = mixer_of(name), inputs()
    both, _ = call(mixer, x_BTD, positions_BT)
    alone, _ = call(mixer, x_BTD[1:], positions_BT[1:])
    chex.assert_trees_all_close(both[1:], alone, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GatedDeltaNetConfig(heads=3, key_heads=2), "heads must be a multiple of key_heads, got 3 over 2"),
        (lambda: AttentionConfig(heads=3, key_heads=2), "heads must be a multiple of key_heads, got 3 over 2"),
        (
            lambda: AttentionConfig(head_width=6, rotary_fraction=0.5),
            "must be an even number of channels, got 0.5 of 6",
        ),
        (lambda: MoEConfig(experts=4, per_token=5), "per_token must be from 1 to the 4 experts, got 5"),
        (lambda: MLPConfig(hidden=0), "hidden must be at least 1, got 0"),
    ],
)
def test_configurations_refuse_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
