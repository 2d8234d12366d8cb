"""Every mixer: parallel equals recurrent, packed equals separate, split equals whole, padding and neighbours change nothing.

Add yours to MIXERS. Three programs a mixer serve every test: a training call on two rows with its gradients, and a cached
call of one row and of one token.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.layers.attention import AttentionConfig
from research.layers.context import Context
from research.layers.deltanet import DeltaNetConfig
from research.layers.dsa import DSAConfig
from research.layers.gated_deltanet import GatedDeltaNetConfig
from research.layers.gla import GLAConfig
from research.layers.kda import KDAConfig
from research.layers.lightning import LightningConfig
from research.layers.linear_attention import LinearAttentionConfig
from research.layers.mamba import MambaConfig
from research.layers.mamba2 import Mamba2Config
from research.layers.mla import MLAConfig
from research.layers.mlp import MLPConfig
from research.layers.moe import MoEConfig
from research.layers.place import Place, Placed
from research.layers.recurrence import RecurrentState
from research.layers.retnet import RetNetConfig
from research.layers.routed_attention import RoutedAttentionConfig
from tests.layers import definitions

B, T, D = 2, 11, 12
# Short chunks, so that several meet in a row of eleven tokens.
RECURRENT = {
    "linear attention": LinearAttentionConfig(heads=4, key_heads=2, key_width=6, value_width=5, chunk_size=4),
    "linear attention, softmax, no denominator": LinearAttentionConfig(
        heads=2, key_heads=1, key_width=6, value_width=5, feature_map="softmax", normalise=False, chunk_size=4
    ),
    "retnet": RetNetConfig(heads=2, key_width=6, value_width=5, chunk_size=4),
    "lightning": LightningConfig(heads=2, head_width=6, chunk_size=4),
    "mamba": MambaConfig(channels=10, state_width=4, dt_rank=3, bias=True, select_norm_eps=1e-3, chunk_size=4),
    "mamba2": Mamba2Config(
        heads=4, head_width=5, groups=2, state_width=6, norm_groups=4, dt_limits=(0.1, 2.0), bias=True, chunk_size=4
    ),
    "gla": GLAConfig(heads=2, key_width=6, value_width=5, rank=3, chunk_size=4),
    "deltanet": DeltaNetConfig(heads=2, key_width=6, value_width=5, taps=1, negative_eigenvalues=True, chunk_size=4),
    "gated_deltanet": GatedDeltaNetConfig(heads=4, key_heads=2, key_width=6, value_width=5, chunk_size=4),
    "kda": KDAConfig(heads=2, key_width=6, value_width=5, rank=3, chunk_size=4),
}
MIXERS = RECURRENT | {
    "attention": AttentionConfig(heads=4, key_heads=2, head_width=8, rotary_fraction=0.5),
    "attention, plain": AttentionConfig(
        heads=2, key_heads=2, head_width=6, gated=False, qk_norm=None, rotary_fraction=0.0
    ),
    "attention, window and sinks": AttentionConfig(
        heads=2,
        key_heads=1,
        head_width=6,
        gated=False,
        rope_layout="pairs",
        rotary_fraction=1.0,
        window=3,
        sinks=True,
        softcap=2.0,
        bias=True,
        out_bias=True,
    ),
    "attention, chunks": AttentionConfig(
        heads=2,
        key_heads=1,
        head_width=6,
        gated=False,
        rotary_fraction=1.0,
        qk_norm_over="projection",
        rms_after_rope=True,
        chunk=4,
        temperature=0.5,
        temperature_floor=2,
        clip_qkv=1.0,
    ),
    "mla": MLAConfig(heads=3, nope_width=6, rope_width=4, value_width=5, latent=8),
    "dsa": DSAConfig(
        heads=3, nope_width=6, rope_width=4, value_width=5, latent=8, index_heads=8, index_width=8, top_k=4
    ),
    "routed attention": RoutedAttentionConfig(
        experts=4, per_token=2, heads=2, key_heads=1, head_width=6, rotary_fraction=1.0
    ),
    "moe": MoEConfig(experts=4, per_token=2, hidden=6, shared_hidden=6, shared_gate=True),
    "mlp": MLPConfig(hidden=10),
}
WHOLE = np.ones((B, T), np.int32)
PACKED = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [0, 5, 5, 0, 5, 0, 0, 8, 8, 8, 8]], np.int32)


@functools.cache
def mixer_of(name):
    """The mixer with every parameter drawn at random, and nothing compiled for it."""
    config, random = MIXERS[name], np.random.default_rng(0)
    own = {"place": Place(0, 2)} if isinstance(config, Placed) else {}
    shapes = jax.eval_shape(lambda: config.build(D, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.float32, **own))
    graphdef, params, constants = nnx.split(shapes, nnx.Param, ...)

    def draw(leaf):
        return jnp.asarray(
            random.normal(size=leaf.shape) * (leaf.shape[0] ** -0.5 if leaf.ndim > 1 else 0.5), leaf.dtype
        )

    params = jax.tree.map(draw, params)
    return nnx.merge(graphdef, params, jax.tree.map(lambda leaf: -jnp.abs(draw(leaf)), constants))


@jax.jit
def train(mixer, x_BTD, ids_BT):
    """The output, and the gradients of the mixer and of x under a loss on real tokens."""

    def loss(mixer, x_BTD):
        y_BTD, state, _ = mixer(x_BTD, None, Context(positions_of(ids_BT), ids_BT))
        assert state is None  # no state in, none out
        return jnp.sum(jnp.sin(3 * y_BTD), where=(ids_BT > 0)[..., None]), y_BTD

    gradients, y_BTD = jax.grad(loss, argnums=(0, 1), has_aux=True)(mixer, x_BTD)
    return y_BTD, gradients


@jax.jit
def serve(mixer, x_BTD, positions_BT, state, cached_B, ids_BT=None):
    y_BTD, state, _ = mixer(x_BTD, state, Context(positions_BT, ids_BT, None, cached_B))
    return y_BTD, state


def positions_of(ids_BT):
    """Place of each token in its document, where ids rise or are 0."""
    same_BTT = (ids_BT[:, :, None] == ids_BT[:, None, :]) & jnp.tri(T, dtype=bool)
    return jnp.maximum(jnp.sum(same_BTT, axis=-1) - 1, 0)


def step_by_step(mixer, x_1TD):
    """The outputs of one document decoded token by token from an empty state, and the last state."""
    state, outputs = mixer.init_state(1, T, jnp.float32), []
    for t in range(x_1TD.shape[1]):
        y_11D, state = serve(mixer, x_1TD[:, t : t + 1], np.full((1, 1), t), state, np.full(1, t))
        outputs.append(y_11D[:, 0])
    return np.stack(outputs, axis=1), state


def whole_row(mixer, x_1TD, state, ids_1T, cached=0):
    return serve(mixer, x_1TD, np.arange(T)[None], state, np.full(1, cached), ids_1T)


def inputs(ids_BT=WHOLE, padding=0.0):
    x_BTD = np.random.default_rng(1).standard_normal((B, T, D)).astype(np.float32)
    return np.where((ids_BT > 0)[..., None], x_BTD, np.float32(padding))


@pytest.mark.parametrize("name", MIXERS)
def test_parallel_equals_recurrent(name):
    mixer, x_BTD = mixer_of(name), inputs()
    parallel, _ = train(mixer, x_BTD, WHOLE)
    recurrent, _ = step_by_step(mixer, x_BTD[1:])
    chex.assert_trees_all_close(parallel[1:], recurrent, atol=1e-5)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_mixer_is_its_papers(name):
    """Against ``definitions``: float64, from the papers, token by token."""
    mixer, x_BTD = mixer_of(name), inputs()
    leaves = nnx.to_flat_state(nnx.state(mixer))
    parameters = {path[-1]: np.asarray(variable[...], np.float64) for path, variable in leaves}
    define = getattr(definitions, name.split(",")[0].replace(" ", "_"))
    want = np.stack([define(parameters, mixer.config, x_TD.astype(np.float64)) for x_TD in x_BTD])
    got, _ = train(mixer, x_BTD, WHOLE)
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 2e-6
    chex.assert_trees_all_close(np.asarray(got, np.float64), want, atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_equals_separate(name):
    mixer, x_BTD = mixer_of(name), inputs()
    packed, _ = train(mixer, x_BTD, PACKED)
    for row, document in ((0, 1), (0, 2), (1, 5), (1, 8)):
        places = np.flatnonzero(PACKED[row] == document)
        alone, _ = step_by_step(mixer, x_BTD[row, places][None])
        chex.assert_trees_all_close(packed[row, places], alone[0], atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_split_anywhere_and_carried_on_is_whole(name):
    mixer, x_1TD = mixer_of(name), inputs()[:1]
    whole, final = step_by_step(mixer, x_1TD)
    for cut in range(T + 1):
        left_1T = (np.arange(T) < cut).astype(np.int32)[None]
        first, state = whole_row(mixer, x_1TD, mixer.init_state(1, T, jnp.float32), left_1T)
        second, state = whole_row(mixer, x_1TD, state, 1 - left_1T, cut)
        chex.assert_trees_all_close(np.where(left_1T[..., None] > 0, first, second), whole, atol=1e-5)
        chex.assert_trees_all_close(state, final, atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_padding_changes_nothing(name):
    """Whatever stands in the padding, NaN too: values and every gradient stay as they were."""
    mixer, real_BT1 = mixer_of(name), (PACKED > 0)[..., None]
    clean, gradients = train(mixer, inputs(PACKED), PACKED)
    same, same_gradients = train(mixer, inputs(PACKED, np.nan), PACKED)
    chex.assert_tree_all_finite(same)
    chex.assert_trees_all_close(np.where(real_BT1, clean, 0), np.where(real_BT1, same, 0), atol=1e-6)
    chex.assert_tree_all_finite(same_gradients)
    chex.assert_trees_all_close(gradients, same_gradients, atol=1e-5)
    assert not np.where(real_BT1, 0, same_gradients[1]).any()
    if name in RECURRENT:
        assert not np.where(real_BT1, 0, same).any()  # padding puts out 0
        # Every parameter is used.
        assert all(np.any(leaf) for leaf in jax.tree.leaves(nnx.state(gradients[0], nnx.Param)))


@pytest.mark.parametrize("name", MIXERS)
def test_a_row_does_not_depend_on_its_neighbours(name):
    mixer, x_BTD = mixer_of(name), inputs()
    both, gradients = train(mixer, x_BTD, PACKED)
    turned, turned_gradients = train(mixer, x_BTD[::-1], PACKED[::-1])
    chex.assert_trees_all_close(turned[::-1], both, atol=1e-6)
    chex.assert_trees_all_close(turned_gradients[1][::-1], gradients[1], atol=1e-5)
    # In a batch of one, and from an empty state instead of none.
    pair, _ = train(mixer, x_BTD, WHOLE)
    alone, _ = whole_row(mixer, x_BTD[1:], mixer.init_state(1, T, jnp.float32), WHOLE[1:])
    chex.assert_trees_all_close(alone, pair[1:], atol=1e-6)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_state_is_as_large_as_it_says(name):
    mixer = mixer_of(name)
    state = jax.eval_shape(lambda: mixer.init_state(3, 1000, jnp.bfloat16))
    assert isinstance(state, RecurrentState) and state.memory.dtype == jnp.float32
    x_BTD = jax.ShapeDtypeStruct((3, T, D), jnp.bfloat16)
    y_BTD, after, _ = jax.eval_shape(lambda x, s: mixer(x, s, Context(jnp.zeros((3, T), jnp.int32))), x_BTD, state)
    assert y_BTD.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("name", RECURRENT)
def test_flops_count_the_matrices(name):
    """Twice the entries of every weight matrix a token, and the recurrence on top."""
    config, state = RECURRENT[name], jax.eval_shape(lambda: mixer_of(name).init_state(1, 1, jnp.float32))
    named = jax.tree_util.tree_leaves_with_path(nnx.state(mixer_of(name), nnx.Param))
    matrices = [leaf.size for path, leaf in named if "w_" in str(path) and "w_conv" not in str(path)]
    touches = 3 if "delta" in name or name == "kda" else 2  # read for the error, write, read
    assert config.flops(D, 100.0) == 2 * (sum(matrices) + touches * state.memory.size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GatedDeltaNetConfig(heads=3, key_heads=2), "heads must be a multiple of key_heads, got 3 over 2"),
        (lambda: LinearAttentionConfig(heads=3, key_heads=2), "heads must be a multiple of key_heads, got 3 over 2"),
        (
            lambda: LinearAttentionConfig(feature_map="identity"),
            "normalise needs a feature_map without negative features",
        ),
        (lambda: RetNetConfig(key_width=5), "key_width must be even to turn with the position, got 5"),
        (lambda: LightningConfig(heads=0), "heads must be at least 1, got 0"),
        (lambda: MambaConfig(state_width=0), "state_width must be at least 1, got 0"),
        (lambda: Mamba2Config(heads=3, groups=2), "heads must be a multiple of groups, got 3 over 2"),
        (lambda: Mamba2Config(heads=2, head_width=5, norm_groups=3), "norm_groups must divide the 10 channels"),
        (lambda: Mamba2Config(dt_limits=(0.1, 0.0)), "dt_limits must be a smallest and a largest step size"),
        (lambda: GLAConfig(normaliser=0.0), "normaliser must be positive, got 0.0"),
        (lambda: DeltaNetConfig(taps=0), "taps must be at least 1, got 0"),
        (lambda: KDAConfig(rank=0), "low_rank must be at least 1, got 0"),
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
