"""One token of everything between the projections of a Mamba-2 layer, for decoding: one kernel on TPU."""

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention import tpu_mamba2_step as tpu
from research.axes import Array, Float
from research.ops.causal_conv import causal_conv_step
from research.ops.decays import step_size
from research.ops.fused_step import fused_step
from research.ops.linear_attention import linear_attention_step
from research.ops.norms import rms_norm


def mamba2_step(
    x_BN: Float[Array, "B N"],
    gate_BM: Float[Array, "B M"],
    dt_BH: Float[Array, "B H"],
    tail_BWN: Float[Array, "B tail N"],
    state_BHKV: Float[Array, "B H K V"],
    w_WN: Float[Array, "W N"],
    bias_N: Float[Array, " N"] | None,
    log_rate_H: Float[Array, " H"],
    dt_bias_H: Float[Array, " H"],
    skip_H: Float[Array, " H"],
    norm_M: Float[Array, " M"],
    *,
    dt_limits: tuple[float, float] | None = None,
    norm_groups: int = 1,
    eps: float = 1e-5,
    implementation: str | None = None,
) -> tuple[Float[Array, "B M"], Float[Array, "B tail N"], Float[Array, "B H K V"]]:
    """Convolve and activate, decay and write the state, read it, add the skip, gate and normalise what was read.

        x, b, c = silu(conv(x) + bias),  dt = softplus(dt + dt_bias) within its limits,  g = −e^log_rate · dt
        S ← e^g S + b (x dt)ᵀ,  o = RMSNorm((Sᵀ c + skip · x) · silu(gate)) · norm

    (Dao & Gu 2024, arXiv 2405.21060.) In float32 or wider inside; gradients are those of 'xla'.

    Args:
      x_BN: channels of x, b and c, N = H·V + 2·G·K. gate_BM, dt_BH: the other parts of the projection.
      tail_BWN, state_BHKV: before the token; where they are donated, the kernel writes them in place.
      w_WN, bias_N: the convolution's taps, oldest first, and its bias or None.
      dt_limits: smallest and largest step size. norm_groups: of channels that are normalised apart. eps: of the norm.
      implementation: 'xla', 'pallas_tpu', 'pallas_tpu_interpret'; never falls back. None chooses for the platform when the
        call is lowered.

    Returns:
      (what goes to the output projection, in x's dtype; the new tail; the new state).

    Raises:
      ValueError: shapes that do not fit together, an unknown implementation.
      NotImplementedError: the named implementation cannot serve the call.
    """
    H, K, V = state_BHKV.shape[1:]
    groups, rest = divmod(x_BN.shape[1] - H * V, 2 * K)
    if rest or groups < 1 or H % groups:
        raise ValueError(
            f"x_BN must hold keys and queries of a number of groups that divides {H}, got {x_BN.shape[1]} channels"
        )
    if norm_groups < 1 or H * V % norm_groups:
        raise ValueError(f"norm_groups must divide the {H * V} channels of all heads, got {norm_groups}")
    arrays = (
        x_BN, gate_BM, dt_BH, tail_BWN, state_BHKV, w_WN, bias_N, log_rate_H, dt_bias_H, skip_H, norm_M,
    )  # fmt: skip
    return _step(implementation, (dt_limits, norm_groups, eps), *arrays)


def skip_gate_norm(y, x, gate, skip_H, norm_M, *, norm_groups: int, eps: float):
    """``RMSNorm((y + skip · x) · silu(gate)) · norm`` in y's dtype: y and x [..., H, V], the gate and the result [..., H·V]."""
    y = (y + skip_H[:, None] * x).reshape(gate.shape) * jax.nn.silu(gate.astype(y.dtype))
    return rms_norm(y.reshape(*gate.shape[:-1], norm_groups, -1), eps=eps).reshape(gate.shape) * norm_M


def _xla(
    dt_limits, norm_groups, eps,
    x_BN, gate_BM, dt_BH, tail_BWN, state_BHKV, w_WN, bias_N, log_rate_H, dt_bias_H, skip_H, norm_M,
):  # fmt: skip
    B, H, K, V = state_BHKV.shape
    wide = jnp.promote_types(x_BN.dtype, jnp.float32)
    dt_BH = step_size(dt_BH.astype(wide), dt_bias_H.astype(wide), dt_limits)
    mixed_BN, new_BWN = causal_conv_step(x_BN, w_WN, bias_N, tail=tail_BWN, activation="silu")
    keys = (x_BN.shape[1] - H * V) // 2
    x_BM, k_BN, q_BN = jnp.split(mixed_BN, [H * V, H * V + keys], axis=1)
    k_BGK, q_BGK = (x.reshape(B, -1, K) for x in (k_BN, q_BN))
    x_BHV = x_BM.reshape(B, H, V).astype(wide)
    log_decay_BH = -jnp.exp(log_rate_H.astype(wide)) * dt_BH
    y_BHV, state_BHKV = linear_attention_step(
        q_BGK, k_BGK, x_BHV * dt_BH[..., None], state_BHKV, log_decay=log_decay_BH
    )
    skip_H, norm_M = skip_H.astype(wide), norm_M.astype(wide)
    o_BM = skip_gate_norm(y_BHV, x_BHV, gate_BM, skip_H, norm_M, norm_groups=norm_groups, eps=eps)
    return o_BM.astype(x_BN.dtype), new_BWN.astype(tail_BWN.dtype), state_BHKV


def _kernel(
    dt_limits, norm_groups, eps,
    x_BN, gate_BM, dt_BH, tail_BWN, state_BHKV, w_WN, bias_N, log_rate_H, dt_bias_H, skip_H, norm_M,
    interpret=False,
):  # fmt: skip
    rates_RH = jnp.stack([log_rate_H, dt_bias_H]).astype(jnp.float32)
    scales_RM = jnp.stack([jnp.repeat(skip_H, state_BHKV.shape[3]), norm_M.astype(skip_H.dtype)]).astype(jnp.float32)
    bias_N = jnp.zeros(x_BN.shape[1], w_WN.dtype) if bias_N is None else bias_N
    arrays = (x_BN, tail_BWN, state_BHKV, dt_BH, gate_BM, w_WN, bias_N, rates_RH, scales_RM)
    return tpu.step(*arrays, limits=dt_limits, norm_groups=norm_groups, eps=eps, interpret=interpret)


def _refuses(dt_limits, norm_groups, eps, x_BN, gate_BM, dt_BH, tail_BWN, state_BHKV, w_WN, *rest):
    return tpu.refuses(x_BN, state_BHKV, w_WN.shape[0], norm_groups)


_step = fused_step(_xla, _kernel, _refuses)
