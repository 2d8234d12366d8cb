"""Softmax attention, norms and rotary embedding against definitions in float64 NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.attention import attention, dispatch, kernels, tokens_of
from research.ops.losses import cross_entropy
from research.ops.norms import l2_norm, rms_norm
from research.ops.rope import LinearScaling, Llama3Scaling, YarnScaling, frequencies, rope

random = np.random.default_rng(0)


def brute_force(q, k, v, allowed, *, scale=None, softcap=None, sinks=None):
    """allowed(b, t, s): whether query t may see key s."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    heads_per_key = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = [s for s in range(k.shape[1]) if allowed(b, t, s)]
        if seen:
            score = k[b, seen, h // heads_per_key] @ q[b, t, h] * (q.shape[-1] ** -0.5 if scale is None else scale)
            score = score if softcap is None else softcap * np.tanh(score / softcap)
            weight = np.exp(score)
            total = weight.sum() + (0 if sinks is None else np.exp(sinks[h]))
            out[b, t, h] = (weight / total) @ v[b, seen, h // heads_per_key]
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
    gradient = jax.jit(jax.grad(lambda x: attention(*x, segment_ids_BT=jnp.asarray(ids)).sum()))(poisoned)
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
        places_BT=jnp.asarray(slots, jnp.int32),
    )
    close(ours, brute_force(q, k, v, lambda b, t, s: s <= slots[b, t]))


def test_attention_names_what_does_not_fit():
    q, k, v = (jnp.zeros(shape) for shape in ((1, 3, 3, 2), (1, 3, 2, 2), (1, 3, 2, 2)))
    with pytest.raises(ValueError, match="query heads must be a multiple of key heads, got 3 over 2"):
        attention(q, k, v)
    with pytest.raises(ValueError, match=r"keys \(3\) and queries \(1\) differ"):
        attention(q[:, :1, :2], k, v, segment_ids_BT=jnp.ones((1, 1), jnp.int32))
    for name, options in (("window", {"window": 0}), ("chunk", {"chunk": -1}), ("softcap", {"softcap": 0.0})):
        with pytest.raises(ValueError, match=f"{name} must be None or"):
            attention(q[:, :, :2], k, v, **options)
    with pytest.raises(ValueError, match="implementation must be None or one of dense"):
        attention(q[:, :, :2], k, v, implementation="flash")
    with pytest.raises(NotImplementedError, match=r"'splash' cannot serve this call: .* multiple of 128, got 3"):
        attention(q[:, :, :2], k, v, implementation="splash")
    with pytest.raises(
        NotImplementedError, match=r"'cudnn' cannot serve this call: .* float16 or bfloat16, got float32"
    ):
        attention(q[:, :, :2], k, v, implementation="cudnn")


IDS = np.asarray([[4] * 9 + [7] * 12 + [0, 0], [0, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 3] + [3] * 8], np.int32)
VARIANTS = {
    "full": {},
    "window": {"window": 3},
    "chunk": {"chunk": 4},
    "sinks, window and cap": {"sinks": True, "window": 5, "softcap": 1.5, "scale": 0.7},
    "window longer than the row": {"window": 100, "chunk": 50},
}


def places(ids):
    """How many real tokens of its document come before each token."""
    return np.asarray([[(row[:t] == row[t]).sum() for t in range(len(row))] for row in ids])


@pytest.mark.parametrize(("name", "packed"), [*((name, True) for name in VARIANTS), ("window", False)])
def test_windows_chunks_sinks_and_caps(name, packed):
    """Values of both forms in float64 against brute force, gradients of the one against the other's."""
    options = dict(VARIANTS[name])
    q, k, v = arrays(T=23, S=23)
    sinks = random.normal(size=4) if options.pop("sinks", False) else None
    ids = IDS if packed else np.ones((2, 23), np.int32)
    place = places(ids)

    def allowed(b, t, s):
        reach = place[b, t] - place[b, s]
        same_chunk = place[b, t] // options.get("chunk", 99) == place[b, s] // options.get("chunk", 99)
        return ids[b, t] == ids[b, s] > 0 and 0 <= reach < options.get("window", 99) and same_chunk

    numbers = {name: options[name] for name in ("softcap", "scale") if name in options}
    oracle = brute_force(q, k, v, allowed, sinks=sinks, **numbers)
    weights = random.normal(size=oracle.shape)

    @jax.jit
    def both(x):
        def call(x, form):
            *x, sinks_H = x
            ids_BT = jnp.asarray(ids) if packed else None
            return attention(*x, sinks_H=sinks_H, segment_ids_BT=ids_BT, implementation=form, block_size=8, **options)

        pulled = [jax.vjp(lambda x, form=form: call(x, form), x) for form in ("dense", "blocked")]
        return [(o_BTHV, pull(jnp.asarray(weights))) for o_BTHV, pull in pulled]

    with jax.enable_x64(True):
        dense, blocked = both([None if a is None else jnp.asarray(a) for a in (q, k, v, sinks)])
    np.testing.assert_allclose(dense[0], oracle, atol=1e-12)
    chex.assert_trees_all_close(blocked, dense, atol=1e-12)


@pytest.mark.parametrize("packed", [True, False])
def test_attention_to_a_selection(packed):
    """Both forms in float64 against brute force, gradients of the one against the other's."""
    q, k, v = arrays(T=23, S=23)
    ids = IDS if packed else np.ones((2, 23), np.int32)
    drawn = [[random.permutation(23)[:4] for _ in range(23)] for _ in range(2)]
    # Its own, some others, those it may not see among them, and none.
    selected = np.concatenate([np.broadcast_to(np.arange(23)[None, :, None], (2, 23, 1)), drawn], axis=2)
    selected[:, :, 1:] = np.where(selected[:, :, 1:] == selected[:, :, :1], 23, selected[:, :, 1:])

    def allowed(b, t, s):
        return s <= t and ids[b, t] == ids[b, s] > 0 and s in selected[b, t]

    oracle = brute_force(q, k, v, allowed)
    weights = random.normal(size=oracle.shape)

    @jax.jit
    def both(x):
        def call(x, form):
            ids_BT = jnp.asarray(ids) if packed else None
            options = {"segment_ids_BT": ids_BT, "selected_BTN": jnp.asarray(selected, jnp.int32)}
            return attention(*x, **options, implementation=form, block_size=8)

        pulled = [jax.vjp(lambda x, form=form: call(x, form), x) for form in ("dense", "blocked")]
        return [(o_BTHV, pull(jnp.asarray(weights))) for o_BTHV, pull in pulled]

    with jax.enable_x64(True):
        dense, blocked = both([jnp.asarray(a) for a in (q, k, v)])
    np.testing.assert_allclose(dense[0], oracle, atol=1e-12)
    chex.assert_trees_all_close(blocked, dense, atol=1e-12)


def test_temperature_multiplies_scores():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays())
    temperature_BT = jnp.asarray(random.uniform(0.5, 2, (2, 7)), jnp.float32)
    ours = attention(q, k, v, temperature_BT=temperature_BT)
    close(ours, attention(q * temperature_BT[..., None, None], k, v))


