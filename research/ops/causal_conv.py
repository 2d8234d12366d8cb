"""Depthwise short causal convolution, with documents packed in a row and its tail carried as state.

    y_t = activation(bias + Σ_w weight[w] · x_{t−(W−1)+w})

where only real tokens count: the taps reach back over the real tokens of the token's own segment (and, in the row's first
segment, over the tail), and padding is skipped as if it were not there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from research.axes import Array, Float, Int
from research.ops.explicit_mesh import run_on_shards, spec_of
from research.ops.linear_attention.segments import real_and_reset
from research.ops.linear_attention.varying import vary_alike

_ACTIVATIONS = {None: lambda x: x, "silu": jax.nn.silu}


def causal_conv(
    x_BTD: Float[Array, "B T D"],
    w_WD: Float[Array, "W D"],
    bias_D: Float[Array, " D"] | None = None,
    *,
    tail: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    activation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Convolve each channel with W taps over the token and the W − 1 real tokens before it.

    Args:
      x_BTD: inputs. w_WD: taps, oldest first (``w_WD[-1]`` weighs the token itself). bias_D: optional.
      tail: the last W − 1 real inputs before this call, oldest first, [B, W − 1, D]; zeros when None. It belongs to the
        row's first segment.
      segment_ids: [B, T], as for ``linear_attention``: a token whose id differs from the last non-zero id before it sees
        zeros before its segment; id 0 is padding, which outputs 0, is not read and does not shift the tail.
      activation: None or 'silu', applied to the sum.

    Returns:
      y_BTD in x's dtype (the sum is accumulated in promote_types(x, float32)), and the new tail in x's dtype: the last
      W − 1 real tokens of the row's last segment.

    Raises:
      ValueError: shapes that do not fit together, an unknown activation, a sharded time axis.
    """
    check_arguments(x_BTD, w_WD, bias_D, tail, segment_ids, activation)
    run = functools.partial(_local, activation)
    arrays = (x_BTD, w_WD, bias_D, tail, segment_ids)
    split = spec_of(x_BTD)
    if split is None:
        return run(*arrays)
    b, t, d = split
    if t is not None:
        raise ValueError(f"the time axis of x must not be sharded, got {split}")
    rows = P(b, None, d)
    return run_on_shards(run, x_BTD, arrays, (rows, P(None, d), P(d), rows, P(b)), (rows, rows))


