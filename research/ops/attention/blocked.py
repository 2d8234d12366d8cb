"""Attention a block of queries by a block of keys at a time (Dao 2023, arXiv 2307.08691), in XLA, forwards and backwards.

Nothing of size T·S is ever made. Blocks that no query of theirs may see are not visited: which they are is found from the
documents and places of the tokens, so packed rows, windows and half-empty caches cost what they use.
"""

import jax
import jax.numpy as jnp

from research.ops.attention.masks import Tokens, chosen, in_blocks, padded, token_blocks, visible, visits
from research.ops.explicit_mesh import vary_alike


def forward(plan, q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN):
    """(o_BTHV, lse_BHT): the output, and the logarithm of every softmax's denominator."""
    arrays = vary_alike((q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN))
    q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN = arrays
    B, T, H, _ = q_BTHK.shape
    G, V = v_BSGV.shape[2:]
    wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    least = jnp.finfo(wide).min
    q_NBGRCK, k_NBGCK, v_NBGCV = _queries(q_BTHK, G, plan.block), _keys(k_BSGK, plan.block), _keys(v_BSGV, plan.block)
    query, source = token_blocks(query, plan.block), token_blocks(source, plan.block)
    selected_NBCN = None if selected_BTN is None else in_blocks(selected_BTN, plan.block)
    order_NN, count_N = visits(query, source, plan.window, plan.chunk, plan.aligned)

    def one(_, xs):
        q_BGRCK, query, selected_BCN, order_N, count = xs
        chosen_NBCS = _chosen(plan, selected_BCN, len(k_NBGCK))
        top_BGRC = jnp.zeros_like(q_BGRCK[..., 0], wide) + least
        sum_BGRC = jnp.zeros_like(top_BGRC)
        if sinks_H is not None:
            top_BGRC = jnp.zeros_like(top_BGRC) + sinks_H.astype(wide).reshape(1, G, -1, 1)
            sum_BGRC = sum_BGRC + 1
        o_BGRCV = jnp.zeros((*top_BGRC.shape, V), wide) + 0 * top_BGRC[..., None]

        def visit(i, carry):
            top_BGRC, sum_BGRC, o_BGRCV = carry
            n = order_N[i]
            score_BGRCS, mask_BCS, _ = _scores(plan, q_BGRCK, k_NBGCK[n], query, _at(source, n), wide)
            if chosen_NBCS is not None:
                mask_BCS &= chosen_NBCS[n]
            score_BGRCS = jnp.where(mask_BCS[:, None, None], score_BGRCS, least)
            new_BGRC = jnp.maximum(top_BGRC, jnp.max(score_BGRCS, axis=-1))
            weight_BGRCS = jnp.exp(score_BGRCS - new_BGRC[..., None])
            keep_BGRC = jnp.exp(top_BGRC - new_BGRC)
            sum_BGRC = sum_BGRC * keep_BGRC + jnp.sum(weight_BGRCS, axis=-1)
            read_BGRCV = _product("BGRCS,BGSV->BGRCV", weight_BGRCS.astype(v_BSGV.dtype), v_NBGCV[n], wide)
            return new_BGRC, sum_BGRC, o_BGRCV * keep_BGRC[..., None] + read_BGRCV

        top_BGRC, sum_BGRC, o_BGRCV = jax.lax.fori_loop(0, count, visit, (top_BGRC, sum_BGRC, o_BGRCV))
        sum_BGRC = jnp.where(sum_BGRC == 0, 1, sum_BGRC)  # padding that sees no block at all
        return None, ((o_BGRCV / sum_BGRC[..., None]).astype(v_BSGV.dtype), top_BGRC + jnp.log(sum_BGRC))

    _, (o_NBGRCV, lse_NBGRC) = jax.lax.scan(one, None, (q_NBGRCK, query, selected_NBCN, order_NN, count_N))
    o_BTHV = jnp.moveaxis(o_NBGRCV, (0, 4), (1, 2)).reshape(B, -1, H, V)[:, :T]
    return o_BTHV, jnp.moveaxis(lse_NBGRC, 0, 3).reshape(B, H, -1)[..., :T]


