"""DeepSeek sparse attention: exact where it selects all, equal however it is cut, and its two stages of training."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.layers.context import Context
from research.layers.dsa import DSAConfig
from research.layers.mla import MLAConfig
from research.layers.mlp import MLPConfig
from research.models.config import ModelConfig, Residual
from research.models.sparsify import from_dense
from tests.models.small import small_model

B, T, D = 2, 13, 12
SIZES = {"heads": 3, "nope_width": 6, "rope_width": 4, "value_width": 5, "latent": 8, "query_latent": 7}
SMALL = DSAConfig(**SIZES, index_heads=8, index_width=8, top_k=4)


@functools.cache
def layer_of(config):
    made = config.build(D, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.float32)
    leaves, structure = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        structure, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@jax.jit
def call(layer, x_BTD, positions_BT, segment_ids_BT=None, state=None, cached_B=None):
    return layer(x_BTD, state, Context(positions_BT, segment_ids_BT, None, cached_B))[:2]


def inputs():
    return jax.random.normal(jax.random.key(2), (B, T, D)), jnp.broadcast_to(jnp.arange(T), (B, T))


def test_selecting_all_is_dense_attention_exactly():
    sparse = layer_of(dataclasses.replace(SMALL, top_k=T))
    dense = MLAConfig(**SIZES).build(D, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.float32)
    for name in (
        "w_query_down_DR",
        "w_query_RN",
        "w_down_DK",
        "w_key_HKN",
        "w_value_HVK",
        "w_out_ND",
        "query_norm",
        "latent_norm",
    ):
        setattr(dense, name, getattr(sparse, name))
    np.testing.assert_array_equal(call(sparse, *inputs())[0], call(dense, *inputs())[0])


@pytest.mark.parametrize("prefill", ["masked", "gathered"])
def test_a_cache_continues_at_any_split(prefill):
    layer, (x_BTD, positions_BT) = layer_of(dataclasses.replace(SMALL, prefill=prefill)), inputs()
    whole, _ = call(layer, x_BTD, positions_BT)
    for split in (6,) if prefill == "masked" else (T - 1,):
        state = layer.init_state(B, T, jnp.float32)
        first, state = call(layer, x_BTD[:, :split], positions_BT[:, :split], None, state, jnp.zeros(B, jnp.int32))
        rest, _ = call(layer, x_BTD[:, split:], positions_BT[:, split:], None, state, jnp.full(B, split))
        chex.assert_trees_all_close(jnp.concatenate([first, rest], axis=1), whole, atol=1e-5)


def training(stage, prefill, length):
    """The gradient of both losses, and what it is called with: shapes alone."""
    # Named, so that no kernel for TPUs is made for the warm-up: that looks at all T² places.
    config = dataclasses.replace(SMALL, stage=stage, prefill=prefill, top_k=64, implementation="blocked")
    layer = jax.eval_shape(lambda: config.build(D, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.float32))

    def loss(layer, x_BTD):
        y_BTD, _, statistics = layer(x_BTD, None, Context(jnp.arange(length)[None], deterministic=False))
        return jnp.sum(jnp.sin(y_BTD)) + layer.config.losses(statistics)["index_loss"]

    return jax.jit(jax.grad(loss, (0, 1))), (layer, jax.ShapeDtypeStruct((1, length, D), jnp.float32))


def sizes(jaxpr):
    """Elements of every array that a program makes, those of the programs in it included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(parameter, "eqns"):
                yield from sizes(parameter)


FORMS = [("sparse", "masked"), ("sparse", "gathered"), ("warm_up", None)]


@pytest.mark.parametrize(("stage", "prefill"), FORMS)
def test_training_makes_no_square_array(stage, prefill):
    """The largest array of prefill, divergence and both gradients at T = 32K and 128K: twice a length is twice an array."""
    lengths = 1 << 15, 1 << 17
    largest = []
    for length in lengths:
        function, arguments = training(stage, prefill, length)
        largest.append(max(sizes(function.trace(*arguments).jaxpr)))
    assert largest[0] < lengths[0] ** 2 / 16
    assert largest[1] <= 4 * largest[0]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "prefill"), FORMS)
def test_training_on_a_long_row_fits(stage, prefill):
    """Compiled for real, not run: the whole of its memory is an eighth of one float32 array of T·T."""
    length = 1 << 15
    function, arguments = training(stage, prefill, length)
    memory = function.lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * length**2 / 8


@pytest.mark.slow
def test_a_mask_of_bits_selects_what_is_gathered():
    """So many keys that a bit each is less than naming those selected: with and without a loss that wants them named."""
    length, config = 136, dataclasses.replace(SMALL, top_k=130)
    x_BTD = jax.random.normal(jax.random.key(3), (1, length, D))

    @functools.partial(jax.jit, static_argnums=1)
    def run(layer, deterministic):
        return layer(x_BTD, None, Context(jnp.arange(length)[None], deterministic=deterministic))[0]

    masked, gathered = (layer_of(dataclasses.replace(config, prefill=prefill)) for prefill in ("masked", "gathered"))
    expected = run(gathered, True)
    for deterministic in (True, False):
        np.testing.assert_allclose(run(masked, deterministic), expected, atol=2e-6)


