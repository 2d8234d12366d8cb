"""The TPU kernels of sparse attention, interpreted on CPU, through the ops: the selection, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_attention import tpu_attend, tpu_select
from research.ops.attention import Tokens, attention, tokens_of
from research.ops.attention.masks import chosen
from research.ops.sparse_attention import select, select_mask, select_words

KERNEL = "pallas_tpu_interpret"
T = 150
IDS = np.stack([np.repeat([1, 2, 0], [90, 50, 10]), np.repeat([0, 3, 0, 3, 8, 0], [4, 20, 3, 60, 60, 3])]).astype(
    np.int32
)


def integers(seed, *shape):
    """Small enough for exact sums in any order, and for many ties."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), jnp.float32)


@pytest.mark.parametrize(("dtype", "top_k"), [(jnp.float32, 7), (jnp.bfloat16, 40)])
def test_the_same_keys_are_selected(monkeypatch, dtype, top_k):
    """Packed rows, padding within documents, ties of numbers of either sign: blocks of 16 queries and 128 keys."""
    monkeypatch.setattr(tpu_select, "_QUERIES", 16)
    monkeypatch.setattr(tpu_select, "_KEYS", 128)
    q, k, w = (integers(n, *s).astype(dtype) for n, s in enumerate([(2, T, 3, 8), (2, T, 8), (2, T, 3)]))
    tokens = tokens_of(jnp.asarray(IDS), IDS.shape)
    run = jax.jit(
        functools.partial(select_mask, query=tokens, source=tokens, top_k=top_k), static_argnames="implementation"
    )
    expected = chosen(select(q, k, w, tokens, tokens, top_k=top_k), T)
    for implementation in ("xla", KERNEL):
        np.testing.assert_array_equal(chosen(run(q, k, w, implementation=implementation), T), expected)


def test_keys_beside_the_queries(monkeypatch):
    """A cache: more keys than 4096, the last of them empty, and negative zeros among the scores."""
    monkeypatch.setattr(tpu_select, "_KEYS", 1024)
    S, filled = 4500, jnp.array([4400, 30])
    q, k, w = integers(0, 2, 3, 2, 4), integers(1, 2, S, 4), -jnp.abs(integers(2, 2, 3, 2))
    query = Tokens(jnp.ones((2, 3), jnp.int32), filled[:, None] - 3 + jnp.arange(3))
    place_BS = jnp.broadcast_to(jnp.arange(S), (2, S))
    source = Tokens((place_BS < filled[:, None]).astype(jnp.int32), place_BS)
    run = jax.jit(
        functools.partial(select_mask, query=query, source=source, top_k=50), static_argnames="implementation"
    )
    expected = chosen(run(q, k, w, implementation="xla"), S)
    assert expected.sum(-1).tolist() == [[50] * 3, [28, 29, 30]]
    np.testing.assert_array_equal(chosen(run(q, k, w, implementation=KERNEL), S), expected)


@functools.cache
def program(implementation):
    def run(q, k, v, selected, do):
        call = functools.partial(attention, selected_BTN=selected, scale=0.3, implementation=implementation)
        o, pull = jax.vjp(lambda q, k, v: call(q, k, v, segment_ids_BT=jnp.asarray(IDS)), q, k, v)
        return o, *pull(do)

    return jax.jit(run)


@pytest.mark.parametrize(
    ("dtype", "values", "bound"),
    [(jnp.float32, 130, 3e-6), pytest.param(jnp.bfloat16, 5, 2e-2, marks=pytest.mark.slow)],
)
def test_attention_to_what_was_selected(monkeypatch, dtype, values, bound):
    """Values and gradients against dense attention in float64: blocks of 128, some without a selected key; NaN in padding."""
    monkeypatch.setattr(tpu_attend, "_BLOCK", 128)
    r = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(r.standard_normal(shape), dtype)  # noqa: E731
    q, k, v, do = normal(2, T, 4, 6), normal(2, T, 2, 6), normal(2, T, 2, values), normal(2, T, 4, values)
    tokens = tokens_of(jnp.asarray(IDS), IDS.shape)
    index = select(normal(2, T, 2, 8), normal(2, T, 8), normal(2, T, 2), tokens, tokens, top_k=9)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, do)]
        expected = program("dense")(*wide[:3], index, wide[3])
    poisoned = [jnp.where((IDS == 0)[..., None, None], jnp.nan, x) for x in (q, k, v)]
    got = program(KERNEL)(*poisoned, select_words(index, T), do)
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, expected, strict=True):
        b = np.asarray(b)
        error = np.asarray(a, np.float64) - b
        assert a.dtype == dtype
        assert np.sqrt((error**2).mean()) <= bound * np.sqrt((b**2).mean()), name
        np.testing.assert_allclose(error, 0, atol=20 * bound, err_msg=name)
    assert not np.asarray(got[0], np.float32)[IDS == 0].any()


def test_platform_is_chosen_when_lowered():
    tokens = tokens_of(None, (1, 1024))

    def run(q, k, w):
        words = select_mask(q, k, w, tokens, tokens, top_k=5)
        return attention(q, k[:, :, None], k[:, :, None], selected_BTN=words)

    shapes = jnp.zeros((1, 1024, 2, 8)), jnp.zeros((1, 1024, 8)), jnp.zeros((1, 1024, 2))
    text = str(jax.make_jaxpr(jax.grad(lambda q, k, w: run(q, k, w).sum()))(*shapes))
    for name in ("select", "forward", "backward_queries", "backward_keys"):
        assert f"sparse_attention_{name}" in text


def test_refusals():
    x, tokens = jnp.zeros((1, 4, 1, 8)), tokens_of(None, (1, 4))
    with pytest.raises(NotImplementedError, match="takes float32 and bfloat16, got float16"):
        select_mask(x.astype(jnp.float16), x[:, :, 0], x[..., 0], tokens, tokens, top_k=1, implementation=KERNEL)
    with pytest.raises(
        ValueError, match="implementation must be None, xla, pallas_tpu or pallas_tpu_interpret; got 'fast'"
    ):
        select_mask(x, x[:, :, 0], x[..., 0], tokens, tokens, top_k=1, implementation="fast")
    for options, why in (({}, "one bit a key"), ({"window": 2}, "no window")):
        selected = jnp.zeros((1, 4, 128), jnp.uint32) if options else None
        with pytest.raises(NotImplementedError, match=why):
            attention(x, x, x, selected_BTN=selected, implementation=KERNEL, **options)
