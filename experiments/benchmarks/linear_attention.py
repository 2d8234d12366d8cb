"""Linear attention against its alternatives: forward and forward + backward of every mechanism and form.

Times are interleaved pairs with a 2048³ float32 matrix product in the same process, best of three medians, so that
``ratio`` (forward + backward over the product) carries from one machine to another better than milliseconds do.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from research.ops.linear_attention import linear_attention

# name: (decay, delta rule)
MECHANISMS = {
    "linear": (None, False),
    "lightning": ("head", False),
    "mamba2": ("token", False),
    "gla": ("channel", False),
    "deltanet": (None, True),
    "gated_deltanet": ("token", True),
    "kda": ("channel", True),
}
# The longest sequence each form is asked for: its cost, or its memory, is another order than the chunked form's.
LONGEST = {"chunked": 1 << 30, "recurrent": 4096, "quadratic": 1024, "softmax": 4096, "associative_scan": 1024}


def run(quick: bool = False) -> dict:
    """Measure, and return rows that ``json.dumps`` takes.

    Each row: mechanism, form, T, forward_ms, forward_backward_ms, matmul_2048_ms and ratio = forward_backward_ms /
    matmul_2048_ms, at B1 H8 K=V=64 float32. Forms: 'chunked', 'recurrent' (the token scan) and 'quadratic' of ``linear_attention``;
    the alternatives are 'softmax' (``jax.nn.dot_product_attention``, causal) and 'associative_scan' (additive writes).
    ``quick`` measures two mechanisms at T = 512 and 1024 only.
    """
    B, H, K, V = 1, 8, 64, 64
    lengths = (512, 1024) if quick else (512, 1024, 2048, 4096, 8192, 16384)
    names = ("mamba2", "gated_deltanet") if quick else tuple(MECHANISMS)
    square = jnp.asarray(np.random.default_rng(0).standard_normal((2048, 2048)), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    matmul = functools.partial(multiply, square, square)
    rows = []
    for T in lengths:
        cases = [("softmax", "softmax", _softmax), ("mamba2", "associative_scan", _associative_scan)]
        for name in names:
            for form in ("chunked", "recurrent") if quick else ("chunked", "recurrent", "quadratic"):
                cases.append((name, form, functools.partial(_linear, form)))
        for name, form, function in cases:
            if LONGEST[form] < T:
                continue
            arguments = _arguments(B, T, H, K, V, *MECHANISMS.get(name, (None, False)))
            forward = functools.partial(jax.jit(function), arguments)
            both = functools.partial(jax.jit(_with_gradient(function)), arguments)
            forward_s, both_s, matmul_s = _times(forward, both, matmul, repeats=3 if quick else 5)
            rows.append(
                {
                    "mechanism": name,
                    "form": form,
                    "T": T,
                    "forward_ms": round(1e3 * forward_s, 3),
                    "forward_backward_ms": round(1e3 * both_s, 3),
                    "matmul_2048_ms": round(1e3 * matmul_s, 3),
                    "ratio": round(both_s / matmul_s, 4),
                }
            )
    return {
        "benchmark": "linear_attention",
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "shape": {"B": B, "H": H, "K": K, "V": V, "dtype": "float32"},
        "rows": rows,
    }


def _arguments(B, T, H, K, V, decay, delta):
    r = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(r.standard_normal(shape), jnp.float32)  # noqa: E731
    k = normal(B, T, H, K)
    shape = {None: None, "head": (H,), "token": (B, T, H), "channel": (B, T, H, K)}[decay]
    return {
        "q": normal(B, T, H, K),
        "k": k / jnp.linalg.norm(k, axis=-1, keepdims=True),
        "v": normal(B, T, H, V),
        "log_decay": None if shape is None else jax.nn.log_sigmoid(normal(*shape)) / 16,
        "beta": jax.nn.sigmoid(normal(B, T, H)) if delta else None,
    }


def _linear(form, x):
    options = {"log_decay": x["log_decay"], "beta": x["beta"], "scale": x["q"].shape[-1] ** -0.5}
    return linear_attention(x["q"], x["k"], x["v"], implementation=form, **options)[0]


def _softmax(x):
    return jax.nn.dot_product_attention(x["q"], x["k"], x["v"], is_causal=True)


def _associative_scan(x):
    """Every state of the sequence at once: the textbook parallel scan, with K·V times the memory of v."""
    decay_BTH11 = jnp.exp(x["log_decay"])[..., None, None]
    write_BTHKV = x["k"][..., :, None] * x["v"][..., None, :]
    combine = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])  # noqa: E731
    _, state_BTHKV = jax.lax.associative_scan(combine, (decay_BTH11, write_BTHKV), axis=1)
    return jnp.einsum("BTHK,BTHKV->BTHV", x["q"], state_BTHKV)


def _with_gradient(function):
    return jax.value_and_grad(lambda x: jnp.sum(jnp.square(function(x))))


def _times(*functions, repeats):
    """Seconds of each function: interleaved, best of three medians."""
    for function in functions:
        jax.block_until_ready(function())
    best = [float("inf")] * len(functions)
    for _ in range(3):
        seconds = [[] for _ in functions]
        for _ in range(repeats):
            for function, record in zip(functions, seconds, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(function())
                record.append(time.perf_counter() - start)
        best = [min(b, statistics.median(s)) for b, s in zip(best, seconds, strict=True)]
    return best
