"""The lightning indexer, attention to what it selects, and its loss, against definitions in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.attention import attention, tokens_of, visible
from research.ops.sparse_attention import attend_selected, index_divergence, index_scores, select
from research.ops.sparse_attention import blocks as query_blocks
from research.ops.sparse_attention.index import hadamard, round_float8

random = np.random.default_rng(0)
IDS = np.asarray([[1] * 13 + [2] * 4, [0, 3, 3, 3, 0, 3, 3, 3, 3, 3, 3, 8, 8, 8, 8, 8, 0]], np.int32)
B, T, N = 2, 17, 4


def indexer(B=B, T=T, H=3, K=8):
    q, k, w = random.normal(size=(B, T, H, K)), random.normal(size=(B, T, K)), random.normal(size=(B, T, H))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, w)]


def defined_scores(q, k, w):
    q, k, w = (np.asarray(x, np.float64) for x in (q, k, w))
    return (np.maximum(np.einsum("bthk,bsk->bths", q, k), 0) * w[..., None]).sum(2)


def sees(ids):
    return (ids[:, :, None] == ids[:, None]) & (ids[:, None] > 0) & np.tri(ids.shape[1], dtype=bool)


@pytest.fixture
def small_blocks(monkeypatch):
    """A few queries at a time, so that short rows are cut too."""
    monkeypatch.setattr(query_blocks, "_ELEMENTS", 600)


def test_selection_is_the_causal_top_k_within_the_document(small_blocks):
    q, k, w = indexer()
    tokens = tokens_of(jnp.asarray(IDS), IDS.shape)
    index = np.asarray(jax.jit(lambda *x: select(*x, tokens, tokens, top_k=N))(q, k, w))
    score, seen = defined_scores(q, k, w), sees(IDS)
    np.testing.assert_allclose(index_scores(q, k, w), score, atol=1e-5)
    for b, t in np.ndindex(B, T):
        order = sorted(np.flatnonzero(seen[b, t]), key=lambda s: (-score[b, t, s] + 0.0, s))
        assert index[b, t].tolist() == (order + [T] * N)[:N]


def test_ties_go_to_the_lowest_slot():
    """Zeros of both signs, and equal numbers that are not zero."""
    q, k = jnp.ones((1, 6, 1, 2)), jnp.asarray([[-1.0, 1, -1, 1, 1, -1]])[..., None] * jnp.ones(2)
    tokens = tokens_of(None, (1, 6))
    for sign, expected in ((1.0, [1, 3, 4, 0]), (-1.0, [0, 2, 5, 1])):
        index = select(q, k, jnp.full((1, 6, 1), sign), tokens, tokens, top_k=4)
        assert index[0, 5].tolist() == expected
    flat = select(q, jnp.zeros_like(k), jnp.full((1, 6, 1), -1.0), tokens, tokens, top_k=3)
    assert flat[0].tolist() == [[0, 6, 6], [0, 1, 6], *[[0, 1, 2]] * 4]


def test_low_precision_changes_little_of_the_selection():
    """128 of 1024 keys by random heads, which spread scores far less than trained ones do."""
    q, k, w = indexer(B=1, T=1024, H=16, K=128)
    tokens = tokens_of(None, (1, 1024))
    last = tuple(x[:, -64:] for x in tokens)

    @jax.jit
    def chosen(q, k, w):
        options = {"query": type(tokens)(*last), "source": tokens, "top_k": 128}
        return [select(q[:, -64:], k, w[:, -64:], **options, precision=p) for p in ("float32", "bfloat16", "float8")]

    exact, *rounded = (np.asarray(x)[0] for x in chosen(q, k, w))
    kept = [np.mean([len(set(a) & set(b)) / 128 for a, b in zip(exact, x, strict=True)]) for x in rounded]
    assert kept[0] > 0.985 and kept[1] > 0.92, kept
    assert kept[0] > kept[1]


def test_a_hadamard_turn_changes_no_product():
    x, y = random.normal(size=(2, 5, 64))
    with jax.enable_x64(True):
        turned = hadamard(jnp.asarray(x)) @ hadamard(jnp.asarray(y)).T
    np.testing.assert_allclose(turned, x @ y.T, atol=1e-12)
    with pytest.raises(ValueError, match="must be a power of two, got 6"):
        hadamard(jnp.ones((2, 6)))


def test_float8_has_a_scale_for_each_128_channels():
    """Against the nearest of all numbers of e4m3, by hand: three bits after the point, powers from -6 to 8, 448 the most."""
    numbers = [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)][:-1]
    numbers = np.asarray(sorted({0.0, *numbers, *(m / 8 * 2.0**-6 for m in range(8))}))
    assert numbers[-1] == 448
    x = random.normal(size=(3, 300)) * np.repeat([1.0, 100.0, 1e-3], [128, 128, 44])
    ours = np.asarray(round_float8(jnp.asarray(x, jnp.float32)))
    for row, rounded in zip(np.float32(x), ours, strict=True):
        for start in (0, 128, 256):
            block = row[start : start + 128]
            scale = 2.0 ** np.ceil(np.log2(np.abs(block).max() / 448))
            distance = np.abs(np.abs(block[:, None] / scale) - numbers)
            np.testing.assert_allclose(
                np.abs(np.abs(block) - np.abs(rounded[start : start + 128])), scale * distance.min(1), atol=1e-12
            )
            assert (np.sign(rounded[start : start + 128]) * np.sign(block) >= 0).all()
    assert (round_float8(jnp.zeros((2, 5))) == 0).all()


def test_arguments_that_cannot_be_are_named():
    q, k, v = attention_arrays()
    with pytest.raises(ValueError, match="query heads must be a multiple of key heads, got 3 over 2"):
        attend_selected(q[:, :, :3], k, v, jnp.zeros((B, T, 1), jnp.int32))
    tokens = tokens_of(None, (B, T))
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        select(q, k[:, :, 0], q[..., 0], tokens, tokens, top_k=0)


def attention_arrays():
    shapes = (B, T, 4, 5), (B, T, 2, 5), (B, T, 2, 3)
    return [jnp.asarray(random.normal(size=s), jnp.float32) for s in shapes]


def test_attention_reads_the_selected_keys_only(small_blocks):
    """Gathered, values and gradients, against dense attention whose other scores are masked in float64."""
    q, k, v = attention_arrays()
    tokens = tokens_of(jnp.asarray(IDS), IDS.shape)
    index = select(*indexer(), tokens, tokens, top_k=N)
    chosen = np.zeros((B, T, T + 1), bool)
    np.put_along_axis(chosen, np.asarray(index), True, axis=-1)
    weights = jnp.asarray(random.normal(size=(B, T, 4, 3)), jnp.float32)

    def definition(q, k, v):
        score = jnp.einsum("BTHK,BSHK->BHTS", q, jnp.repeat(k, 2, axis=2)) * 0.3
        weight = jax.nn.softmax(score, axis=-1, where=chosen[:, None, :, :T])
        o = jnp.einsum("BHTS,BSHV->BTHV", jnp.where(chosen[:, None, :, :T], weight, 0), jnp.repeat(v, 2, axis=2))
        return o, jnp.sum(o * weights)

    @jax.jit
    def ours(q, k, v):
        def call(q, k, v):
            o = attend_selected(q, k, v, index, scale=0.3)
            return jnp.sum(o * weights), o

        return jax.grad(call, (0, 1, 2), has_aux=True)(q, k, v)

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v)]
        oracle = definition(*wide)[0]
        gradient = jax.grad(lambda *x: definition(*x)[1], (0, 1, 2))(*wide)
    slopes, o = ours(q, k, v)
    np.testing.assert_allclose(o, oracle, atol=2e-6)
    for a, b in zip(slopes, gradient, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_keys_may_be_the_values_too():
    q, k, _ = attention_arrays()
    tokens = tokens_of(None, (B, T))
    index = select(*indexer(), tokens, tokens, top_k=N)
    np.testing.assert_array_equal(attend_selected(q, k, None, index), attend_selected(q, k, k, index))


def test_all_keys_selected_is_attention():
    q, k, v = attention_arrays()
    tokens = tokens_of(jnp.asarray(IDS), IDS.shape)
    index = select(*indexer(), tokens, tokens, top_k=T)
    np.testing.assert_allclose(
        attend_selected(q, k, v, index), attention(q, k, v, segment_ids_BT=jnp.asarray(IDS)), atol=2e-6
    )


@pytest.mark.parametrize("selected", [False, True])
def test_divergence(selected, small_blocks):
    """Value against NumPy; the gradient of the scores is softmax(I) − p, and nothing reaches the attention."""
    index_q, index_k, w = indexer()
    q, k, _ = attention_arrays()
    tokens = tokens_of(jnp.asarray(IDS), IDS.shape)
    index = select(index_q, index_k, w, tokens, tokens, top_k=N) if selected else None
    mask = np.asarray(visible(tokens, tokens))
    if selected:
        mask = np.zeros((B, T, T + 1), bool)
        np.put_along_axis(mask, np.asarray(index), True, axis=-1)
        mask = mask[..., :T]
    score, total, captured = defined_scores(index_q, index_k, w), 0.0, 0.0
    for b, t in zip(*np.nonzero(IDS), strict=True):
        p = 0
        for h in range(4):
            e = np.exp(0.3 * np.asarray(k, np.float64)[b, mask[b, t], h // 2] @ np.asarray(q, np.float64)[b, t, h])
            p = p + e / e.sum() / 4
        log_q = score[b, t, mask[b, t]] - np.log(np.exp(score[b, t, mask[b, t]]).sum())
        total += (p * (np.log(p) - log_q)).sum()
        captured += p[np.argsort(0.0 - score[b, t, mask[b, t]], kind="stable")[:3]].sum()

    @jax.jit
    def ours(index_q, q):
        def loss(index_q, q):
            statistics = index_divergence(
                index_q, index_k, w, q, k, tokens, tokens, scale=0.3, index_BTN=index, top_k=3
            )
            return statistics.divergence, (statistics.queries, statistics.captured)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(index_q, q)

    (divergence, (queries, share)), (slope, none) = ours(index_q, q)
    assert share is None if selected else abs(share - captured) < 1e-4
    np.testing.assert_allclose(divergence, total, rtol=1e-5)
    assert queries == (IDS > 0).sum() and (none == 0).all()
    direction = random.normal(size=index_q.shape)
    step = 1e-3 * direction
    finite = ours(index_q + step, q)[0][0] - ours(index_q - step, q)[0][0]
    np.testing.assert_allclose(finite, 2 * (slope * step).sum(), rtol=2e-2, atol=2e-4)


def test_a_long_row_needs_no_square_array():
    """Selection and gathered attention at T = 32K in bounded memory, compiled for real, not run."""
    T, K = 1 << 15, 16
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    tokens = tokens_of(None, (1, T))

    def run(index_q, index_k, w, q, k):
        index = select(index_q, index_k, w, tokens, tokens, top_k=64)
        return attend_selected(q, k, k, index)

    shapes = shape(1, T, 2, K), shape(1, T, K), shape(1, T, 2), shape(1, T, 2, K), shape(1, T, 1, K)
    memory = jax.jit(run).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * T * T / 8
