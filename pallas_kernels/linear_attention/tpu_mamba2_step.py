"""One token of a whole Mamba-2 mixer on TPU: convolution, step size, recurrence, skip, gate and norm around one read of the state.

A grid step is one row of the batch. What has channels in lanes (convolution and step sizes before the row, gate and norm after
it) is done once for eight rows, one a sublane. The state comes as [V, K], keys in lanes: so XLA lays out what is 128 by 64, and
the keys and queries of a group are rows, shared by its heads. Two heads of 64 are the 128 lanes of a row of x: turned once, a
head is half a column. State and the convolution's tail are written where they were read.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.tpu_mixer_step import softplus, square
from pallas_kernels.linear_attention.tpu_tiles import Products, split_row

_LANES = 128
_WIDTH = 64
_ROWS = 8
_PAIRS = 16  # of heads, whose parts lie side by side in 128 lanes
_VMEM_BYTES = 56 * 1024 * 1024
_STATE_BYTES = 8 * 1024 * 1024  # of one row: read and written, each twice in VMEM


def refuses(x_BN, state_BHKV, taps: int, norm_groups: int) -> str | None:
    """Why the kernel cannot serve the call, or None."""
    _, H, K, V = state_BHKV.shape
    if x_BN.dtype not in (jnp.float32, jnp.bfloat16) or state_BHKV.dtype != jnp.float32:
        return f"it takes float32 and bfloat16 and a float32 state, got {x_BN.dtype} and {state_BHKV.dtype}"
    if (K, V) != (_LANES, _WIDTH) or H > 2 * _LANES:
        return f"it takes at most {2 * _LANES} heads of {_LANES} by {_WIDTH}, got {H} of {K} by {V}"
    groups = (x_BN.shape[1] - H * V) // (2 * K)
    if H // groups % 2:
        return f"a group must have an even number of heads, got {H // groups}"
    if H * K * V * 4 > _STATE_BYTES:
        return f"a row's state must fit {_STATE_BYTES} bytes, got {H * K * V * 4}"
    if H * V // norm_groups % _LANES:
        return f"a group of the norm must be a multiple of {_LANES} channels, got {H * V // norm_groups}"
    if taps < 2:
        return f"it takes at least 2 taps, got {taps}"
    return None


def step(
    x_BN,
    tail_BWN,
    state_BHKV,
    dt_BH,
    z_BM,
    w_WN,
    bias_N,
    rates_RH,
    scales_RM,
    *,
    limits,
    norm_groups,
    eps,
    interpret=False,
):
    """(o_BM in x's dtype, tail, state): ``rates`` are rows of (log-rate, bias of dt), ``scales`` of (skip, norm)."""
    B, H, K, V = state_BHKV.shape
    N, M, taps = x_BN.shape[1], H * V, w_WN.shape[0] - 1
    R = min(B, _ROWS)
    rows = lambda width: pl.BlockSpec((R, width), lambda b, r: (b, 0))  # noqa: E731
    whole = lambda *shape: pl.BlockSpec(shape, lambda b, r: (0,) * len(shape))  # noqa: E731
    tails = pl.BlockSpec((taps, R, N), lambda b, r: (0, b, 0))
    # Past the last row of a batch that is no multiple of eight, the last row's state stays where it is.
    state = pl.BlockSpec((1, H, V, K), lambda b, r: (jnp.minimum(b * R + r, B - 1), 0, 0, 0))
    # Inside jax.shard_map, outputs vary over the mesh axes that the inputs vary over.
    varying = jax.typeof(x_BN).manual_axis_type
    outputs = ((B, M), x_BN.dtype), ((taps, B, N), tail_BWN.dtype), ((B, H, V, K), jnp.float32)
    o_BM, tail_WBN, state_BHVK = pl.pallas_call(
        functools.partial(_kernel, B=B, interpret=interpret, limits=limits, norm_groups=norm_groups, eps=eps),
        grid=(-(-B // R), R),
        in_specs=[
            rows(N), tails, state, rows(H), rows(M), whole(taps + 1, N), whole(1, N), whole(2, H), whole(2, M),
        ],
        out_specs=[rows(M), tails, state],
        out_shape=[jax.ShapeDtypeStruct(*out, manual_axis_type=varying) for out in outputs],
        scratch_shapes=[
            pltpu.VMEM(shape, jnp.float32)
            for shape in ((R, M), (R, M // _LANES, _LANES), (R, (N - M) // K, K), (R, H, K), (R, M // _LANES, _LANES))
        ],
        input_output_aliases={1: 1, 2: 2},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name="mamba2_step",
    )(
        x_BN, tail_BWN.swapaxes(0, 1), state_BHKV.swapaxes(2, 3), dt_BH, z_BM, w_WN, bias_N[None], rates_RH, scales_RM
    )  # fmt: skip
    return o_BM, tail_WBN.swapaxes(0, 1), state_BHVK.swapaxes(2, 3)


def _kernel(
    x, tail, state, dt, z, w, bias, rates, scales, o, new_tail, new_state, xs, us, keys, decays, ys,
    *, B, interpret, limits, norm_groups, eps,
):  # fmt: skip
    R, r = x.shape[0], pl.program_id(1)
    pl.when(r == 0)(lambda: _before(x, tail, dt, w, bias, rates, new_tail, xs, us, keys, decays, limits))
    row = functools.partial(_row, state, new_state, us, keys, decays, ys, r, Products(jnp.bfloat16, interpret))
    pl.when(pl.program_id(0) * R + r < B)(row) if B % R else row()
    pl.when(r == R - 1)(lambda: _after(z, scales, o, xs, ys, norm_groups, eps))


def _before(x, tail, dt, w, bias, rates, new_tail, xs, us, keys, decays, limits):
    """Of all rows: ``xs`` the convolved x, ``us`` x·dt, ``keys`` those of all groups and then the queries, ``decays`` along lanes."""
    (R, N), M, H, taps = x.shape, xs.shape[1], dt.shape[1], tail.shape[0]
    dt_RH = softplus(dt[...].astype(jnp.float32) + rates[1:])
    dt_RH = dt_RH if limits is None else jnp.clip(dt_RH, *limits)
    decay_RH = jnp.exp(-jnp.exp(rates[:1]) * dt_RH)
    along = lambda gate_RH, h: jnp.broadcast_to(gate_RH[:, h : h + 1], (R, _LANES))  # noqa: E731
    for h in range(H):
        decays[:, h] = along(decay_RH, h)
    first = jax.lax.broadcasted_iota(jnp.int32, (R, _LANES), 1) < _WIDTH
    for n in range(N // _LANES):
        lanes = slice(n * _LANES, (n + 1) * _LANES)
        inputs = [*(tail[t, :, lanes] for t in range(taps)), x[:, lanes]]
        mixed = bias[:, lanes].astype(jnp.float32)
        for t, past in enumerate(inputs):
            mixed = mixed + past.astype(jnp.float32) * w[t : t + 1, lanes].astype(jnp.float32)
        mixed = mixed * jax.nn.sigmoid(mixed)
        for t in range(taps):
            new_tail[t, :, lanes] = inputs[t + 1].astype(new_tail.dtype)
        if n < M // _LANES:
            xs[:, lanes] = mixed
            us[:, n] = mixed * jnp.where(first, along(dt_RH, 2 * n), along(dt_RH, 2 * n + 1))
        else:
            keys[:, n - M // _LANES] = mixed


def _row(state, new_state, us, keys, decays, ys, r, products):
    P, G = us.shape[1], keys.shape[1] // 2
    lane = jax.lax.broadcasted_iota(jnp.int32, (_WIDTH, _LANES), 1)
    read = [jnp.zeros((_WIDTH, _LANES), jnp.float32)] * 2
    ends = sorted({*(g * P // G + n for g in range(G) for n in range(0, P // G, _PAIRS)), P})
    for first, end in itertools.pairwise(ends):
        g = first * G // P
        written = _outer(us[r, first:end], keys[r, g : g + 1], products)
        for p in range(first, end):
            both = written(p - first)
            for half in range(2):
                h = 2 * p + half
                S = state[0, h] * decays[r, h : h + 1] + both[half * _WIDTH : (half + 1) * _WIDTH]
                new_state[0, h] = S
                y = jnp.sum(S * keys[r, G + g : G + g + 1], axis=1, keepdims=True)
                read[half] = jnp.where(lane == p, y, read[half])
    ys[r] = jnp.concatenate(read, axis=0).T[:P]


def _outer(u, k, products):
    """For rows u [n, 128] and k [1, 128]: ``i -> u_iᵀ k``, [128, 128], as exact as float32.

    One bfloat16 product: of u and k cut into three, the six pairs of parts that matter lie side by side along the contraction,
    and the lanes of other rows are masked. The permute units, which else spread columns over lanes, are busy with the sums read.
    """
    n = len(u)
    us, ks = split_row(u), split_row(k)
    matter = [(i, j) for i in range(3) for j in range(3 - i)]
    columns = square(jnp.concatenate([us[i] for i, _ in matter], axis=0)).T.astype(jnp.bfloat16)
    rows = square(jnp.concatenate([jnp.broadcast_to(ks[j], u.shape) for _, j in matter], axis=0)).astype(jnp.bfloat16)
    own = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1) % n
    return lambda i: products.dot(jnp.where(own == i, columns, 0), rows)


def _after(z, scales, o, xs, ys, norm_groups, eps):
    M = xs.shape[1]
    width = M // norm_groups
    for first in range(0, M, width):
        total = jnp.zeros((xs.shape[0], _LANES), jnp.float32)
        parts = [slice(n, n + _LANES) for n in range(first, first + width, _LANES)]
        for lanes in parts:
            gate = z[:, lanes].astype(jnp.float32)
            y = ys[:, lanes.start // _LANES] + scales[:1, lanes] * xs[:, lanes]
            y = y * (gate * jax.nn.sigmoid(gate))
            xs[:, lanes] = y
            total = total + y * y
        unit = jax.lax.rsqrt(jnp.sum(total, axis=1, keepdims=True) / width + eps)
        for lanes in parts:
            o[:, lanes] = (xs[:, lanes] * unit * scales[1:, lanes]).astype(o.dtype)
