"""The definition: every score at once. Memory grows with T·S; for short rows and single decoded tokens."""

import jax.numpy as jnp

from research.ops.attention.masks import chosen, visible


def dense(plan, q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN):
    """(o_BTHV) of scaled queries; differentiable as it stands."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    score_BGRTS = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=wide)
    if plan.softcap is not None:
        score_BGRTS = plan.softcap * jnp.tanh(score_BGRTS / plan.softcap)
    mask_BTS = visible(query, source, plan.window, plan.chunk)
    if selected_BTN is not None:
        mask_BTS &= chosen(selected_BTN, mask_BTS.shape[-1])
    weight_BGRTS = masked_softmax(score_BGRTS, mask_BTS[:, None, None], sinks_of(sinks_H, G, wide))
    o_BTGRV = jnp.einsum("BGRTS,BSGV->BTGRV", weight_BGRTS.astype(v_BSGV.dtype), v_BSGV)
    return o_BTGRV.reshape(B, T, H, v_BSGV.shape[-1])


def masked_softmax(score, mask, sink=None):
    """Softmax over the last axis of what the mask leaves; ``sink`` is one more score, whose share nobody gets."""
    score = jnp.where(mask, score, jnp.finfo(score.dtype).min)
    top = jnp.max(score, axis=-1, keepdims=True)
    if sink is None:
        weight = jnp.exp(score - top)
        return weight / jnp.sum(weight, axis=-1, keepdims=True)
    top = jnp.maximum(top, sink)
    weight = jnp.exp(score - top)
    return weight / (jnp.sum(weight, axis=-1, keepdims=True) + jnp.exp(sink - top))


def sinks_of(sinks_H, groups: int, dtype):
    """Sinks [H] as they meet scores [B, G, R, T, S]."""
    return None if sinks_H is None else sinks_H.astype(dtype).reshape(groups, -1)[None, :, :, None, None]
