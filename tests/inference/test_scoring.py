"""Scores of given text against the model's own logits, in float64 on the host; and log-probabilities of what is drawn."""

import itertools

import jax
import numpy as np
import pytest

from research.inference import generate, generate_with_logprobs, pieces, score, scoring, stream_with_logprobs
from research.sharding.mesh import MeshConfig, make_mesh
from tests.inference.test_generation import random_model

ROWS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [30], [0, 0, 7]]


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def logprobs_BTV(model):
    """Of the next token after every place of ``ROWS``, float64."""
    rows_BT, ids_BT = np.zeros((4, 16), np.int32), np.zeros((4, 16), np.int32)
    for b, row in enumerate(ROWS):
        rows_BT[b, : len(row)], ids_BT[b, : len(row)] = row, 1
    return log_softmax(jax.jit(lambda model, *args: model(*args).logits_BTV)(model, rows_BT, ids_BT))


def log_softmax(logits):
    wide = np.asarray(logits, np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def scores(model):
    return score(model, ROWS, top=3)


def test_scores_are_the_models_log_probabilities(logprobs_BTV, scores):
    for b, (row, found) in enumerate(zip(ROWS, scores, strict=True)):
        N = len(row) - 1
        expected_NV = logprobs_BTV[b, :N]
        picked_N = expected_NV[np.arange(N), row[1:]]
        np.testing.assert_allclose(found.logprobs_N, picked_N, rtol=1e-5, atol=1e-5)
        assert found.greedy_N.tolist() == (expected_NV.argmax(-1) == row[1:]).tolist()
        assert found.top_ids_NK.tolist() == np.argsort(-expected_NV, axis=-1)[:, :3].tolist()
        np.testing.assert_allclose(found.top_logprobs_NK, -np.sort(-expected_NV)[:, :3], rtol=1e-5, atol=1e-5)
        assert found.total == pytest.approx(picked_N.sum(), rel=1e-5)
        if N:
            assert found.perplexity == pytest.approx(np.exp(-picked_N.mean()), rel=1e-4)
    assert np.isnan(scores[2].perplexity) and scores[2].total == 0


def test_what_is_given_is_not_scored(model, scores):
    some = score(model, ROWS, [3, 10, 1, 3], top=3, batch_size=4)
    for found, whole, first in zip(some, scores, (3, 10, 1, 3), strict=True):
        for part, all in zip(found, whole, strict=True):
            np.testing.assert_array_equal(part, all[first - 1 :])


@pytest.mark.slow
def test_pieces_of_logits_and_batches_change_nothing(model, scores, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 3 * 31 * 7)
    scoring.read.clear_cache()
    told = []
    for found, whole in zip(
        score(model, ROWS, top=3, batch_size=3, progress=lambda *n: told.append(n)), scores, strict=True
    ):
        np.testing.assert_allclose(found.logprobs_N, whole.logprobs_N, rtol=1e-6, atol=1e-6)
        assert found.top_ids_NK.tolist() == whole.top_ids_NK.tolist()
    assert told == [(3, 4), (4, 4)]
    scoring.read.clear_cache()


def test_pieces_score_every_token_once_with_context():
    row = list(range(100, 123))
    for longest, overlap in ((8, 0), (8, 3), (1, 0), (22, 0), (50, 20)):
        scored, before = [], []
        for ids, given in pieces(row, longest, overlap):
            assert len(ids) - 1 <= longest and (not scored or given == 1 + overlap)
            assert not scored or ids[:given] == before[-given:]
            scored, before = scored + ids[given:], ids
        assert scored == row[1:]
    assert list(pieces([7], 8)) == []
    with pytest.raises(ValueError, match=r"^overlap must be at least 0 and at most 7, got 8"):
        list(pieces(row, 8, 8))


DRAWN = {"max_new_tokens": 12, "temperature": 1.3, "top_k": 5, "seed": 1, "stop": (21,)}


@pytest.fixture(scope="module")
def drawn(model):
    return generate_with_logprobs(model, ROWS, top=3, **DRAWN)


def test_what_is_drawn_comes_with_its_log_probability(model, drawn):
    """Equal to the parallel form's, whatever the temperature and filters."""
    read = score(model, [[*row, *new.ids] for row, new in zip(ROWS, drawn, strict=True)], list(map(len, ROWS)), top=3)
    assert {len(new.ids) for new in drawn} != {12}, "a row should end early"
    for new, found in zip(drawn, read, strict=True):
        assert len(new.logprobs) == len(new.top) == len(new.ids)
        np.testing.assert_allclose(new.logprobs, found.logprobs_N, rtol=1e-4, atol=1e-4)
        assert [[i for i, _ in place] for place in new.top] == found.top_ids_NK.tolist()
        np.testing.assert_allclose(
            [[p for _, p in place] for place in new.top], found.top_logprobs_NK, rtol=1e-4, atol=1e-4
        )
    blocks = list(stream_with_logprobs(model, ROWS, top=3, block=5, **DRAWN))
    for b, row in enumerate(drawn):
        assert [*itertools.chain.from_iterable(block[b].logprobs for block in blocks)] == row.logprobs


@pytest.mark.slow
def test_log_probabilities_change_no_token(model, drawn):
    assert [row.ids for row in drawn] == generate(model, ROWS, **DRAWN)


@pytest.mark.slow
def test_a_mesh_changes_nothing(scores):
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:6])):
        found = score(random_model(), ROWS, top=3)
    for a, b in zip(found, scores, strict=True):
        np.testing.assert_allclose(a.logprobs_N, b.logprobs_N, rtol=1e-5, atol=1e-5)
        assert a.top_ids_NK.tolist() == b.top_ids_NK.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [[1], []]}, r"rows\[1\] is empty: it must hold at least the token that is given"),
        ({"rows": [[31]]}, r"rows\[0\] must hold token ids from 0 to 30, got 31"),
        ({"given": 3}, r"given\[0\] must be at least 1 and at most 2, got 3"),
        ({"given": [1, 1]}, r"given must be one number, or one for each of 1 rows, got 2"),
        ({"top": 32}, r"top must be at least 0 and at most 31, got 32"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
    ],
)
def test_a_bad_argument_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        score(model, **{"rows": [[1, 2]], **arguments})
