"""Routers that balance by construction: expert choice, Sinkhorn (S-BASE), BASE's linear assignment."""

import jax
import jax.numpy as jnp

from research.axes import Array, Bool, Float, Int
from research.ops.routing.assignment import Assignment, from_choice, mask_logits, mask_scores
from research.ops.routing.token_choice import scores_from_logits, top_k


def expert_choice(
    logits_TE: Float[Array, "T E"],
    capacity: int,
    *,
    score: str = "softmax",
    mask_T: Bool[Array, "T"] | None = None,
    weight_on: str = "output",
) -> Assignment:
    """Each expert takes its `capacity` best tokens (Zhou et al. 2022): A = E·capacity, in order of experts.

    capacity is T·c/E for c experts per token on average. No balance loss is needed. In a causal model the choice of a
    token depends on later tokens of the batch: information leaks backwards in training, and decoding token by token
    routes differently.
    """
    tokens, experts = logits_TE.shape
    if not 1 <= capacity <= tokens:
        raise ValueError(f"capacity is {capacity}, it must be between 1 and the {tokens} tokens")
    logits_TE = mask_logits(logits_TE, mask_T)
    scores_TE = mask_scores(scores_from_logits(logits_TE, score), mask_T)
    ranking_TE = jax.lax.stop_gradient(scores_TE)
    live_T = jnp.ones(tokens, bool) if mask_T is None else mask_T
    _, token_EC = jax.lax.top_k(jnp.where(live_T[:, None], ranking_TE, -1).T, capacity)
    expert_EC = jnp.where(live_T[token_EC], jnp.arange(experts)[:, None], experts).astype(jnp.int32)
    weight_EC = jnp.take_along_axis(scores_TE.T, token_EC, axis=1)
    return Assignment(
        token_A=token_EC.reshape(-1).astype(jnp.int32),
        expert_A=expert_EC.reshape(-1),
        weight_A=jnp.where(expert_EC < experts, weight_EC, 0).reshape(-1),
        scores_TE=scores_TE,
        logits_TE=logits_TE,
        weight_on=weight_on,
    )


def sinkhorn_plan(
    logits_TE: Float[Array, "T E"], mask_T: Bool[Array, "T"] | None = None, *, iterations: int = 32
) -> Float[Array, "T E"]:
    """log of the entropic transport plan: exp(logits) scaled so that live tokens sum to 1 and experts to T/E.

    Alternates the two normalisations in log space, experts last, so that the balance is exact and the rows converge.
    """
    tokens, experts = logits_TE.shape
    live_T = jnp.ones(tokens, bool) if mask_T is None else mask_T
    log_share = jnp.log(jnp.maximum(live_T.sum(), 1).astype(logits_TE.dtype) / experts)

    def step(_, log_plan_TE):
        log_plan_TE = log_plan_TE - jax.nn.logsumexp(log_plan_TE, axis=1, keepdims=True)
        log_sum_E = jax.nn.logsumexp(log_plan_TE, axis=0, where=live_T[:, None])
        return log_plan_TE - jnp.where(jnp.isfinite(log_sum_E), log_sum_E, 0) + log_share

    return jax.lax.fori_loop(0, iterations, step, logits_TE)


def sinkhorn(
    logits_TE: Float[Array, "T E"],
    k: int = 1,
    *,
    gate: str = "softmax",
    balance: bool = True,
    iterations: int = 32,
    mask_T: Bool[Array, "T"] | None = None,
) -> Assignment:
    """Top-k of the Sinkhorn-normalised logits; the plan has no gradient, the gate has.

    gate: 'softmax' (S-BASE, Clark et al. 2022, with k = 1; Megatron-Core for k > 1) or 'sigmoid' (Megatron-Core for
    k = 1). balance=False is evaluation: plain top-k, so training and evaluation choose differently, by design.
    """
    if gate not in ("softmax", "sigmoid"):
        raise ValueError(f"gate is {gate!r}, it must be 'softmax' or 'sigmoid'")
    if not balance:
        return top_k(logits_TE, k, score=gate, mask_T=mask_T)
    logits_TE = mask_logits(logits_TE, mask_T)
    scores_TE = mask_scores(scores_from_logits(logits_TE, gate), mask_T)
    plan_TE = sinkhorn_plan(jax.lax.stop_gradient(logits_TE), mask_T, iterations=iterations)
    _, expert_TK = jax.lax.top_k(plan_TE, k)
    weight_TK = jnp.take_along_axis(scores_TE, expert_TK, axis=1)
    return from_choice(expert_TK, weight_TK, scores_TE, logits_TE, mask_T=mask_T)