def _local(activation, x_BTD, w_WD, bias_D, tail, segment_ids):
    B, _, D = x_BTD.shape
    tail = jnp.zeros((B, w_WD.shape[0] - 1, D), x_BTD.dtype) if tail is None else tail.astype(x_BTD.dtype)
    return _causal_conv(activation, *vary_alike((x_BTD, w_WD, bias_D, tail, segment_ids)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal_conv(activation, *arguments):
    return _choose(activation, arguments[-1], lambda form: form(*arguments))


def _forward(activation, *arguments):
    return _causal_conv(activation, *arguments), arguments


def _backward(activation, arguments, cotangents):
    *floats, segment_ids = arguments

    def pull(form):
        return jax.vjp(lambda *floats: form(*floats, segment_ids), *floats)[1](cotangents)

    ids_gradient = None if segment_ids is None else np.zeros(segment_ids.shape, jax.dtypes.float0)
    return *_choose(activation, segment_ids, pull), ids_gradient


_causal_conv.defvjp(_forward, _backward)


def _choose(activation, segment_ids_BT, run):
    """``run`` the gathering form only where padding precedes a real token: shifts are several times faster, forwards
    and backwards, and serve packed and right-padded rows. Only inputs are kept for the backward pass."""
    shifting = functools.partial(_shifting, activation)
    if segment_ids_BT is None:
        return run(shifting)
    real_BT = segment_ids_BT > 0
    scattered = jnp.any(real_BT[:, 1:] & ~real_BT[:, :-1])
    return jax.lax.cond(scattered, lambda: run(functools.partial(_gathering, activation)), lambda: run(shifting))


def _shifting(activation, x_BTD, w_WD, bias_D, tail, segment_ids_BT):
    """For rows whose padding, if any, comes last."""
    T, W = x_BTD.shape[1], w_WD.shape[0]
    if segment_ids_BT is None:
        row_BSD = jnp.concatenate([tail, x_BTD], axis=1)
        y_BTD = sum(_tap(row_BSD[:, w : w + T], w_WD[w]) for w in range(W))
        return _finish(y_BTD, bias_D, activation, x_BTD.dtype), row_BSD[:, T:]
    real_BT = segment_ids_BT > 0
    row_BSD = jnp.concatenate([tail, jnp.where(real_BT[..., None], x_BTD, 0)], axis=1)
    # The tail is the first segment's.
    ids_BS = jnp.concatenate([jnp.repeat(segment_ids_BT[:, :1], W - 1, axis=1), segment_ids_BT], axis=1)
    y_BTD = 0
    for w in range(W):
        seen_BT = real_BT & (ids_BS[:, w : w + T] == segment_ids_BT)
        y_BTD = y_BTD + jnp.where(seen_BT[..., None], _tap(row_BSD[:, w : w + T], w_WD[w]), 0)
    y_BTD = jnp.where(real_BT[..., None], _finish(y_BTD, bias_D, activation, x_BTD.dtype), 0)
    count_B1 = jnp.sum(real_BT, axis=1, dtype=jnp.int32, keepdims=True)
    index_BW = count_B1 + jnp.arange(W - 1, dtype=jnp.int32)
    last_B1 = jnp.take_along_axis(segment_ids_BT, jnp.maximum(count_B1 - 1, 0), axis=1)
    of_last_BW = (jnp.take_along_axis(ids_BS, index_BW, axis=1) == last_B1) | (count_B1 == 0)
    new_tail = jnp.take_along_axis(row_BSD, index_BW[..., None], axis=1)
    return y_BTD, jnp.where(of_last_BW[..., None], new_tail, 0)


def _gathering(activation, x_BTD, w_WD, bias_D, tail, segment_ids_BT):
    """For padding anywhere: works on the row with its padding squeezed out."""
    T, W = x_BTD.shape[1], w_WD.shape[0]
    real_BT, reset_BT = real_and_reset(segment_ids_BT)
    # Token t is real token number rank[t] of the row.
    rank_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - 1
    order_BT = jnp.argsort(~real_BT, axis=1, stable=True)
    x_BTD = jnp.where(real_BT[..., None], x_BTD, 0)
    dense_BTD = jnp.take_along_axis(x_BTD, order_BT[..., None], axis=1)
    # first[t]: rank of the first token of t's segment, or −(W−1) where the tail belongs to it.
    first_BT = jax.lax.cummax(jnp.where(reset_BT, rank_BT, 1 - W), axis=1)
    row_BSD = jnp.concatenate([tail, dense_BTD], axis=1)
    total = 0
    for w in range(W):
        back = W - 1 - w
        source_BT = rank_BT - back
        seen_BT = real_BT & (source_BT >= first_BT)
        index_BT = jnp.clip(source_BT + W - 1, 0, T + W - 2)
        x_w = jnp.take_along_axis(row_BSD, index_BT[..., None], axis=1)
        total = total + _tap(jnp.where(seen_BT[..., None], x_w, 0), w_WD[w])
    y_BTD = _finish(total, bias_D, activation, x_BTD.dtype)
    y_BTD = jnp.where(real_BT[..., None], y_BTD, 0)
    count_B1 = jnp.sum(real_BT, axis=1, dtype=jnp.int32, keepdims=True)
    rank_BW = count_B1 + jnp.arange(1 - W, 0, dtype=jnp.int32)
    new_tail = jnp.take_along_axis(row_BSD, (rank_BW + W - 1)[..., None], axis=1)
    new_tail = jnp.where((rank_BW >= first_BT[:, -1:])[..., None], new_tail, 0)
    return y_BTD, new_tail


def causal_conv_step(
    x_BD: Float[Array, "B D"],
    w_WD: Float[Array, "W D"],
    bias_D: Float[Array, " D"] | None = None,
    *,
    tail: Float[Array, "B W-1 D"],
    activation: str | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "B W-1 D"]]:
    """One token of ``causal_conv``: returns its output and the new tail."""
    y_BTD, tail = causal_conv(x_BD[:, None], w_WD, bias_D, tail=tail, activation=activation)
    return y_BTD[:, 0], tail


def _tap(x_BTD, w_D):
    dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
    return x_BTD.astype(dtype) * w_D.astype(dtype)


def _finish(y_BTD, bias_D, activation, dtype):
    if bias_D is not None:
        y_BTD = y_BTD + bias_D.astype(y_BTD.dtype)
    return _ACTIVATIONS[activation](y_BTD).astype(dtype)


def check_arguments(x_BTD, w_WD, bias_D, tail, segment_ids, activation) -> None:
    """Name the argument that does not fit, what it was and what it must be."""
    if x_BTD.ndim != 3:
        raise ValueError(f"x must be [B, T, D], got shape {x_BTD.shape}")
    B, T, D = x_BTD.shape
    if w_WD.ndim != 2 or w_WD.shape[0] < 1 or w_WD.shape[1] != D:
        raise ValueError(f"w must be [W, D] with W at least 1 and D={D}, got shape {w_WD.shape}")
    shapes = (("bias", bias_D, (D,)), ("tail", tail, (B, w_WD.shape[0] - 1, D)), ("segment_ids", segment_ids, (B, T)))
    for name, value, shape in shapes:
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {value.shape}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
