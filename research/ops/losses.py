"""Losses as sums, so that they add up over micro-batches and devices before anything is divided."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from research.axes import Array, Bool, Float, Int
from research.ops.explicit_mesh import vary_alike


def cross_entropy(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed negative log-likelihood of the targets in nats, and how many targets the mask counts; float32 or wider."""
    nats_BT = -token_logprobs(logits_BTV, targets_BT)
    return jnp.sum(jnp.where(mask_BT, nats_BT, 0)), jnp.sum(mask_BT, dtype=nats_BT.dtype)


def token_logprobs(logits_V: Float[Array, "*#rows V"], tokens: Int[Array, "*#rows"]) -> Float[Array, "*#rows"]:
    """Natural log-probability of each token under the logits in its place; float32 or wider."""
    logits_V = logits_V.astype(jnp.promote_types(logits_V.dtype, jnp.float32))
    picked = jnp.take_along_axis(logits_V, tokens[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits_V, axis=-1)


def projected_cross_entropy(
    x_BTD: Float[Array, "B T D"],
    w_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    *,
    scale: float = 1.0,
    block_size: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``cross_entropy`` of ``scale · x @ w`` without its [B, T, V]: logits exist for one block of tokens at a time.

    Where a gradient is wanted, each block's is taken while its logits are there (Hsu et al. 2024, Liger Kernel, section 3.2),
    so that nothing is projected twice; what is kept for backward is of the sizes of x and w.

    Args:
      x_BTD: hidden states. w_DV: the head, in x's dtype. targets_BT, mask_BT: as for ``cross_entropy``.
      scale: multiplies the logits.
      block_size: tokens a block; None is as many as have about 2²⁷ logits.

    Returns:
      The summed nats and how many targets the mask counts, in promote_types(x, float32). Only the nats have a gradient.

    Raises:
      ValueError: a block_size that is not positive.
    """
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be None or positive, got {block_size}")
    tokens, V = targets_BT.size, w_DV.shape[1]
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    if tokens == 0:
        return jnp.zeros((), wide), jnp.zeros((), wide)
    block = min(tokens, block_size or max(128, (1 << 27) // V // 128 * 128))
    blocks = -(-tokens // block)

    def cut(x_BT):
        x_N = x_BT.reshape(tokens, *x_BT.shape[2:])
        pads = [(0, blocks * block - tokens)] + [(0, 0)] * (x_N.ndim - 1)
        return jnp.pad(x_N, pads).reshape(blocks, block, *x_N.shape[1:])

    x_ICD, w_DV = vary_alike((cut(x_BTD), w_DV.astype(x_BTD.dtype)))
    mask_IC = cut(mask_BT)
    return _nats(float(scale), x_ICD, w_DV, cut(targets_BT), mask_IC), jnp.sum(mask_IC, dtype=wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nats(scale, x_ICD, w_DV, targets_IC, mask_IC):
    def body(total, block):
        return total + _block(scale, w_DV, *block)[0], None

    return jax.lax.scan(body, _zero(x_ICD), (x_ICD, targets_IC, mask_IC))[0]


def _nats_forward(scale, x_ICD, w_DV, targets_IC, mask_IC):
    """The gradients at once, for a cotangent of 1."""

    def body(carry, block):
        total, dw_DV = carry
        x_CD, _, mask_C = block
        nats, slope_CV = _block(scale, w_DV, *block)
        slope_CV = jnp.where(mask_C[:, None], slope_CV, 0).astype(x_CD.dtype)
        dx_CD = jnp.matmul(slope_CV, w_DV.T, preferred_element_type=total.dtype)
        # A token that does not count may be anything, NaN included.
        own_CD = jnp.where(mask_C[:, None], x_CD, 0)
        dw_DV = dw_DV + jnp.matmul(own_CD.T, slope_CV, preferred_element_type=total.dtype)
        return (total + nats, dw_DV), dx_CD.astype(x_CD.dtype)

    zero = _zero(x_ICD)
    start = zero, jnp.zeros(w_DV.shape, zero.dtype) + zero
    (total, dw_DV), dx_ICD = jax.lax.scan(body, start, (x_ICD, targets_IC, mask_IC))
    return total, (dx_ICD, dw_DV.astype(w_DV.dtype), targets_IC, mask_IC)


def _nats_backward(scale, residuals, cotangent):
    dx_ICD, dw_DV, targets_IC, mask_IC = residuals
    none = [np.zeros(x.shape, jax.dtypes.float0) for x in (targets_IC, mask_IC)]
    return (cotangent * dx_ICD).astype(dx_ICD.dtype), (cotangent * dw_DV).astype(dw_DV.dtype), *none


_nats.defvjp(_nats_forward, _nats_backward)


def _zero(x_ICD):
    """Nought in the accumulation dtype, varying over the mesh axes that x varies over: a loop's carry must."""
    return vary_alike((jnp.zeros((), jnp.promote_types(x_ICD.dtype, jnp.float32)), x_ICD))[0]


def _block(scale, w_DV, x_CD, targets_C, mask_C):
    """(summed nats, their slope in scale · x @ w times scale)."""
    wide = jnp.promote_types(x_CD.dtype, jnp.float32)
    logits_CV = jnp.matmul(x_CD, w_DV, preferred_element_type=wide)
    logits_CV = logits_CV if scale == 1 else logits_CV * scale
    top_C1 = jnp.max(logits_CV, axis=1, keepdims=True)
    powers_CV = jnp.exp(logits_CV - top_C1)
    sum_C1 = jnp.sum(powers_CV, axis=1, keepdims=True)
    hit_CV = jnp.arange(w_DV.shape[1], dtype=jnp.int32) == targets_C[:, None]
    picked_C = jnp.sum(jnp.where(hit_CV, logits_CV, 0), axis=1)
    nats_C = top_C1[:, 0] + jnp.log(sum_C1[:, 0]) - picked_C
    return jnp.sum(jnp.where(mask_C, nats_C, 0)), scale * (powers_CV / sum_C1 - hit_CV)
