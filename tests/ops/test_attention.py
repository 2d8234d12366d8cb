"""Softmax attention, norms and rotary embedding against definitions in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.attention import attention
from research.ops.losses import cross_entropy
from research.ops.norms import l2_norm, rms_norm
from research.ops.rope import rope

random = np.random.default_rng(0)


def brute_force(q, k, v, allowed):
    """allowed(b, t, s): whether query t may see key s."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    heads_per_key = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = [s for s in range(k.shape[1]) if allowed(b, t, s)]
        if seen:
            score = k[b, seen, h // heads_per_key] @ q[b, t, h] * q.shape[-1] ** -0.5
            weight = np.exp(score - score.max())
            out[b, t, h] = (weight / weight.sum()) @ v[b, seen, h // heads_per_key]
    return out


def arrays(B=2, T=7, S=7, H=4, G=2, K=5, V=3):
    return random.normal(size=(B, T, H, K)), random.normal(size=(B, S, G, K)), random.normal(size=(B, S, G, V))


def close(ours, oracle):
    np.testing.assert_allclose(ours, oracle, atol=2e-6, rtol=2e-5)


def test_attention_is_causal_and_grouped():
    q, k, v = arrays()
    ours = attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    close(ours, brute_force(q, k, v, lambda b, t, s: s <= t))


def test_attention_stays_in_its_document_and_padding_reaches_nothing():
    q, k, v = arrays()
    ids = np.asarray([[0, 1, 1, 0, 1, 2, 2], [4, 4, 0, 0, 9, 9, 0]], np.int32)
    oracle = brute_force(q, k, v, lambda b, t, s: s <= t and ids[b, t] == ids[b, s] > 0)
    poisoned = [jnp.asarray(np.where((ids == 0)[..., None, None], np.nan, x), jnp.float32) for x in (q, k, v)]
    close(attention(*poisoned, segment_ids_BT=jnp.asarray(ids)), oracle)
    gradient = jax.grad(lambda x: attention(*x, segment_ids_BT=jnp.asarray(ids)).sum())(poisoned)
    for x in gradient:
        assert np.isfinite(x).all()
        assert (np.asarray(x)[ids == 0] == 0).all()


def test_attention_over_a_cache_reads_filled_slots_only():
    q, k, v = arrays(T=2, S=6)
    slots = np.asarray([[3, 4], [0, 1]])
    filled = np.asarray([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], np.int32)
    ours = attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
        segment_ids_BT=jnp.ones((2, 2), jnp.int32),
        source_segment_ids_BS=jnp.asarray(filled),
        slots_BT=jnp.asarray(slots),
    )
    close(ours, brute_force(q, k, v, lambda b, t, s: s <= slots[b, t]))


def test_attention_names_what_does_not_fit():
    q, k, v = (jnp.zeros(shape) for shape in ((1, 3, 3, 2), (1, 3, 2, 2), (1, 3, 2, 2)))
    with pytest.raises(ValueError, match="query heads must be a multiple of key heads, got 3 over 2"):
        attention(q, k, v)
    with pytest.raises(ValueError, match=r"keys \(3\) and queries \(1\) differ"):
        attention(q[:, :1, :2], k, v, segment_ids_BT=jnp.ones((1, 1), jnp.int32))


def test_norms():
    x, scale = random.normal(size=(2, 3, 8)), random.normal(size=8)
    close(
        rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32)),
        x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale,
    )
    close(l2_norm(jnp.asarray(x, jnp.float32)), x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6))
    assert rms_norm(jnp.ones(4, jnp.bfloat16)).dtype == jnp.bfloat16


def test_rope_rotates_pairs_and_leaves_the_rest():
    x, positions = random.normal(size=(1, 5, 2, 8)), np.asarray([[0, 1, 2, 0, 1]])
    ours = np.asarray(rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions), rotary_dim=4, theta=100.0))
    for t, h, i in np.ndindex(5, 2, 2):
        angle = positions[0, t] * 100.0 ** (-2 * i / 4)
        pair = complex(x[0, t, h, i], x[0, t, h, i + 2]) * np.exp(1j * angle)
        close(ours[0, t, h, [i, i + 2]], [pair.real, pair.imag])
    np.testing.assert_array_equal(ours[..., 4:], x[..., 4:].astype(np.float32))
    with pytest.raises(ValueError, match="rotary_dim must be even and from 0 to the head width 8, got 3"):
        rope(jnp.zeros((1, 1, 1, 8)), jnp.zeros((1, 1), jnp.int32), rotary_dim=3)


def test_cross_entropy_sums_over_the_mask():
    logits, targets = random.normal(size=(2, 3, 5)), random.integers(0, 5, (2, 3))
    mask = np.asarray([[1, 0, 1], [0, 1, 1]], bool)
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    oracle = ((np.log(np.exp(logits).sum(-1)) - picked) * mask).sum()
    nats, count = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(targets), jnp.asarray(mask))
    close(nats, oracle)
    assert count == 4
