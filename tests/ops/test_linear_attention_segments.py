"""Packing, padding, splitting, batching: what a caller may do with a row without changing it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.linear_attention import linear_attention
from tests.ops.test_linear_attention import MECHANISMS, NAMES, as_shipped, check, expected, make, run

PACKED = {name: MECHANISMS[name] for name in ("linear", "lightning", "gla", "gated_deltanet", "kda")}


def ids(T, *spans):
    """Segment ids from (id, length) pairs, padded with 0."""
    row = np.repeat([s for s, _ in spans], [n for _, n in spans])
    return np.pad(row, (0, T - len(row))).astype(np.int32)


ROWS = np.stack(
    [
        ids(70, (1, 70)),
        ids(70, (0, 5), (3, 20), (0, 3), (3, 4), (0, 2), (1, 16), (2, 1), (7, 15)),  # leading, interior, trailing
        ids(70, (0, 70)),
        ids(70, (0, 1), (1, 1), (2, 1), (3, 1), (0, 30), (3, 1)),
    ]
)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, "chunked") for name in PACKED),
        ("kda", "recurrent"),
        ("gated_deltanet", "recurrent"),
        ("gla", "quadratic"),
    ],
)
def test_packed_rows_match_the_oracle_with_nan_in_the_padding(name, implementation):
    x, cotangents = make(0, 4, 70, 1, 2, 8, 6, *PACKED[name])
    poisoned = {n: None if v is None else v.copy() for n, v in x.items()}
    for n in NAMES[:5]:
        if poisoned[n] is not None and poisoned[n].ndim > 1:
            poisoned[n][ROWS == 0] = np.nan
    bad = cotangents[0].copy()
    bad[ROWS == 0] = np.nan
    got = run(poisoned, (bad, cotangents[1]), ROWS, implementation=implementation)
    check(got, expected(x, cotangents, ROWS))
    assert not np.asarray(got[0])[ROWS == 0].any()
    np.testing.assert_array_equal(got[1][2], x["initial_state"][2])
    for n in NAMES[:5]:
        if x[n] is not None and x[n].ndim > 1:
            assert not np.asarray(got[2][n])[ROWS == 0].any(), n


@functools.partial(jax.jit, static_argnames="name")
def forward(x, segment_ids, name):
    """Jitted by mechanism; a prefix, a suffix or a document is a mask of segment ids, so that one program serves all."""
    return linear_attention(x["q"], x["k"], x["v"], **{n: x[n] for n in NAMES[3:]}, segment_ids=segment_ids)


@pytest.mark.parametrize("name", PACKED)
def test_packed_is_separate_and_split_anywhere_is_whole(name):
    x, _ = make(1, 1, 48, 1, 2, 8, 6, *PACKED[name])
    row = ids(48, (1, 17), (0, 2), (2, 9), (3, 20))[None]
    whole, final = forward(x, row, name)
    for cut in (*range(1, 48, 5), 19, 28):
        left = np.where(np.arange(48) < cut, row, 0)
        right = np.where(np.arange(48) >= cut, row, 0)
        o1, state = forward(x, left, name)
        # The second call must not see the first segment's id change: what was cut off started the same segment or not.
        seen = row[0, :cut][row[0, :cut] > 0]
        nxt = row[0, cut:][row[0, cut:] > 0]
        if len(seen) and len(nxt) and seen[-1] != nxt[0]:
            state = jnp.zeros_like(state)
        o2, state = forward(x | {"initial_state": state}, right, name)
        np.testing.assert_allclose(o1 + o2, whole, atol=2e-5, rtol=1e-4)
        np.testing.assert_allclose(state, final, atol=2e-5, rtol=1e-4)
    for s in (2, 3):
        alone = {**x, "initial_state": np.zeros_like(x["initial_state"])}
        o, _ = forward(alone, np.where(row == s, 1, 0).astype(np.int32), name)
        np.testing.assert_allclose(o, np.where((row == s)[..., None, None], whole, 0), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gated_deltanet", "gla"])
def test_a_row_does_not_depend_on_its_batch(name):
    """Two runs, a permuted batch and a batch of one: bitwise the same row."""
    x, cotangents = make(2, 4, 70, 2, 4, 32, 32, *MECHANISMS[name])
    whole = as_shipped(x, cotangents, ROWS)
    jax.tree.map(np.testing.assert_array_equal, whole, as_shipped(x, cotangents, ROWS))
    pick = lambda tree, rows: jax.tree.map(lambda a: a[rows], tree)  # noqa: E731
    order = np.array([2, 0, 3, 1])
    permuted = as_shipped(pick(x, order), pick(cotangents, order), ROWS[order])
    jax.tree.map(np.testing.assert_array_equal, permuted, pick(whole, order))
    rows = np.array([1])
    alone = as_shipped(pick(x, rows), pick(cotangents, rows), ROWS[rows])
    jax.tree.map(np.testing.assert_array_equal, alone, pick(whole, rows))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightning", "mamba2", "gla", "gated_deltanet", "kda"])
def test_a_row_does_not_depend_on_a_large_batch(name):
    """So large that other work is shared out among threads, and other chunks go through together, than for the row alone."""
    x, cotangents = make(2, 32, 130, 2, 2, 64, 64, *MECHANISMS[name])
    rows_BT = np.ones((32, 130), np.int32)
    whole = as_shipped(x, cotangents, rows_BT)
    pick = lambda tree: jax.tree.map(lambda a: a[3:4] if a.shape[0] == 32 else a, tree)  # noqa: E731
    alone = as_shipped(pick(x), pick(cotangents), rows_BT[3:4])
    for ours, theirs in zip(jax.tree.leaves(alone), jax.tree.leaves(whole), strict=True):
        if theirs.shape[0] == 32:  # what is not summed over the batch
            np.testing.assert_array_equal(ours, theirs[3:4])
