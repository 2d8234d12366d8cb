"""One token of everything between the projections of a Gated DeltaNet layer, for decoding: one kernel on TPU."""

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention import tpu_mixer_step as tpu
from research.axes import Array, Float
from research.ops.causal_conv import causal_conv_step
from research.ops.decays import step_size
from research.ops.fused_step import fused_step
from research.ops.linear_attention import linear_attention_step
from research.ops.norms import l2_norm, rms_norm


def gated_deltanet_step(
    x_BN: Float[Array, "B N"],
    gate_BM: Float[Array, "B M"],
    strength_BH: Float[Array, "B H"],
    decay_BH: Float[Array, "B H"],
    tail_BWN: Float[Array, "B tail N"],
    state_BHKV: Float[Array, "B H K V"],
    w_WN: Float[Array, "W N"],
    log_rate_H: Float[Array, " H"],
    dt_bias_H: Float[Array, " H"],
    norm_V: Float[Array, " V"],
    *,
    eps: float = 1e-6,
    strongest: float = 1.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "B M"], Float[Array, "B tail N"], Float[Array, "B H K V"]]:
    """Convolve and activate, normalise q and k, decay and write the state, read it, normalise and gate what was read.

        q, k, v = silu(conv(x)),  q, k to length one,  β = strongest · σ(strength),  g = −e^log_rate · softplus(decay + dt_bias)
        S ← e^g S,  S ← S + k (β (v − Sᵀ k))ᵀ,  o = RMSNorm(Sᵀ q / √K) · norm · silu(gate)

    (Yang, Kautz & Hatamizadeh 2024, eq. 10.) In float32 or wider inside; gradients are those of 'xla'.

    Args:
      x_BN: channels of q, k and v, N = 2·G·K + H·V. gate_BM, strength_BH, decay_BH: the other projections.
      tail_BWN, state_BHKV: before the token; where they are donated, the kernel writes them in place.
      w_WN: the convolution's taps, oldest first.
      eps: of the norm.
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
            f"x_BN must hold keys and queries of a number of heads that divides {H}, got {x_BN.shape[1]} channels"
        )
    arrays = (x_BN, gate_BM, strength_BH, decay_BH, tail_BWN, state_BHKV, w_WN, log_rate_H, dt_bias_H, norm_V)
    return _step(implementation, (eps, strongest), *arrays)


def _xla(
    eps, strongest, x_BN, gate_BM, strength_BH, decay_BH, tail_BWN, state_BHKV, w_WN, log_rate_H, dt_bias_H, norm_V
):
    B, H, K, V = state_BHKV.shape
    wide = jnp.promote_types(x_BN.dtype, jnp.float32)
    rate_H, bias_H = jnp.exp(log_rate_H.astype(wide)), dt_bias_H.astype(wide)
    log_decay_BH = -rate_H * step_size(decay_BH.astype(wide), bias_H)
    beta_BH = strongest * jax.nn.sigmoid(strength_BH.astype(wide))
    mixed_BN, new_BWN = causal_conv_step(x_BN, w_WN, tail=tail_BWN, activation="silu")
    keys = (x_BN.shape[1] - H * V) // 2
    q_BN, k_BN, v_BN = jnp.split(mixed_BN, [keys, 2 * keys], axis=1)
    q_BGK, k_BGK = (l2_norm(x.reshape(B, -1, K)) for x in (q_BN, k_BN))
    gates = {"log_decay": log_decay_BH, "beta": beta_BH, "scale": K**-0.5}
    o_BHV, state_BHKV = linear_attention_step(q_BGK, k_BGK, v_BN.reshape(B, H, V), state_BHKV, **gates)
    o_BHV = rms_norm(o_BHV, norm_V.astype(wide), eps=eps) * jax.nn.silu(gate_BM).reshape(o_BHV.shape)
    return o_BHV.reshape(B, -1), new_BWN.astype(tail_BWN.dtype), state_BHKV


def _kernel(
    eps, strongest, x_BN, gate_BM, strength_BH, decay_BH, tail_BWN, state_BHKV, w_WN, log_rate_H, dt_bias_H, norm_V,
    interpret=False,
):  # fmt: skip
    gates_BRH = jnp.stack([strength_BH, decay_BH], axis=1).astype(jnp.float32)
    rates_RH = jnp.stack([log_rate_H, dt_bias_H]).astype(jnp.float32)
    options = {"eps": eps, "scale": state_BHKV.shape[2] ** -0.5, "strength": strongest, "interpret": interpret}
    arrays = (x_BN, tail_BWN, state_BHKV, w_WN.astype(jnp.float32), gates_BRH, rates_RH, gate_BM)
    return tpu.step(*arrays, norm_V.astype(jnp.float32), **options)


def _refuses(eps, strongest, x_BN, gate_BM, strength_BH, decay_BH, tail_BWN, state_BHKV, w_WN, *rest):
    return tpu.refuses(x_BN, state_BHKV, w_WN.shape[0])


_step = fused_step(_xla, _kernel, _refuses)