def test_blocks_keep_padding_out_of_values_and_gradients():
    q, k, v = arrays(T=23, S=23)
    poisoned = [jnp.asarray(np.where((IDS == 0)[..., None, None], np.nan, x), jnp.float32) for x in (q, k, v)]

    def total(x):
        return attention(*x, segment_ids_BT=jnp.asarray(IDS), implementation="blocked", block_size=8).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(poisoned)
    assert np.isfinite(value)
    for x in gradient:
        assert np.isfinite(x).all()
        assert (np.asarray(x)[IDS == 0] == 0).all()


def long_gradient(T):
    shape = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)

    def loss(x):
        return jnp.sum(attention(*x, implementation="blocked") ** 2)

    return jax.jit(jax.value_and_grad(loss)), (shape, shape, shape)


def test_a_long_row_needs_no_square_array():
    function, shapes = long_gradient(1 << 15)
    memory = function.lower(shapes).compile().memory_analysis()
    inputs = 3 * 4 * (1 << 15) * 16
    assert memory.temp_size_in_bytes < 12 * inputs  # one 32K × 32K float32 array is 680 times the inputs


@pytest.mark.slow
def test_a_long_row_runs_forwards_and_backwards():
    function, shapes = long_gradient(1 << 15)
    x = [jnp.asarray(random.normal(size=s.shape), jnp.float32) for s in shapes]
    value, gradient = function(x)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradient)
    # The first tokens see only each other: they are those of a short row.
    np.testing.assert_allclose(
        attention(*x)[:, :64], attention(*(a[:, :64] for a in x), implementation="dense"), atol=2e-6, rtol=2e-5
    )


