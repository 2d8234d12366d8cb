"""Depthwise short causal convolution, with documents packed in a row and its tail carried as state.

    y_t = activation(bias + Σ_w weight[w] · x_{t−(W−1)+w})

where only real tokens count: the taps reach back over the real tokens of the token's own segment (and, in the row's first
segment, over the tail), and padding is skipped as if it were not there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from pallas_kernels.causal_conv import gpu, tpu
from research.axes import Array, Float, Int
from research.ops.explicit_mesh import run_on_shards, spec_of, vary_alike
from research.ops.kept import keepable
from research.ops.segments import real_and_reset, select
from research.ops.sequence_shards import compose, previous_id

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu", "pallas_tpu_interpret", "pallas_gpu_interpret")
_ACTIVATIONS = {None: lambda x: x, "silu": jax.nn.silu}
_PLATFORMS = {"tpu": tpu, "cuda": gpu}  # how jax.lax.platform_dependent calls them
_FEW = 16  # tokens, below which a kernel would mostly compute padding


def causal_conv(
    x_BTD: Float[Array, "B T D"],
    w_WD: Float[Array, "W D"],
    bias_D: Float[Array, " D"] | None = None,
    *,
    tail: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    activation: str | None = None,
    implementation: str | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Convolve each channel with W taps over the token and the W − 1 real tokens before it.

    Args:
      x_BTD: inputs. w_WD: taps, oldest first (``w_WD[-1]`` weighs the token itself). bias_D: optional.
      tail: the last W − 1 real inputs before this call, oldest first, [B, W − 1, D]; zeros when None. It belongs to the
        row's first segment.
      segment_ids: [B, T], as for ``linear_attention``: a token whose id differs from the last non-zero id before it sees
        zeros before its segment; id 0 is padding, which outputs 0, is not read and does not shift the tail.
      activation: None or 'silu', applied to the sum.
      implementation: 'xla' or a 'pallas_*' name; never falls back. None chooses for the platform when the call is lowered.
      axis_name: inside ``jax.shard_map``, the mesh axis over which T is sharded, x being this shard's part. ``tail`` and the
        returned tail are those of the whole sequence, and segments may cross shards.

    Returns:
      y_BTD in x's dtype (the sum is accumulated in promote_types(x, float32)), and the new tail in x's dtype: the last
      W − 1 real tokens of the row's last segment.

    Raises:
      ValueError: shapes that do not fit together, an unknown activation or implementation, a sharded time axis.
      NotImplementedError: the named implementation cannot serve the call.
    """
    check_arguments(x_BTD, w_WD, bias_D, tail, segment_ids, activation)
    check_implementation(implementation, x_BTD, w_WD)
    run = functools.partial(_local, (activation, implementation, axis_name is None))
    arrays = (x_BTD, w_WD, bias_D, tail, segment_ids)
    if axis_name is not None:
        entering, last = _entering_tail(x_BTD, w_WD.shape[0] - 1, tail, segment_ids, axis_name)
        return run(x_BTD, w_WD, bias_D, entering, segment_ids)[0], last
    split = spec_of(x_BTD)
    if split is None:
        return run(*arrays)
    b, t, d = split
    if t is not None:
        raise ValueError(f"the time axis of x must not be sharded, got {split}")
    rows = P(b, None, d)
    return run_on_shards(run, x_BTD, arrays, (rows, P(None, d), P(d), rows, P(b)), (rows, rows))


def _local(plan, x_BTD, w_WD, bias_D, tail, segment_ids) -> Any:
    B, _, D = x_BTD.shape
    tail = jnp.zeros((B, w_WD.shape[0] - 1, D), x_BTD.dtype) if tail is None else tail.astype(x_BTD.dtype)
    x_BTD, w_WD, bias_D, tail, segment_ids = vary_alike((x_BTD, w_WD, bias_D, tail, segment_ids))
    # One tap looks back at nothing, and XLA:CPU dies of the sum over devices of an empty gradient.
    if w_WD.shape[0] == 1:
        out: Any = _convolve(plan, x_BTD, w_WD, bias_D, None, segment_ids)
        return out[0], tail
    return _convolve(plan, x_BTD, w_WD, bias_D, tail, segment_ids)