def test_sparse_is_not_dense():
    x = inputs()
    sparse, dense = (call(layer_of(dataclasses.replace(SMALL, top_k=k)), *x)[0] for k in (4, T))
    chex.assert_trees_all_close(sparse[:, :4], dense[:, :4], atol=1e-5)
    assert jnp.abs(sparse[:, 4:] - dense[:, 4:]).max(-1).min() > 1e-3


def test_each_loss_reaches_its_own_parameters():
    """The indexer learns from the divergence alone, everything else from the output alone, in both stages."""
    x_BTD, positions_BT = inputs()
    ids_BT = jnp.asarray([[1] * T, [1] * 9 + [0] * 4], jnp.int32)
    context = Context(positions_BT, ids_BT, deterministic=False)
    for stage in ("warm_up", "sparse"):
        layer = layer_of(dataclasses.replace(SMALL, stage=stage))

        def parts(layer):
            y_BTD, _, statistics = layer(x_BTD, None, context)
            return jnp.sum(jnp.sin(y_BTD)), layer.config.losses(statistics)["index_loss"], statistics.queries

        @jax.jit
        def gradients(layer, parts=parts):
            slopes = [jax.grad(lambda layer, i=i: parts(layer)[i])(layer) for i in (0, 1)]
            return *slopes, parts(layer)[1:]

        language, index, (loss, queries) = gradients(layer)
        assert loss > 0 and queries == 22
        for reached, of_indexer in ((language, False), (index, True)):
            for path, slope in jax.tree_util.tree_leaves_with_path(reached):
                own = "indexer" in jax.tree_util.keystr(path)
                assert (jnp.abs(slope).max() > 0) == (own == of_indexer)


def model_of(pattern, repeats=1, **fields):
    attention = {name: dataclasses.replace(SMALL, indices=name, **fields) for name in ("own", "given", "shared")}
    branches = [Residual(name, config) for name, config in attention.items()]
    branches += [Residual("mlp", MLPConfig(hidden=16)), Residual("dense", MLAConfig(**SIZES))]
    return ModelConfig(vocab_size=31, width=D, branches=tuple(branches), pattern=pattern, repeats=repeats)


run = jax.jit(lambda model, *args, **kwargs: model(*args, **kwargs))


def test_later_layers_share_a_selection():
    """A selection rides beside x through the layers of a repeat, and into the next stage."""
    config = model_of(("given", "shared", "mlp", "shared"), 2)
    model = small_model(config)
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, T)), jnp.int32)
    whole = run(model, tokens_BT).logits_BTV
    out, logits = run(model, tokens_BT[:, :7], cache=model.init_cache(2, T)), []
    logits.append(out.logits_BTV)
    for t in range(7, T):
        out = run(model, tokens_BT[:, t : t + 1], cache=out.cache)
        logits.append(out.logits_BTV)
    chex.assert_trees_all_close(jnp.concatenate(logits, axis=1), whole, atol=2e-5)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)]
    assert {path.split("mixer")[0] for path in paths if "indexer" in path} == {".stages[0].branches[0]."}
    with pytest.raises(ValueError, match="indices='shared' needs a layer with indices='given' before it"):
        jax.eval_shape(small_model(model_of(("shared",))), tokens_BT)


def test_a_dense_checkpoint_becomes_a_sparse_model():
    dense = small_model(model_of(("dense", "mlp"), 2), seed=1)
    config = model_of(("own", "mlp"), 2, top_k=T, stage="warm_up")
    sparse = from_dense(small_model(config), dense)
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, T)), jnp.int32)
    np.testing.assert_array_equal(run(sparse, tokens_BT).logits_BTV, run(dense, tokens_BT).logits_BTV)
    # The keys that training needs: an entry a layer, sums that add up.
    aux = run(sparse, tokens_BT, key=jax.random.key(0)).aux
    assert aux[0][0].divergence.shape == (2,) and aux[0][0].queries.tolist() == [2 * T] * 2
    assert run(sparse, tokens_BT).aux[0][0] is None
    with pytest.raises(ValueError, match=r"the sparse model must have .* it has"):
        from_dense(small_model(model_of(("own", "mlp"), 3)), dense)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"rope_theta": None}, "rope_theta must be a number where there is an indexer"),
        ({"index_width": 2}, "index_width must be at least rope_width, 4, got 2"),
        ({"index_width": 12, "precision": "float8"}, "needs index_width to be a power of two, got 12"),
    ],
)
def test_configurations_refuse_what_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        DSAConfig(**{**SIZES, "index_width": 8, **fields})
