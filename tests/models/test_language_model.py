"""The whole model: parallel equals recurrent, packed equals separate, deep compiles like shallow."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.models.language_model import LanguageModel, positions_of
from tests.models.small import CONFIG, small_model


@pytest.fixture(scope="module")
def model():
    return small_model()


call = jax.jit(lambda model, *args, **kwargs: model(*args, **kwargs))


def tokens_of(batch, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length)), jnp.int32)


@pytest.mark.parametrize("prefill", [1, 6])
def test_decode_continues_prefill(model, prefill):
    tokens_BT = tokens_of(2, 9)
    whole = call(model, tokens_BT)
    out = call(model, tokens_BT[:, :prefill], cache=model.init_cache(2, 9))
    logits = [out.logits_BTV]
    for t in range(prefill, 9):
        out = call(model, tokens_BT[:, t : t + 1], cache=out.cache)
        logits.append(out.logits_BTV)
    chex.assert_trees_all_close(jnp.concatenate(logits, axis=1), whole.logits_BTV, atol=2e-5)
    np.testing.assert_array_equal(out.cache.length_B, [9, 9])
    assert whole.cache is None


def test_rows_of_different_length_share_a_cached_call(model):
    tokens_BT, ids_BT = tokens_of(2, 6), jnp.asarray([[1] * 6, [1] * 4 + [0] * 2], jnp.int32)
    out = call(model, tokens_BT, ids_BT, cache=model.init_cache(2, 9))
    np.testing.assert_array_equal(out.cache.length_B, [6, 4])
    more_B1 = tokens_of(2, 1, seed=1)
    after = call(model, more_B1, cache=out.cache).logits_BTV[:, 0]
    for row, length in enumerate((6, 4)):
        alone = jnp.concatenate([tokens_BT[row, :length], more_B1[row]])[None]
        chex.assert_trees_all_close(after[row], call(model, alone).logits_BTV[0, -1], atol=2e-5)


def test_packed_documents_equal_separate_ones(model):
    tokens_BT = tokens_of(1, 12)
    ids_BT = jnp.asarray([[0, 3, 3, 3, 3, 0, 7, 7, 7, 7, 7, 0]], jnp.int32)
    packed = call(model, tokens_BT, ids_BT).logits_BTV
    for start, stop in ((1, 5), (6, 11)):
        alone = call(model, tokens_BT[:, start:stop]).logits_BTV
        chex.assert_trees_all_close(packed[:, start:stop], alone, atol=2e-5)


def test_padding_counts_for_no_expert(model):
    ids_BT = jnp.asarray([[1] * 5 + [0] * 7], jnp.int32)
    aux = call(model, tokens_of(1, 12), ids_BT).aux
    (statistics,) = [entry for stage in aux for entry in stage if entry is not None]
    np.testing.assert_array_equal(statistics.counts_E.sum(-1), [10, 10])
    np.testing.assert_array_equal(statistics.tokens, [5, 5])


def test_a_token_changes_nothing_before_it(model):
    tokens_BT = tokens_of(1, 8)
    changed = tokens_BT.at[0, 5].add(1)
    before, after = call(model, tokens_BT).logits_BTV, call(model, changed).logits_BTV
    chex.assert_trees_all_close(before[:, :5], after[:, :5], atol=1e-6)
    assert jnp.abs(before[:, 5:] - after[:, 5:]).max(-1).min() > 1e-3


def test_positions_restart_and_continue():
    ids_BT = jnp.asarray([[0, 4, 4, 0, 4, 9, 9, 0]], jnp.int32)
    tokens_BT = jnp.zeros((1, 8), jnp.int32)
    np.testing.assert_array_equal(positions_of(tokens_BT, ids_BT), [[0, 0, 1, 1, 2, 0, 1, 1]])
    np.testing.assert_array_equal(positions_of(tokens_BT[:, :2], None, jnp.asarray([5])), [[5, 6]])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_64_layers_compile_to_the_program_of_4(compiled):
    def lines(repeats):
        config = dataclasses.replace(CONFIG, pattern=("linear", "mlp", "full", "mlp"), repeats=repeats)
        model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(params=0)))
        assert len(config.layers) == 4 * repeats

        def loss(model, tokens_BT):
            return model(tokens_BT).logits_BTV.sum()

        lowered = jax.jit(jax.grad(loss)).lower(model, jax.ShapeDtypeStruct((1, 8), jnp.int32))
        return len((lowered.compile() if compiled else lowered).as_text().splitlines())

    # Two repeats: XLA drops the loop around a single one.
    shallow, deep = lines(2), lines(32)
    assert abs(deep - shallow) <= 0.1 * shallow


def test_a_tied_head_has_one_owner():
    config = dataclasses.replace(CONFIG, tie_embeddings=True, pattern=("mlp",), repeats=1)
    model = small_model(config)
    assert model.head_DV is None
    gradient = jax.grad(lambda model: jnp.square(model(tokens_of(1, 4)).logits_BTV).sum())(model)
    assert isinstance(gradient, LanguageModel)
    # Rows of tokens never read still learn through the head.
    assert jnp.abs(gradient.embedding_VD[...]).max(-1).min() > 0
