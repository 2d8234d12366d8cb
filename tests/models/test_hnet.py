"""Learned chunking against its definition in NumPy; one and two stages, causal, packed, decoded."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import from_json, to_json
from research.layers.attention import AttentionConfig
from research.layers.dsa import DSAConfig
from research.layers.gated_deltanet import GatedDeltaNetConfig
from research.layers.mlp import MLPConfig
from research.models.auxiliaries import Auxiliaries, auxiliary_losses
from research.models.config import HNetConfig, ModelConfig, Residual
from research.ops.dynamic_chunking import (
    ChunkStatistics,
    Routing,
    chunk_statistics,
    gather_chunks,
    ratio_loss,
    route,
    spread_chunks,
    straight_through,
)
from tests.models.small import small_model

random = np.random.default_rng(0)
IDS = np.asarray([[1] * 8 + [2] * 5, [0, 3, 3, 0, 3, 3, 3, 3, 5, 5, 5, 0, 0]], np.int32)
B, T, D = 2, 13, 6

LAYERS = (
    Residual("linear", GatedDeltaNetConfig(heads=2, key_heads=1, key_width=6, value_width=6)),
    Residual("full", AttentionConfig(heads=2, key_heads=1, head_width=8, rotary_fraction=0.5)),
    Residual("mlp", MLPConfig(hidden=12)),
)
INNER = HNetConfig(LAYERS, ("full", "mlp"), width=14, ratio=3.0)
TWO = HNetConfig((*LAYERS, Residual("chunks", INNER, skip_scale=0.0)), ("mlp", "chunks", "linear"), ratio=2.0)


def config_of(hnet):
    branches = (*LAYERS, Residual("chunks", hnet, skip_scale=0.0))
    return ModelConfig(vocab_size=31, width=12, branches=branches, pattern=("linear", "chunks", "mlp"))


call = jax.jit(lambda model, *args, **kwargs: model(*args, **kwargs))


def tokens_of(length=T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 31, (2, length)), jnp.int32)


def test_the_way_to_chunks_and_back():
    """Every document by itself, token by token, in float64."""
    q, k, x = (random.normal(size=(B, T, D)) for _ in range(3))
    h = random.normal(size=(B, T, D))
    with jax.enable_x64(True):
        ids = jnp.asarray(IDS)
        routing, _ = route(jnp.asarray(q), jnp.asarray(k), ids)
        x_BMD, p_BM, ids_BM = gather_chunks(jnp.asarray(x), routing, ids, slots=T)
        y_BTD, last_BD = spread_chunks(jnp.asarray(h), p_BM, ids_BM, routing)
        statistics = chunk_statistics(routing, ids)
    routing, x_BMD, ids_BM, y_BTD, last_BD = jax.tree.map(np.asarray, (routing, x_BMD, ids_BM, y_BTD, last_BD))
    boundaries, total = 0, 0.0
    for b in range(B):
        previous, document, chunk = None, 0, -1
        for t in range(T):
            if IDS[b, t] == 0:
                assert not routing.boundary_BT[b, t] and routing.probability_BT[b, t] == 0
                continue
            if IDS[b, t] != document:
                p, z = 1.0, np.zeros(D)
            else:
                a, c = q[b, previous], k[b, t]
                p = (1 - a @ c / np.linalg.norm(a) / np.linalg.norm(c)) / 2
            previous, document, total = t, IDS[b, t], total + p
            np.testing.assert_allclose(routing.probability_BT[b, t], p, atol=1e-12)
            if p > 0.5:
                chunk, boundaries = chunk + 1, boundaries + 1
                np.testing.assert_array_equal(x_BMD[b, chunk], x[b, t])
                assert ids_BM[b, chunk] == document
                P = np.clip(p, 1e-4, 1 - 1e-4)
                z = P * h[b, chunk] + (1 - P) * z
            np.testing.assert_allclose(y_BTD[b, t], z, atol=1e-10)
        assert (ids_BM[b, chunk + 1 :] == 0).all()
        np.testing.assert_allclose(last_BD[b], z, atol=1e-10)
    chex.assert_trees_all_close(statistics, ChunkStatistics(22.0, boundaries, total), atol=1e-6)


def test_the_merge_passes_its_gradient_straight():
    p = jnp.asarray([[1.0, 0.2, 0.7]])
    value, pull = jax.vjp(lambda p: straight_through(Routing(p, p > 0.5)), p)
    np.testing.assert_array_equal(value, jnp.ones((1, 3)))
    np.testing.assert_array_equal(pull(jnp.ones((1, 3)))[0], [[1.0, -1.0, 1.0]])


def test_the_ratio_loss_is_one_at_its_ratio():
    def loss(F, G):
        return float(ratio_loss(ChunkStatistics(*(jnp.asarray(x) for x in (100.0, 100 * F, 100 * G))), 5.0))

    assert loss(0.2, 0.2) == pytest.approx(1)
    assert loss(1.0, 1.0) == pytest.approx(5) and loss(0.0, 0.0) == pytest.approx(1.25)
    # Too many boundaries: fewer is better.
    assert loss(0.5, 0.4) < loss(0.5, 0.5)


STAGES = pytest.mark.parametrize(
    "hnet", [INNER, pytest.param(TWO, marks=pytest.mark.slow)], ids=["one stage", "two stages"]
)


@STAGES
def test_decoding_continues_prefill(hnet):
    model, tokens_BT = small_model(config_of(hnet)), tokens_of()
    whole = call(model, tokens_BT)
    out = call(model, tokens_BT[:, :7], cache=model.init_cache(2, T))
    logits = [out.logits_BTV]
    for t in range(7, T):
        out = call(model, tokens_BT[:, t : t + 1], cache=out.cache)
        logits.append(out.logits_BTV)
    chex.assert_trees_all_close(jnp.concatenate(logits, axis=1), whole.logits_BTV, atol=3e-5)
    statistics = whole.aux[0][1].own
    assert 2 < statistics.boundaries[0] < 2 * T


@pytest.mark.slow
def test_two_stages_continue_at_any_split():
    """One shape for all cuts: what is left out stands behind, as padding."""
    model, tokens_BT = small_model(config_of(TWO)), tokens_of()
    whole = call(model, tokens_BT).logits_BTV
    first = lambda count: jnp.broadcast_to(jnp.arange(T) < count, (2, T)).astype(jnp.int32)  # noqa: E731
    for cut in range(1, T):
        before = call(model, tokens_BT, first(cut), cache=model.init_cache(2, T))
        after = call(model, jnp.roll(tokens_BT, -cut, axis=1), first(T - cut), cache=before.cache)
        both = jnp.concatenate([before.logits_BTV[:, :cut], after.logits_BTV[:, : T - cut]], axis=1)
        chex.assert_trees_all_close(both, whole, atol=3e-5)


@STAGES
def test_documents_are_separate_and_padding_is_nothing(hnet):
    model, tokens_BT = small_model(config_of(hnet)), tokens_of(12)
    ids_BT = jnp.asarray([[1] * 7 + [2] * 5, [0] + [4] * 9 + [0, 0]], jnp.int32)
    packed = call(model, tokens_BT, ids_BT).logits_BTV
    for row, start, stop in ((0, 0, 7), (0, 7, 12), (1, 1, 10)):
        # Padded to one length, to compile once.
        alone_1T = jnp.zeros((1, 9), jnp.int32).at[0, : stop - start].set(tokens_BT[row, start:stop])
        alone_ids = (jnp.arange(9) < stop - start).astype(jnp.int32)[None]
        alone = call(model, alone_1T, alone_ids).logits_BTV
        chex.assert_trees_all_close(packed[row, start:stop], alone[0, : stop - start], atol=3e-5)


@STAGES
def test_gradients_reach_the_router_and_everything_behind_it(hnet):
    model, tokens_BT = small_model(config_of(hnet)), tokens_of()

    @jax.jit
    def gradient(model):
        def loss(model):
            out = model(tokens_BT)
            losses = auxiliary_losses(model, Auxiliaries(out.aux))
            return jnp.sum(jnp.sin(out.logits_BTV)) + losses["ratio_loss"], losses

        return jax.grad(loss, has_aux=True)(model)

    slopes, losses = gradient(model)
    assert set(losses) == {"ratio_loss"} and losses["ratio_loss"].shape == ()
    for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
        assert np.isfinite(slope).all() and jnp.abs(slope).max() > 0, jax.tree_util.keystr(path)


def test_too_many_chunks_stay_in_the_last():
    """Three slots for four chunks and more: tokens of the fourth read the third, a document without a chunk reads nothing."""
    boundary = jnp.asarray([[1, 0, 1, 1, 0, 1, 0], [1, 1, 0, 1, 1, 0, 1]], bool)
    ids = jnp.asarray([[1] * 7, [1, 1, 1, 1, 2, 2, 2]], jnp.int32)
    with jax.enable_x64(True):
        p, x = jnp.where(boundary, 0.75, 0.25), jnp.asarray(random.normal(size=(2, 7, D)))
        routing = Routing(p, boundary)
        h_BMD, p_BM, ids_BM = gather_chunks(x, routing, ids, slots=3)
        y_BTD, last_BD = spread_chunks(h_BMD, p_BM, ids_BM, routing, ids)
    h, expected = np.asarray(h_BMD), []
    np.testing.assert_array_equal(h, [x[0, [0, 2, 3]], x[1, [0, 1, 3]]])
    assert ids_BM.tolist() == [[1, 1, 1], [1, 1, 1]]
    for row in h:
        z = [0.75 * row[0]]
        for chunk in row[1:]:
            z.append(0.75 * chunk + 0.25 * z[-1])
        expected.append(z)
    (a, b, c), (d, e, f), none = *expected, np.zeros(D)
    np.testing.assert_allclose(y_BTD, [[a, a, b, c, c, c, c], [d, e, e, f, none, none, none]], atol=1e-12)
    np.testing.assert_allclose(last_BD, [c, f], atol=1e-12)


@pytest.mark.slow
def test_a_model_whose_chunks_overflow_is_causal():
    config = dataclasses.replace(INNER, capacity=0.3)
    model, tokens_BT = small_model(config_of(config)), tokens_of()
    whole = call(model, tokens_BT)
    assert whole.aux[0][1].own.boundaries[0] > 2 * round(0.3 * T)
    # The same router with room for all: what overflows makes a difference, and none before it does.
    roomy = call(small_model(config_of(INNER)), tokens_BT).logits_BTV
    differs_T = jnp.abs(whole.logits_BTV - roomy).max((0, 2)) > 1e-4
    assert differs_T.any() and not differs_T[:4].any()
    before = call(model, tokens_BT.at[:, 9:].add(1) % 31).logits_BTV
    chex.assert_trees_all_close(before[:, :9], whole.logits_BTV[:, :9], atol=1e-5)
    assert jnp.abs(before[:, 9:] - whole.logits_BTV[:, 9:]).max() > 1e-3


def test_a_selection_reaches_later_stages_over_chunks():
    """Two layers that choose and two that share are two stages."""
    given = DSAConfig(
        heads=2, nope_width=4, rope_width=4, value_width=4, latent=8, index_width=4, top_k=2, indices="given"
    )
    layers = (Residual("given", given), Residual("shared", dataclasses.replace(given, indices="shared")))
    model = small_model(config_of(HNetConfig(layers, ("given", "given", "shared", "shared"), ratio=2.0)))
    assert len(model.stages[0].branches[1].mixer.plan) == 2
    assert jax.eval_shape(lambda: model(tokens_of()).logits_BTV).shape == (2, T, 31)


def test_layers_over_chunks_are_recomputed_too():
    for remat, stages in ((False, 0), (True, 2)):
        model = small_model(dataclasses.replace(config_of(INNER), remat=remat))
        assert str(jax.make_jaxpr(model)(tokens_of())).count("prevent_cse") == stages


def test_a_configuration_within_itself_survives_json():
    config = config_of(TWO)
    assert from_json(ModelConfig, to_json(config)) == config
    for fields, message in (
        ({"ratio": 1.0}, "ratio must be more than 1, got 1.0"),
        ({"capacity": 0.0}, "capacity must be more than 0 and at most 1, got 0.0"),
        ({"pattern": ("none",)}, "pattern names 'none', which is no branch"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(INNER, **fields)