def test_the_kernel_is_chosen_when_the_call_is_lowered():
    x = [jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)] * 3
    ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    gradient = jax.jit(jax.grad(lambda x, ids: attention(*x, segment_ids_BT=ids).astype(jnp.float32).sum()))
    traced = gradient.trace(x, ids)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "window", "sinks, window and cap", "chunk"])
def test_the_tpu_kernel_computes_the_same(name):
    options = dict(VARIANTS[name])
    sinks = jnp.asarray(random.normal(size=2), jnp.float32) if options.pop("sinks", False) else None
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays(B=1, T=128, S=128, H=2, G=1, K=8, V=8))
    # The kernel counts chunks from the start of the row: Llama 4's are served without documents.
    ids = None if name == "chunk" else jnp.asarray([[1] * 50 + [2] * 70 + [0] * 8], jnp.int32)

    def call(form, x):
        return attention(*x, sinks_H=sinks, segment_ids_BT=ids, implementation=form, **options)

    for form in ("blocked", "splash_interpret"):
        np.testing.assert_allclose(call(form, (q, k, v)), call("dense", (q, k, v)), atol=2e-5)
    gradients = [jax.grad(lambda x, f=f: jnp.sin(call(f, x)).sum())((q, k, v)) for f in ("splash_interpret", "dense")]
    for ours, definition in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, definition, atol=1e-4)


def plan_of(**options):
    fields = dict.fromkeys(("implementation", "window", "chunk", "softcap"))
    return dispatch.Plan(**{**fields, "block": 8, "aligned": True, "packed": True, **options})


def test_windows_that_the_tpu_kernel_would_miscount_are_found():
    """It counts slots, not tokens: padding within a document shortens the window; between documents it does no harm."""
    counts = {
        "between documents": ([0, 1, 1, 0, 0, 2, 2, 0], False),
        "none": ([1, 1, 1, 2, 2, 2, 3, 3], False),
        "within the first": ([1, 0, 1, 1, 2, 2, 2, 2], True),
        "within the last": ([1, 1, 2, 2, 0, 0, 2, 0], True),
    }
    for name, (ids, miscounts) in counts.items():
        query = tokens_of(jnp.asarray([[1] * 8, ids], jnp.int32), (2, 8))
        assert kernels.splash_miscounts(plan_of(window=2), query) == miscounts, name
    assert kernels.splash_miscounts(plan_of(), query) is None
    assert kernels.splash_miscounts(plan_of(window=2, packed=False), query) is None
    x = [jnp.zeros((1, 128, 1, 8))] * 3
    for options, why in (
        ({"chunk": 4}, "counts chunks from the start of the row"),
        ({"selected_BTN": jnp.zeros((1, 128, 1), jnp.int32)}, "known beforehand"),
    ):
        with pytest.raises(NotImplementedError, match=why):
            attention(*x, segment_ids_BT=jnp.ones((1, 128), jnp.int32), implementation="splash", **options)