def _entering_tail(x_BTD, taps, tail, segment_ids_BT, axis_name):
    """(the tail that this shard's first tokens see, the tail after the last shard)."""
    B, T, D = x_BTD.shape
    if tail is None or taps == 0:  # an empty tail must have no gradient: see _local
        tail = jnp.zeros((B, taps, D), x_BTD.dtype)
    tail = tail.astype(x_BTD.dtype)
    if taps == 0:
        return tail, tail
    real_BT, reset_BT = jnp.ones((B, T), bool), jnp.zeros((B, T), bool)
    if segment_ids_BT is not None:
        real_BT, reset_BT = real_and_reset(segment_ids_BT, previous_id(segment_ids_BT, axis_name))
        x_BTD = select(real_BT, x_BTD)
    new_B = jnp.sum(real_BT, axis=1, dtype=jnp.int32)
    own = _next_tail(*vary_alike((x_BTD, jnp.zeros_like(tail), segment_ids_BT)))

    def pushed(by, tail):
        """``tail`` with as many slots freed as the shard has tokens; all of them where another segment began."""
        slot_BW = by[:, None] + jnp.arange(taps, dtype=jnp.int32)
        kept = jnp.take_along_axis(tail, jnp.minimum(slot_BW, taps - 1)[..., None], axis=1)
        return jnp.where((slot_BW < taps)[..., None], kept, 0)

    entering, last = compose(pushed, jnp.where(jnp.any(reset_BT, axis=1), taps, new_B), own, tail, axis_name)
    first_BT = real_BT & (jnp.cumsum(real_BT, axis=1) == 1)
    return jnp.where(jnp.any(reset_BT & first_BT, axis=1)[:, None, None], 0, entering), last


def _next_tail(x_BTD, tail, segment_ids_BT):
    """The last W − 1 real tokens of the row's last segment, or of the old tail where that segment began before it."""
    row_BSD = jnp.concatenate([tail, x_BTD], axis=1)
    index_BW, within_BW = _next_places(tail.shape[1], segment_ids_BT)
    if index_BW is None:
        return row_BSD[:, x_BTD.shape[1] :]
    new_tail = jnp.take_along_axis(row_BSD, index_BW[..., None], axis=1)
    return jnp.where(within_BW[..., None], new_tail, 0)


def _next_places(taps, segment_ids_BT) -> Any:
    """Where in the row with its tail before it the new tail's tokens are, and which are; None where they are the row's last."""
    if segment_ids_BT is None:
        return None, None
    real_BT, reset_BT = real_and_reset(segment_ids_BT)
    rank_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - 1
    first_B1 = jnp.max(jnp.where(reset_BT, rank_BT, -taps), axis=1, keepdims=True)
    wanted_BW = rank_BT[:, -1:] + 1 + jnp.arange(-taps, 0, dtype=jnp.int32)
    # The token of a rank is the first whose running count reaches it; ranks below 0 lie in the tail.
    place_BW = jax.vmap(jnp.searchsorted)(rank_BT, wanted_BW).astype(jnp.int32)
    return jnp.where(wanted_BW < 0, wanted_BW, place_BW) + taps, wanted_BW >= first_B1