def auction(
    values_TE: Float[Array, "T E"],
    capacity: int,
    mask_T: Bool[Array, "T"] | None = None,
    *,
    room: Int[Array, ""] | None = None,
    epsilon: float = 1e-3,
    max_rounds: int = 10_000,
) -> tuple[Int[Array, "T"], Int[Array, ""]]:
    """One expert per token, at most `capacity` tokens per expert, maximising the sum of values.

    Bertsekas' auction for transportation problems, in parallel rounds: every unassigned token bids for its best expert
    at current prices, the price it could bear (best − second best + epsilon above); every expert keeps its `capacity`
    highest bids, and once full its price is the lowest of them. The total is within T·epsilon of the optimum;
    `epsilon` is in the units of the values. Rounds are dense over tokens and experts: no queues, no host. Where an
    expert's room is known only at run time, `capacity` bounds it and `room` is what it is.

    Returns:
      expert_T (E for padding, and for tokens left over when max_rounds ends) and the rounds taken.
    """
    tokens, experts = values_TE.shape
    live_T = jnp.ones(tokens, bool) if mask_T is None else mask_T
    if experts * capacity < tokens and mask_T is None:
        raise ValueError(f"capacity is {capacity}, {experts} experts of it can't hold {tokens} tokens")
    if experts == 1:
        return jnp.where(live_T, 0, 1), jnp.zeros((), jnp.int32)
    width = min(capacity, tokens)
    room = jnp.asarray(capacity) if room is None else room

    def unassigned(state):
        expert_T, _, _, rounds = state
        return (live_T & (expert_T == experts)).any() & (rounds < max_rounds)

    def round_(state):
        expert_T, bid_T, price_E, rounds = state
        best_T2, choice_T2 = jax.lax.top_k(values_TE - price_E, 2)
        bids = live_T & (expert_T == experts)
        offer_T = price_E[choice_T2[:, 0]] + best_T2[:, 0] - best_T2[:, 1] + epsilon
        expert_T = jnp.where(bids, choice_T2[:, 0], expert_T)
        bid_T = jnp.where(bids, offer_T, bid_T)
        bid_TE = jnp.where(expert_T[:, None] == jnp.arange(experts), bid_T[:, None], -jnp.inf)
        best_EC, token_EC = jax.lax.top_k(bid_TE.T, width)
        kept_EC = jnp.isfinite(best_EC) & (jnp.arange(width) < room)
        expert_T = jnp.full(tokens, experts).at[jnp.where(kept_EC, token_EC, tokens)].set(
            jnp.broadcast_to(jnp.arange(experts)[:, None], token_EC.shape), mode="drop"
        )  # fmt: skip
        full_E, lowest_E = kept_EC.sum(1) == room, best_EC[:, jnp.clip(room - 1, 0, width - 1)]
        return expert_T, bid_T, jnp.where(full_E, lowest_E, price_E), rounds + 1

    start = (
        jnp.full(tokens, experts),
        jnp.zeros(tokens, values_TE.dtype),
        jnp.zeros(experts, values_TE.dtype),
        jnp.zeros((), jnp.int32),
    )
    expert_T, _, _, rounds = jax.lax.while_loop(unassigned, round_, start)
    return expert_T, rounds


def base(
    logits_TE: Float[Array, "T E"],
    *,
    balance: bool = True,
    epsilon: float = 1e-3,
    max_rounds: int = 10_000,
    mask_T: Bool[Array, "T"] | None = None,
) -> Assignment:
    """BASE layers (Lewis et al. 2021): the balanced assignment that maximises Σ logits, gated by σ(logit).

    Experts receive at most ceil(T/E) tokens, of the T that are no padding. Those that the auction has not placed after
    max_rounds visit no expert. balance=False is evaluation: greedy top-1.
    """
    if not balance:
        return top_k(logits_TE, 1, score="sigmoid", mask_T=mask_T)
    tokens, experts = logits_TE.shape
    logits_TE = mask_logits(logits_TE, mask_T)
    scores_TE = mask_scores(jax.nn.sigmoid(logits_TE), mask_T)
    room = None if mask_T is None else -(-mask_T.sum(dtype=jnp.int32) // experts)
    values_TE, options = jax.lax.stop_gradient(logits_TE), {"epsilon": epsilon, "max_rounds": max_rounds}
    expert_T, _ = auction(values_TE, -(-tokens // experts), mask_T, room=room, **options)
    safe_T1 = jnp.minimum(expert_T, experts - 1)[:, None]
    weight_T1 = jnp.take_along_axis(scores_TE, safe_T1, axis=1)
    return from_choice(expert_T[:, None], weight_T1, scores_TE, logits_TE, mask_T=mask_T)