@pytest.mark.slow
def test_what_the_tpu_kernel_would_miscount_runs_in_blocks(monkeypatch):
    """As on a TPU, interpreted: the documents decide at run time; the kernel itself, asked for by name, is wrong."""
    monkeypatch.setattr(dispatch, "_DENSE", 0)
    monkeypatch.setitem(dispatch._KERNELS, "splash", dispatch._KERNELS["splash_interpret"])
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, default, tpu, **_: tpu(*arrays))
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays(B=1, T=128, S=128, H=1, G=1, K=8, V=8))
    run = jax.jit(functools.partial(attention, window=3), static_argnames="implementation")
    for ids, wrong in (([1] * 50 + [0] * 8 + [2] * 70, False), ([1] * 50 + [0] * 2 + [1] * 76, True)):
        ids_BT = jnp.asarray([ids], jnp.int32)
        expected = run(q, k, v, segment_ids_BT=ids_BT, implementation="dense")
        np.testing.assert_allclose(run(q, k, v, segment_ids_BT=ids_BT), expected, atol=2e-5)
        named = run(q, k, v, segment_ids_BT=ids_BT, implementation="splash_interpret")
        assert (jnp.abs(named - expected).max() > 1e-2) == wrong


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


def test_rope_in_pairs_is_complex_multiplication():
    x, positions = random.normal(size=(1, 5, 2, 8)), np.asarray([[0, 1, 2, 0, 7]])
    ours = np.asarray(rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions), rotary_dim=6, layout="pairs"))
    pairs = x[..., 0:6:2] + 1j * x[..., 1:6:2]
    turned = pairs * np.exp(1j * positions[..., None, None] * 1e4 ** (-np.arange(3) / 3))
    close(ours[..., 0:6:2], turned.real)
    close(ours[..., 1:6:2], turned.imag)
    np.testing.assert_array_equal(ours[..., 6:], x[..., 6:].astype(np.float32))


def test_scaled_frequencies():
    plain = frequencies(64, 1e4)
    np.testing.assert_allclose(frequencies(64, 1e4, LinearScaling(4.0)), plain / 4)
    llama = frequencies(64, 1e4, Llama3Scaling(8.0, 1.0, 4.0, 8192))
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(llama[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_allclose(llama[wavelength > 8192], plain[wavelength > 8192] / 8)
    yarn = YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)  # DeepSeek V3
    scaled = frequencies(64, 1e4, yarn)
    turns = 4096 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(scaled[turns < 0.8], plain[turns < 0.8] / 40)
    assert (np.diff(scaled) < 0).all()
    # Channels that turn 32 times and once: ⌊10.46⌋ and ⌈22.51⌉.
    np.testing.assert_allclose(scaled[16], plain[16] * (1 - 6 / 13 + 6 / 13 / 40))
    assert yarn.magnitude == 1 and yarn.score_scale == pytest.approx((0.1 * np.log(40) + 1) ** 2)
    oss = YarnScaling(32.0, 4096, truncate=False)
    assert oss.magnitude == pytest.approx(0.1 * np.log(32) + 1) and oss.score_scale == 1
    x = jnp.ones((1, 1, 1, 8))
    close(rope(x, jnp.zeros((1, 1), jnp.int32), scaling=oss), np.full((1, 1, 1, 8), oss.magnitude))


def test_cross_entropy_sums_over_the_mask():
    logits, targets = random.normal(size=(2, 3, 5)), random.integers(0, 5, (2, 3))
    mask = np.asarray([[1, 0, 1], [0, 1, 1]], bool)
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    oracle = ((np.log(np.exp(logits).sum(-1)) - picked) * mask).sum()
    nats, count = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(targets), jnp.asarray(mask))
    close(nats, oracle)
    assert count == 4