def _add_next_tail(dx_BTD, dtail, dnext, segment_ids_BT):
    """(dx, dtail) with what the new tail's gradient sends back: autodiff would pass over all of dx once more for a few rows."""
    T, taps = dx_BTD.shape[1], dnext.shape[1]
    index_BW, within_BW = _next_places(taps, segment_ids_BT)
    if index_BW is None:
        inside = min(T, taps)
        dx_BTD = dx_BTD.at[:, T - inside :].add(dnext[:, taps - inside :].astype(dx_BTD.dtype))
        return dx_BTD, dtail.at[:, T:].add(dnext[:, : max(0, taps - T)].astype(dtail.dtype)) if taps > T else dtail
    dnext, rows_B1 = jnp.where(within_BW[..., None], dnext, 0), jnp.arange(len(dnext))[:, None]
    in_row_BW = jnp.where(index_BW >= taps, index_BW - taps, T)
    dx_BTD = dx_BTD.at[rows_B1, in_row_BW].add(dnext.astype(dx_BTD.dtype), mode="drop")
    return dx_BTD, dtail.at[rows_B1, index_BW].add(dnext.astype(dtail.dtype), mode="drop")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(plan, x_BTD, w_WD, bias_D, tail, segment_ids_BT) -> Any:
    """(outputs, new tail) for a plan (activation, implementation, whether there is a new tail); no tails with one tap. Only the
    inputs are kept for the backward pass."""
    *plan, last = plan
    y_BTD = _choose(plan, "forward", (x_BTD, w_WD, bias_D, tail, segment_ids_BT))
    return y_BTD, _next_tail(x_BTD, tail, segment_ids_BT) if last and tail is not None else None


def _convolve_forward(plan, *arrays):
    return keepable(_convolve(plan, *arrays), "causal_conv"), arrays


def _convolve_backward(plan, arrays, cotangents):
    (dy_BTD, dnext), segment_ids_BT = cotangents, arrays[-1]
    ids_gradient = None if segment_ids_BT is None else np.zeros(segment_ids_BT.shape, jax.dtypes.float0)
    dx_BTD, dw_WD, dbias_D, dtail = _choose(plan[:2], "backward", (*arrays, dy_BTD))
    if dnext is not None:
        dx_BTD, dtail = _add_next_tail(dx_BTD, dtail, dnext, segment_ids_BT)
    return dx_BTD, dw_WD, dbias_D, dtail, ids_gradient


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _choose(plan, way, arrays: tuple):
    activation, implementation = plan
    xla = functools.partial(_xla, activation, way)
    if implementation == "xla":
        return xla(*arrays)
    if implementation is not None:
        return _kernel(_named(implementation), activation, way, *arrays, interpret=implementation.endswith("interpret"))
    few = arrays[0].shape[1] < _FEW
    serving = {name: module for name, module in _PLATFORMS.items() if not (few or module.refuses(*arrays[:2]))}
    kernels = {name: functools.partial(_kernel, module, activation, way) for name, module in serving.items()}
    return jax.lax.platform_dependent(*arrays, default=xla, **kernels) if kernels else xla(*arrays)


def _named(implementation) -> Any:
    return tpu if implementation.startswith("pallas_tpu") else gpu


def _scattered(segment_ids_BT):
    """Whether padding precedes a real token anywhere."""
    real_BT = segment_ids_BT > 0
    return jnp.any(real_BT[:, 1:] & ~real_BT[:, :-1])


def _kernel(module, activation, way, x_BTD, w_WD, bias_D, tail, segment_ids_BT, *dy, interpret=False):
    """A platform's kernel, for rows whose padding comes last; others are squeezed first, and the result spread."""
    options: dict[str, Any] = {"silu": activation == "silu", "interpret": interpret}
    run = getattr(module, way)
    if segment_ids_BT is None:
        return run(x_BTD, w_WD, bias_D, tail, None, *dy, **options)
    taps = w_WD.shape[0] - 1

    def direct(segment_ids_BT, *rows):
        real_BT, reset_BT = real_and_reset(segment_ids_BT)
        place_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
        first_BT = jax.lax.cummax(jnp.where(reset_BT, place_T, -taps), axis=1)
        reach_BT = jnp.where(real_BT, jnp.minimum(place_T - first_BT, taps), -1)
        return run(rows[0], w_WD, bias_D, tail, reach_BT, *rows[1:], **options)

    def squeezed(segment_ids_BT, *rows):
        real_BT = segment_ids_BT > 0
        order_BT = jnp.argsort(~real_BT, axis=1, stable=True)
        take = lambda a, index_BT: jnp.take_along_axis(a, index_BT[..., None], axis=1)  # noqa: E731
        out = direct(jnp.take_along_axis(segment_ids_BT, order_BT, axis=1), *(take(row, order_BT) for row in rows))
        rank_BT = jnp.maximum(jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - 1, 0)
        spread = lambda a: _masked(segment_ids_BT, take(a, rank_BT))  # noqa: E731
        return spread(out) if way == "forward" else (spread(out[0]), *out[1:])

    rows = (segment_ids_BT, x_BTD, *dy)
    return jax.lax.cond(_scattered(segment_ids_BT), squeezed, direct, *rows) if taps else direct(*rows)


