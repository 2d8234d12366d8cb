"""Learned chunking (H-Net; Hwang, Wang & Gu 2025, arXiv 2507.07955): where chunks begin, and the way there and back.

Every shape is static: chunks are moved to the front of their row and the rest is padding. A token depends on tokens before
it alone. Id 0 is padding, documents are packed, as for ``linear_attention``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.axes import Array, Bool, Float, Int
from research.ops.linear_attention import linear_attention
from research.ops.segments import real_and_reset


class Routing(NamedTuple):
    """How surely a chunk begins at each token, and whether it does (p > 1/2); both nothing at padding."""

    probability_BT: Float[Array, "B T"]
    boundary_BT: Bool[Array, "B T"]


class ChunkStatistics(NamedTuple):
    """Sums over the real tokens of a batch: how many, how many begin a chunk, and their probabilities; float32 or wider."""

    tokens: Float[Array, "..."]
    boundaries: Float[Array, "..."]
    probability: Float[Array, "..."]


def route(
    q_BTK: Float[Array, "B T K"],
    k_BTK: Float[Array, "B T K"],
    segment_ids_BT: Int[Array, "B T"] | None = None,
    *,
    last_q_BK: Float[Array, "B K"] | None = None,
    continues_B: Bool[Array, " B"] | None = None,
) -> tuple[Routing, Float[Array, "B K"]]:
    """``p_t = (1 − cos(q_{t−1}, k_t)) / 2`` with the real token of the document before t (eq. 4); 1 at its first.

    Args:
      last_q_BK, continues_B: the query of each row's last real token before this call, and whether there is one.

    Returns:
      the routing (probabilities float32 or wider), and ``last_q_BK`` after the call.
    """
    B, T, K = q_BTK.shape
    ids_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
    real_BT, reset_BT = real_and_reset(ids_BT)
    latest_BT = jax.lax.cummax(jnp.where(real_BT, jnp.arange(T, dtype=jnp.int32), -1), axis=1)
    before_BT = jnp.pad(latest_BT[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
    last_q_BK = jnp.zeros((B, K), q_BTK.dtype) if last_q_BK is None else last_q_BK.astype(q_BTK.dtype)
    q_BTK, k_BTK = (jnp.where(real_BT[..., None], x, 0) for x in (q_BTK, k_BTK))
    row_BSK = jnp.concatenate([last_q_BK[:, None], q_BTK], axis=1)
    previous_BTK = jnp.take_along_axis(row_BSK, before_BT[..., None] + 1, axis=1)
    wide = jnp.promote_types(q_BTK.dtype, jnp.float32)
    cosine_BT = jnp.sum(_unit(previous_BTK.astype(wide)) * _unit(k_BTK.astype(wide)), axis=-1)
    starts_B1 = True if continues_B is None else ~continues_B[:, None]
    first_BT = reset_BT | ((before_BT < 0) & starts_B1)
    probability_BT = jnp.where(first_BT, 1, jnp.clip((1 - cosine_BT) / 2, 0, 1))
    probability_BT = jnp.where(real_BT, probability_BT, 0)
    last_q_BK = jnp.take_along_axis(row_BSK, latest_BT[:, -1:, None] + 1, axis=1)[:, 0]
    return Routing(probability_BT, probability_BT > 0.5), last_q_BK


def gather_chunks(
    x_BTD: Float[Array, "B T D"],
    routing: Routing,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    *,
    slots: int,
) -> tuple[Float[Array, "B M D"], Float[Array, "B M"], Int[Array, "B M"]]:
    """The tokens at which chunks begin (eq. 5), one a chunk: (x, p, document of each, 0 where there is none).

    Args:
      slots: M. What begins after the first M chunks of a row begins none: its tokens stay in the last of them.
    """
    order_BM = jnp.argsort(~routing.boundary_BT, axis=1, stable=True)[:, :slots]
    taken_BM = jnp.take_along_axis(routing.boundary_BT, order_BM, axis=1)
    ids_BM = taken_BM.astype(jnp.int32)
    if segment_ids_BT is not None:
        ids_BM = jnp.where(taken_BM, jnp.take_along_axis(segment_ids_BT, order_BM, axis=1), 0)
    x_BMD = jnp.where(taken_BM[..., None], jnp.take_along_axis(x_BTD, order_BM[..., None], axis=1), 0)
    return x_BMD, jnp.take_along_axis(routing.probability_BT, order_BM, axis=1), ids_BM


def spread_chunks(
    h_BMD: Float[Array, "B M D"],
    probability_BM: Float[Array, "B M"],
    ids_BM: Int[Array, "B M"],
    routing: Routing,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    *,
    last_BD: Float[Array, "B D"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """Chunks back to tokens: ``z_j = P_j h_j + (1 − P_j) z_{j−1}`` over the chunks of a document (eq. 6 and 8; P within 1e-4 of
    0 and 1), and z of its own chunk at every token; with it the last z of each row (``last_BD`` after the call). A document
    that begins after the last slot has no chunk: 0 at its tokens.

    The gradient of a token's merged output reaches its p through ``straight_through``.
    """
    B, M, D = h_BMD.shape
    wide = jnp.promote_types(h_BMD.dtype, jnp.float32)
    P_BM = jnp.clip(probability_BM.astype(wide), 1e-4, 1 - 1e-4)
    write_BM1D = (P_BM[..., None] * h_BMD.astype(wide))[:, :, None]
    one_BM11 = jnp.ones((B, M, 1, 1), wide)
    state_B11D = None if last_BD is None else last_BD.astype(wide)[:, None, None]
    z_BM1D, state_B11D = linear_attention(
        one_BM11,
        one_BM11,
        write_BM1D,
        log_decay=jnp.log1p(-P_BM)[..., None],
        initial_state=state_B11D,
        segment_ids=ids_BM,
    )
    before_B1D = jnp.zeros((B, 1, D), wide) if last_BD is None else last_BD.astype(wide)[:, None]
    row_BSD = jnp.concatenate([before_B1D, z_BM1D[:, :, 0]], axis=1)
    chunk_BT = jnp.minimum(jnp.cumsum(routing.boundary_BT, axis=1, dtype=jnp.int32), M)
    z_BTD = jnp.take_along_axis(row_BSD, chunk_BT[..., None], axis=1)
    if segment_ids_BT is not None:
        document_BT = jnp.take_along_axis(ids_BM, jnp.maximum(chunk_BT - 1, 0), axis=1)
        z_BTD = jnp.where(((chunk_BT > 0) & (document_BT != segment_ids_BT))[..., None], 0, z_BTD)
    return z_BTD.astype(h_BMD.dtype), state_B11D[:, 0, 0]


def straight_through(routing: Routing) -> Float[Array, "B T"]:
    """1 at every token; its gradient is that of max(p, 1 − p), the confidence in what was chosen (eq. 7)."""
    sure_BT = jnp.maximum(routing.probability_BT, 1 - routing.probability_BT)
    return sure_BT + jax.lax.stop_gradient(1 - sure_BT)


def chunk_statistics(routing: Routing, segment_ids_BT: Int[Array, "B T"] | None = None) -> ChunkStatistics:
    """Sums over one batch."""
    wide = routing.probability_BT.dtype
    real_BT = jnp.ones_like(routing.boundary_BT) if segment_ids_BT is None else segment_ids_BT > 0
    return ChunkStatistics(*(jnp.sum(x, dtype=wide) for x in (real_BT, routing.boundary_BT, routing.probability_BT)))


def ratio_loss(statistics: ChunkStatistics, ratio: float) -> Float[Array, ""]:
    """``N/(N−1) · ((N−1) F G + (1 − F)(1 − G))`` (eq. 10), F and G the mean boundary and probability: 1 at F = G = 1/N."""
    tokens = jnp.maximum(statistics.tokens, 1)
    F, G = statistics.boundaries / tokens, statistics.probability / tokens
    return ratio / (ratio - 1) * ((ratio - 1) * F * G + (1 - F) * (1 - G))


def _unit(x):
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