def backward(plan, q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN, o_BTHV, lse_BHT, do_BTHV):
    """Gradients of (q, k, v, sinks): scores are computed again, a block at a time."""
    arrays = vary_alike((q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN, o_BTHV, lse_BHT, do_BTHV))
    q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN, o_BTHV, lse_BHT, do_BTHV = arrays
    B, T, H, K = q_BTHK.shape
    S, G, V = v_BSGV.shape[1:]
    wide = lse_BHT.dtype
    # How much a query's scores would gain together: Σ_s p_s (do·v_s) = do·o.
    mean_BTH1 = jnp.sum(do_BTHV.astype(wide) * o_BTHV.astype(wide), axis=-1, keepdims=True)
    lse_BTH1 = jnp.moveaxis(lse_BHT, 1, 2)[..., None]
    q_NBGRCK, k_NBGCK, v_NBGCV = _queries(q_BTHK, G, plan.block), _keys(k_BSGK, plan.block), _keys(v_BSGV, plan.block)
    do_NBGRCV = _queries(do_BTHV, G, plan.block)
    lse_NBGRC, mean_NBGRC = (_queries(x, G, plan.block)[..., 0] for x in (lse_BTH1, mean_BTH1))
    query, source = token_blocks(query, plan.block), token_blocks(source, plan.block)
    selected_NBCN = None if selected_BTN is None else in_blocks(selected_BTN, plan.block)
    order_NN, count_N = visits(query, source, plan.window, plan.chunk, plan.aligned)

    def one(carry, xs):
        q_BGRCK, do_BGRCV, lse_BGRC, mean_BGRC, query, selected_BCN, order_N, count = xs
        chosen_NBCS = _chosen(plan, selected_BCN, len(k_NBGCK))

        def visit(i, carry):
            dq_BGRCK, dk_NBGKC, dv_NBGVC = carry
            n = order_N[i]
            score_BGRCS, mask_BCS, slope_BGRCS = _scores(plan, q_BGRCK, k_NBGCK[n], query, _at(source, n), wide)
            if chosen_NBCS is not None:
                mask_BCS &= chosen_NBCS[n]
            weight_BGRCS = jnp.where(mask_BCS[:, None, None], jnp.exp(score_BGRCS - lse_BGRC[..., None]), 0)
            dweight_BGRCS = _product("BGRCV,BGSV->BGRCS", do_BGRCV, v_NBGCV[n], wide)
            dscore_BGRCS = weight_BGRCS * (dweight_BGRCS - mean_BGRC[..., None])
            if slope_BGRCS is not None:
                dscore_BGRCS *= slope_BGRCS
            dscore_BGRCS = dscore_BGRCS.astype(q_BTHK.dtype)
            # XLA on CPU transposes the first operand in memory: let it be the narrow one.
            dv_BGVC = _product("BGRCV,BGRCS->BGVS", do_BGRCV, weight_BGRCS.astype(do_BTHV.dtype), wide)
            dk_BGKC = _product("BGRCK,BGRCS->BGKS", q_BGRCK, dscore_BGRCS, wide)
            dq_BGRCK += _product("BGRCS,BGSK->BGRCK", dscore_BGRCS, k_NBGCK[n], wide)
            return dq_BGRCK, dk_NBGKC.at[n].add(dk_BGKC), dv_NBGVC.at[n].add(dv_BGVC)

        start = jnp.zeros_like(q_BGRCK, wide)
        dq_BGRCK, *carry = jax.lax.fori_loop(0, count, visit, (start, *carry))
        return tuple(carry), dq_BGRCK.astype(q_BTHK.dtype)

    zeros = jnp.zeros_like(k_NBGCK.swapaxes(3, 4), wide), jnp.zeros_like(v_NBGCV.swapaxes(3, 4), wide)
    xs = (q_NBGRCK, do_NBGRCV, lse_NBGRC, mean_NBGRC, query, selected_NBCN, order_NN, count_N)
    (dk_NBGKC, dv_NBGVC), dq_NBGRCK = jax.lax.scan(one, zeros, xs)
    dq_BTHK = jnp.moveaxis(dq_NBGRCK, (0, 4), (1, 2)).reshape(B, -1, H, K)[:, :T]
    dk_BSGK = jnp.moveaxis(dk_NBGKC, (0, 4), (1, 2)).reshape(B, -1, G, K)[:, :S].astype(k_BSGK.dtype)
    dv_BSGV = jnp.moveaxis(dv_NBGVC, (0, 4), (1, 2)).reshape(B, -1, G, V)[:, :S].astype(v_BSGV.dtype)
    dsinks_H = None
    if sinks_H is not None:
        share_BHT = jnp.exp(sinks_H.astype(wide)[:, None] - lse_BHT)
        dsinks_H = -jnp.sum(share_BHT * jnp.moveaxis(mean_BTH1[..., 0], 1, 2), axis=(0, 2)).astype(sinks_H.dtype)
    return dq_BTHK, dk_BSGK, dv_BSGV, dsinks_H


def _scores(plan, q_BGRCK, k_BGSK, query, source, wide):
    """Scores of a block, which of them count, and the soft cap's slope (None without a cap)."""
    score_BGRCS = _product("BGRCK,BGSK->BGRCS", q_BGRCK, k_BGSK, wide)
    mask_BCS = visible(query, source, plan.window, plan.chunk)
    if plan.softcap is None:
        return score_BGRCS, mask_BCS, None
    tanh_BGRCS = jnp.tanh(score_BGRCS / plan.softcap)
    return plan.softcap * tanh_BGRCS, mask_BCS, 1 - tanh_BGRCS * tanh_BGRCS


def _product(equation, a, b, wide):
    return jnp.einsum(equation, a, b, preferred_element_type=wide)


def _queries(x_BTHK, groups: int, block: int):
    """[B, T, H, K] → [N, B, G, R, C, K]: N blocks of C tokens, R heads a key head."""
    x_BTHK = padded(x_BTHK, block)
    B, T, H, K = x_BTHK.shape
    return jnp.moveaxis(x_BTHK.reshape(B, T // block, block, groups, H // groups, K), (1, 2), (0, 4))


def _keys(x_BSGK, block: int):
    """[B, S, G, K] → [N, B, G, C, K]."""
    x_BSGK = padded(x_BSGK, block)
    B, S, G, K = x_BSGK.shape
    return jnp.moveaxis(x_BSGK.reshape(B, S // block, block, G, K), (1, 2), (0, 3))


def _chosen(plan, selected_BCN, blocks: int):
    """[N, B, C, S]: whether each key of each block is among those selected; None where all are."""
    if selected_BCN is None:
        return None
    mask_BCNS = chosen(selected_BCN, blocks * plan.block).reshape(*selected_BCN.shape[:2], blocks, plan.block)
    return jnp.moveaxis(mask_BCNS, 2, 0)


def _at(tokens: Tokens, n) -> Tokens:
    return Tokens(tokens.segment_BT[n], tokens.place_BT[n])
