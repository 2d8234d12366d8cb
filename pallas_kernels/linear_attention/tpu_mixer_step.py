"""One token of a whole Gated DeltaNet mixer on TPU: convolution, gates, delta rule and gated norm around one read of the state.

A grid step is one row of the batch. Its channels lie in lanes as they come from the projection; a head is 128 of them, and what
one is asked of a head (its channels down the sublanes, beside the state's keys) comes out of transpositions of 128 heads at a time.
State and the convolution's tail are written where they were read.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_VMEM_BYTES = 56 * 1024 * 1024
_STATE_BYTES = 8 * 1024 * 1024  # of one row: read and written, each twice in VMEM


def refuses(x_BN, state_BHKV, taps: int) -> str | None:
    """Why the kernel cannot serve the call, or None."""
    _, H, K, V = state_BHKV.shape
    if x_BN.dtype not in (jnp.float32, jnp.bfloat16) or state_BHKV.dtype != jnp.float32:
        return f"it takes float32 and bfloat16 and a float32 state, got {x_BN.dtype} and {state_BHKV.dtype}"
    if (K, V) != (_LANES, _LANES) or H > _LANES:
        return f"it takes at most {_LANES} heads of {_LANES} by {_LANES}, got {H} of {K} by {V}"
    if H * K * V * 4 > _STATE_BYTES:
        return f"a row's state must fit {_STATE_BYTES} bytes, got {H * K * V * 4}"
    if taps < 2:
        return f"it takes at least 2 taps, got {taps}"
    return None


def step(x_BN, tail_BWN, state_BHKV, w_WN, gates_BRH, rates_RH, z_BN, norm_V, *, eps, scale, strength, interpret=False):
    """(o_BN in x's dtype, tail, state): ``gates`` are rows of (β, decay) before their functions, ``rates`` of (log-rate, bias)."""
    B, H, K, V = state_BHKV.shape
    N, W = x_BN.shape[1], w_WN.shape[0]
    row = lambda *shape: pl.BlockSpec((1, *shape), lambda b: (b, *(0,) * len(shape)))  # noqa: E731
    whole = lambda *shape: pl.BlockSpec(shape, lambda b: (0,) * len(shape))  # noqa: E731
    # Inside jax.shard_map, outputs vary over the mesh axes that the inputs vary over.
    varying = jax.typeof(x_BN).manual_axis_type
    outputs = ((B, 1, H * V), x_BN.dtype), (tail_BWN.shape, tail_BWN.dtype), (state_BHKV.shape, jnp.float32)
    o_B1N, tail_BWN, state_BHKV = pl.pallas_call(
        functools.partial(_kernel, eps=eps, scale=scale, strength=strength),
        grid=(B,),
        in_specs=[
            row(1, N),
            row(W - 1, N),
            row(H, K, V),
            whole(W, N),
            row(2, H),
            whole(2, H),
            row(1, H * V),
            whole(1, V),
        ],
        out_specs=[row(1, H * V), row(W - 1, N), row(H, K, V)],
        out_shape=[jax.ShapeDtypeStruct(*out, manual_axis_type=varying) for out in outputs],
        input_output_aliases={1: 1, 2: 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM_BYTES),
        interpret=interpret,
        name="gated_deltanet_step",
    )(x_BN[:, None], tail_BWN, state_BHKV, w_WN, gates_BRH, rates_RH, z_BN[:, None], norm_V[None])
    return o_B1N[:, 0], tail_BWN, state_BHKV


def _kernel(x, tail, state, w, gates, rates, z, norm, o, new_tail, new_state, *, eps, scale, strength):
    H, N = state.shape[1], x.shape[2]
    G = (N // _LANES - H) // 2
    now, before, taps = x[0].astype(jnp.float32), tail[0].astype(jnp.float32), w[...].astype(jnp.float32)
    mixed = now * taps[-1:] + jnp.sum(before * taps[:-1], axis=0, keepdims=True)
    mixed = mixed * jax.nn.sigmoid(mixed)
    new_tail[0] = jnp.concatenate([before[1:], now], axis=0).astype(new_tail.dtype)
    qk = _unit(_heads(mixed, 0, 2 * G))
    v = _heads(mixed, 2 * G, H)
    # β and the decay of all heads as rows, then down the sublanes, the same in every lane.
    beta = strength * jax.nn.sigmoid(gates[0, :1])
    decay = jnp.exp(-jnp.exp(rates[:1]) * softplus(gates[0, 1:] + rates[1:]))
    beta, decay = (_down(row) for row in (beta, decay))
    columns = square(qk).T
    outputs = []
    for h in range(H):
        g = h // (H // G)
        q, k = columns[:, g : g + 1], columns[:, G + g : G + g + 1]
        S = state[0, h] * decay[h : h + 1]
        u = beta[h : h + 1] * (v[h : h + 1] - jnp.sum(S * k, axis=0, keepdims=True))
        S = S + k * u
        new_state[0, h] = S
        outputs.append(jnp.sum(S * q, axis=0, keepdims=True))
    read = jnp.concatenate(outputs, axis=0) * scale
    read = read * jax.lax.rsqrt(jnp.mean(read * read, axis=1, keepdims=True) + eps) * norm[...]
    gate = z[0].astype(jnp.float32)
    gate = gate * jax.nn.sigmoid(gate)
    for h in range(H):
        lanes = slice(h * _LANES, (h + 1) * _LANES)
        o[0, :, lanes] = (read[h : h + 1] * gate[:, lanes]).astype(o.dtype)


def _heads(row, first, count):
    """[1, N] → [count, 128]."""
    return jnp.concatenate([row[:, n * _LANES : (n + 1) * _LANES] for n in range(first, first + count)], axis=0)


def _unit(x):
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) + 1e-6)


def square(x):
    return jnp.concatenate([x, jnp.zeros((_LANES - x.shape[0], _LANES), jnp.float32)], axis=0) if len(x) < _LANES else x


def _down(row):
    """[1, H] → [H, 128]."""
    H = row.shape[1]
    row = jnp.concatenate([row, jnp.zeros((1, _LANES - H), jnp.float32)], axis=1) if _LANES > H else row
    return jnp.broadcast_to(row, (_LANES, _LANES)).T[:H]


def softplus(x):
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