def _xla(activation, way, x_BTD, w_WD, bias_D, tail, segment_ids_BT, *dy):
    """The gathering form runs only where padding precedes a real token that looks back: shifts are several times faster,
    forwards and backwards, and serve packed and right-padded rows."""
    arrays = (_masked(segment_ids_BT, x_BTD), w_WD, bias_D, tail, segment_ids_BT, *dy)
    forms = {"forward": (_gathering, _shifting), "backward": (_gathering_backward, _shifting_backward)}[way]
    gather, shift = (functools.partial(form, activation) for form in forms)
    if segment_ids_BT is None or w_WD.shape[0] == 1:
        return shift(*arrays)
    return jax.lax.cond(_scattered(segment_ids_BT), gather, shift, *arrays)


def _shifting(activation, x_BTD, w_WD, bias_D, tail, segment_ids_BT):
    """For rows whose padding, if any, comes last."""
    y_BTD = _ACTIVATIONS[activation](_shifted_sum(x_BTD, w_WD, bias_D, tail, segment_ids_BT))
    return _masked(segment_ids_BT, y_BTD).astype(x_BTD.dtype)


def _shifted_sum(x_BTD, w_WD, bias_D, tail, segment_ids_BT):
    T, W = x_BTD.shape[1], w_WD.shape[0]
    row_BSD = _row(tail, x_BTD)
    ids_BS = _row_ids(segment_ids_BT, W)
    y_BTD: Any = 0.0
    for w in range(W):
        y_BTD = y_BTD + _where_same(ids_BS, w, T, _tap(row_BSD[:, w : w + T], w_WD[w]))
    return y_BTD if bias_D is None else y_BTD + bias_D.astype(y_BTD.dtype)


def _shifting_backward(activation, x_BTD, w_WD, bias_D, tail, segment_ids_BT, dy_BTD):
    """Written out: what autodiff makes of the shifts takes three times as long."""
    T, W = x_BTD.shape[1], w_WD.shape[0]
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    row_BSD = _row(tail, x_BTD).astype(wide)
    ids_BS = _row_ids(segment_ids_BT, W)
    pre_BTD = _shifted_sum(x_BTD, w_WD, bias_D, tail, segment_ids_BT)
    (d_BTD,) = jax.vjp(_ACTIVATIONS[activation], pre_BTD)[1](dy_BTD.astype(pre_BTD.dtype))
    # The barrier keeps XLA from computing the activation's derivative again in each of the sums below.
    d_BTD = jax.lax.optimization_barrier(_masked(segment_ids_BT, d_BTD))
    # Output t reads row entry t + w with tap w, so entry s is read by output s − w.
    later_BSD = jnp.pad(d_BTD, [(0, 0), (W - 1, W - 1), (0, 0)])
    later_ids_BS = None if ids_BS is None else jnp.pad(segment_ids_BT, [(0, 0), (W - 1, W - 1)])
    dw: list[Array] = []
    drow_BSD: Any = 0.0
    for w in range(W):
        back = W - 1 - w
        read_BSD = _tap(later_BSD[:, back : back + T + W - 1], w_WD[w])
        if ids_BS is not None and later_ids_BS is not None:
            same_BS = later_ids_BS[:, back : back + T + W - 1] == ids_BS
            read_BSD = jnp.where(same_BS[..., None], read_BSD, 0)
        drow_BSD = drow_BSD + read_BSD
        dw.append(jnp.sum(_where_same(ids_BS, w, T, row_BSD[:, w : w + T]) * d_BTD, axis=(0, 1)))
    drow_BSD = drow_BSD.astype(x_BTD.dtype)
    dbias = None if bias_D is None else jnp.sum(d_BTD, axis=(0, 1)).astype(bias_D.dtype)
    dtail = None if tail is None else drow_BSD[:, : W - 1]
    return drow_BSD[:, W - 1 :], jnp.stack(dw).astype(w_WD.dtype), dbias, dtail


