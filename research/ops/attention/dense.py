"""The definition: every score at once. Memory grows with T·S; for short rows and single decoded tokens."""

import jax
import jax.numpy as jnp

from research.ops.attention.masks import chosen, visible

# Key heads up to which a product over all of them costs less than transposing the cache.
_MOST_HEADS = 16


def dense(plan, q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN):
    """(o_BTHV) of scaled queries; differentiable as it stands."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    scores, mix = _products(T, G)
    score_BGRTS = scores(q_BTGRK, k_BSGK, wide)
    if plan.softcap is not None:
        score_BGRTS = plan.softcap * jnp.tanh(score_BGRTS / plan.softcap)
    mask_BTS = visible(query, source, plan.window, plan.chunk)
    if selected_BTN is not None:
        mask_BTS &= chosen(selected_BTN, mask_BTS.shape[-1])
    weight_BGRTS = masked_softmax(score_BGRTS, mask_BTS[:, None, None], sinks_of(sinks_H, G, wide))
    o_BTGRV = mix(weight_BGRTS.astype(v_BSGV.dtype), v_BSGV)
    return o_BTGRV.reshape(B, T, H, v_BSGV.shape[-1])


def _products(T: int, G: int):
    """Scores of queries against keys, and values mixed by weights."""

    def score(q_BTGRK, k_BSGK, wide):
        return jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=wide)

    def mix(weight_BGRTS, v_BSGV):
        return jnp.einsum("BGRTS,BSGV->BTGRV", weight_BGRTS, v_BSGV)

    if T > 1 or G > _MOST_HEADS:
        return score, mix

    # One query: on CPU a product for each head would have the cache transposed first. As one product over all heads' channels,
    # zero where query and key are of different heads, the cache is read as it lies.
    def score_one(q_B1GRK, k_BSGK, wide):
        B, _, _, R, K = q_B1GRK.shape
        own_GH = jnp.eye(G, dtype=q_B1GRK.dtype)
        q_BGKHR = jnp.moveaxis(q_B1GRK[:, 0], 2, 3)[:, :, :, None] * own_GH[:, None, :, None]
        k_BSN = k_BSGK.reshape(B, -1, G * K)
        score_BSN = jnp.einsum("BSN,BNM->BSM", k_BSN, q_BGKHR.reshape(B, G * K, G * R), preferred_element_type=wide)
        return score_BSN.swapaxes(1, 2).reshape(B, G, R, 1, -1)

    def mix_one(weight_BGR1S, v_BSGV):
        B, S, _, V = v_BSGV.shape
        R = weight_BGR1S.shape[2]
        o_BMN = jnp.einsum("BMS,BSN->BMN", weight_BGR1S.reshape(B, G * R, S), v_BSGV.reshape(B, S, G * V))
        o_BGRHV = o_BMN.reshape(B, G, R, G, V)
        return jnp.stack([o_BGRHV[:, g, :, g] for g in range(G)], axis=1)[:, None]

    def on_cpu(one, several):
        def product(a, b, *rest):
            forms = {"cpu": lambda a, b: one(a, b, *rest), "default": lambda a, b: several(a, b, *rest)}
            return jax.lax.platform_dependent(a, b, **forms)

        return product

    return on_cpu(score_one, score), on_cpu(mix_one, mix)


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
