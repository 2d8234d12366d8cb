"""What the indexer learns from: the divergence of its scores from where attention looks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.axes import Array, Float, Int
from research.ops.attention import Tokens, visible
from research.ops.attention.dense import masked_softmax
from research.ops.sparse_attention.attend import gather, scores
from research.ops.sparse_attention.blocks import map_queries, queries_per_block
from research.ops.sparse_attention.index import index_scores, one_zero


class IndexStatistics(NamedTuple):
    """Sums over the real queries of a batch: of KL(p ‖ softmax(I)) in nats, how many, and, where it was asked for, of the
    share of p that the best keys hold; float32 or wider."""

    divergence: Float[Array, "..."]
    queries: Float[Array, "..."]
    captured: Float[Array, "..."] | None = None


def index_divergence(
    index_q_BTHK: Float[Array, "B T H K"],
    index_k_BSK: Float[Array, "B S K"],
    w_BTH: Float[Array, "B T H"],
    q_BTHK: Float[Array, "B T Q J"],
    k_BSGK: Float[Array, "B S G J"],
    query: Tokens,
    source: Tokens,
    *,
    scale: float,
    index_BTN: Int[Array, "B T N"] | None = None,
    top_k: int | None = None,
) -> IndexStatistics:
    """Σ_t KL(p_t ‖ softmax(I_t)) (DeepSeek-V3.2-Exp, eq. 3 and 4).

    p is the attention of (q, k), summed over heads and divided by its sum; no gradient passes through it. Without
    ``index_BTN`` both distributions are over every visible key (the warm-up), with it over the query's own slots.

    Args:
      index_q_BTHK, index_k_BSK, w_BTH: as in ``index_scores``; computed in float32.
      scale: of the attention's scores.
      top_k: without ``index_BTN``, also how much of p the ``top_k`` keys of the highest scores hold.
    """
    B, S, G, J = k_BSGK.shape
    heads, index_heads, index_width = q_BTHK.shape[2], *index_q_BTHK.shape[2:]
    q_BTHK, k_BSGK = jax.lax.stop_gradient((q_BTHK * jnp.asarray(scale, q_BTHK.dtype), k_BSGK))

    def block(index_q_BCHK, w_BCH, q_BCHK, query, index_BCN):
        if index_BCN is None:
            mask_BCN = visible(query, source)
            score_BCN = index_scores(index_q_BCHK, index_k_BSK, w_BCH)
        else:
            mask_BCN = (index_BCN < S) & (query.segment_BT > 0)[..., None]
            score_BCN = index_scores(index_q_BCHK, gather(index_k_BSK, index_BCN), w_BCH)
        keys = k_BSGK if index_BCN is None else gather(k_BSGK, index_BCN)
        attention_BCHN = masked_softmax(scores(q_BCHK, keys), mask_BCN[:, :, None])
        p_BCN = jax.lax.stop_gradient(jnp.where(mask_BCN, jnp.mean(attention_BCHN, axis=2), 0))
        score_BCN = jnp.where(mask_BCN, score_BCN, jnp.finfo(score_BCN.dtype).min)
        log_q_BCN = jax.nn.log_softmax(score_BCN, axis=-1)
        log_p_BCN = jnp.log(jnp.where(p_BCN > 0, p_BCN, 1))
        divergence_BC = jnp.sum(jnp.where(p_BCN > 0, p_BCN * (log_p_BCN - log_q_BCN), 0), axis=-1)
        if index_BCN is not None or top_k is None:
            return divergence_BC, None
        _, best_BCN = jax.lax.top_k(one_zero(jax.lax.stop_gradient(score_BCN)), min(top_k, S))
        return divergence_BC, jnp.sum(jnp.take_along_axis(p_BCN, best_BCN, axis=-1), axis=-1)

    if index_BTN is None:
        elements = S * max(heads, index_heads)
    else:
        elements = index_BTN.shape[-1] * max(heads, index_heads, G * J, index_width)
    arrays = (index_q_BTHK, w_BTH, q_BTHK, query, index_BTN)
    divergence_BT, captured_BT = map_queries(block, arrays, queries_per_block(B * elements))
    real_BT = query.segment_BT > 0
    total = lambda x_BT: jnp.sum(jnp.where(real_BT, x_BT, 0))  # noqa: E731
    queries = jnp.sum(real_BT, dtype=divergence_BT.dtype)
    return IndexStatistics(total(divergence_BT), queries, None if captured_BT is None else total(captured_BT))