def _row(tail, x_BTD):
    return x_BTD if tail is None else jnp.concatenate([tail, x_BTD], axis=1)


def _row_ids(segment_ids_BT, W):
    """Ids of the row with its tail before it, which is the first segment's."""
    if segment_ids_BT is None:
        return None
    return jnp.concatenate([jnp.repeat(segment_ids_BT[:, :1], W - 1, axis=1), segment_ids_BT], axis=1)


def _where_same(ids_BS, w, T, x_BTD):
    """``x`` where the token and the one that tap w reads are of one segment."""
    if ids_BS is None:
        return x_BTD
    return jnp.where((ids_BS[:, w : w + T] == ids_BS[:, -T:])[..., None], x_BTD, 0)


def _gathering(activation, x_BTD, w_WD, bias_D, tail, segment_ids_BT):
    """For padding anywhere: works on the row with its padding squeezed out."""
    T, W = x_BTD.shape[1], w_WD.shape[0]
    real_BT, reset_BT = real_and_reset(segment_ids_BT)
    # Token t is real token number rank[t] of the row.
    rank_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - 1
    order_BT = jnp.argsort(~real_BT, axis=1, stable=True)
    dense_BTD = jnp.take_along_axis(x_BTD, order_BT[..., None], axis=1)
    # first[t]: rank of the first token of t's segment, or −(W−1) where the tail belongs to it.
    first_BT = jax.lax.cummax(jnp.where(reset_BT, rank_BT, 1 - W), axis=1)
    row_BSD = jnp.concatenate([tail, dense_BTD], axis=1)
    y_BTD: Any = 0.0
    for w in range(W):
        source_BT = rank_BT - (W - 1 - w)
        seen_BT = real_BT & (source_BT >= first_BT)
        index_BT = jnp.clip(source_BT + W - 1, 0, T + W - 2)
        x_w = jnp.take_along_axis(row_BSD, index_BT[..., None], axis=1)
        y_BTD = y_BTD + _tap(jnp.where(seen_BT[..., None], x_w, 0), w_WD[w])
    y_BTD = y_BTD if bias_D is None else y_BTD + bias_D.astype(y_BTD.dtype)
    return _masked(segment_ids_BT, _ACTIVATIONS[activation](y_BTD)).astype(x_BTD.dtype)


def _gathering_backward(activation, x_BTD, w_WD, bias_D, tail, segment_ids_BT, dy_BTD):
    def form(x_BTD, w_WD, bias_D, tail):
        return _gathering(activation, x_BTD, w_WD, bias_D, tail, segment_ids_BT)

    return jax.vjp(form, x_BTD, w_WD, bias_D, tail)[1](dy_BTD)


def _masked(segment_ids_BT, y_BTD):
    return y_BTD if segment_ids_BT is None else jnp.where((segment_ids_BT > 0)[..., None], y_BTD, 0)


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


def check_implementation(implementation, x_BTD, w_WD) -> None:
    """Refuse unknown names, and kernels that do not exist or cannot serve the call."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    kernel = implementation is not None and implementation != "xla"
    why = _named(implementation).refuses(x_BTD, w_WD) if kernel else None
    if why:
        raise NotImplementedError(f"implementation={implementation!r} cannot serve this call: {why}")
