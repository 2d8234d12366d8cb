"""Routing as a policy, trained by REINFORCE with a learned baseline (RL-R, Clark et al. 2022, arXiv 2202.01169)."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp

from research.axes import Array, Bool, Float
from research.ops.routing.assignment import Assignment, from_choice, mask_logits, mask_scores


def policy(
    logits_TE: Float[Array, "T E"],
    key: Array | None,
    *,
    gated: bool = False,
    mask_T: Bool[Array, "T"] | None = None,
) -> Assignment:
    """One expert per token, sampled from softmax(logits); the most likely one without a key (evaluation).

    gated: weight by the chosen expert's probability; otherwise weights are 1, and `policy_loss` is the router's only
    training signal.
    """
    logits_TE = mask_logits(logits_TE, mask_T)
    scores_TE = mask_scores(jax.nn.softmax(logits_TE, axis=-1), mask_T)
    frozen_TE = jax.lax.stop_gradient(logits_TE)
    expert_T = frozen_TE.argmax(-1) if key is None else jax.random.categorical(key, frozen_TE, axis=-1)
    weight_T1 = jnp.take_along_axis(scores_TE, expert_T[:, None], axis=1)
    weight_T1 = weight_T1 if gated else jnp.ones_like(weight_T1)
    return from_choice(expert_T[:, None], weight_T1, scores_TE, logits_TE, mask_T=mask_T)


@typing.no_type_check  # jax rebuilds the class around things that are not arrays
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("log_probability_T", "entropy_T", "baseline_T", "live_T"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class PolicyTerms:
    """What REINFORCE needs to remember of each token until its reward is known.

    Attributes:
      log_probability_T: log π of the choice; its gradient goes to the logits.
      entropy_T: H(π), nats.
      baseline_T: the learned prediction of the reward.
      live_T: False at padding.
    """

    log_probability_T: Float[Array, "*T"]
    entropy_T: Float[Array, "*T"]
    baseline_T: Float[Array, "*T"]
    live_T: Bool[Array, "*T"]


def policy_terms(
    assignment: Assignment, baseline_T: Float[Array, "T"], mask_T: Bool[Array, "T"] | None = None
) -> PolicyTerms:
    """The terms of one batch whose `assignment` came from `policy`."""
    if assignment.per_token != 1:
        raise ValueError(f"assignment has per_token = {assignment.per_token}, the policy's must be 1")
    live_T = assignment.expert_A < assignment.experts
    if mask_T is not None:
        live_T = live_T & mask_T
    log_TE = jax.nn.log_softmax(assignment.logits_TE, axis=-1)
    safe_T1 = jnp.minimum(assignment.expert_A, assignment.experts - 1)[:, None]
    return PolicyTerms(
        log_probability_T=jnp.take_along_axis(log_TE, safe_T1, axis=1)[:, 0],
        entropy_T=-(jnp.exp(log_TE) * log_TE).sum(-1),
        baseline_T=jnp.where(live_T, baseline_T, 0),
        live_T=live_T,
    )


def reinforce(
    terms: PolicyTerms, reward_T: Float[Array, "*T"], *, axis: int | tuple[int, ...] = -1
) -> dict[str, Array]:
    """Sums of the pieces of REINFORCE over the live tokens along `axis`; see `policy_loss`."""
    reward_T = jax.lax.stop_gradient(jnp.where(terms.live_T, reward_T, 0))
    advantage_T = reward_T - jax.lax.stop_gradient(terms.baseline_T)
    return {
        "policy": -jnp.where(terms.live_T, terms.log_probability_T * advantage_T, 0).sum(axis),
        "baseline": jnp.square(jnp.where(terms.live_T, terms.baseline_T - reward_T, 0)).sum(axis),
        "entropy": jnp.where(terms.live_T, terms.entropy_T, 0).sum(axis),
    }


def policy_loss(
    assignment: Assignment,
    reward_T: Float[Array, "T"],
    baseline_T: Float[Array, "T"],
    mask_T: Bool[Array, "T"] | None = None,
) -> dict[str, Array]:
    """Sums over live tokens of the pieces of REINFORCE; add them with coefficients, divided by the tokens.

    reward_T: minus the token's next-token loss; no gradient flows into it. baseline_T: the learned prediction of it.

    Returns:
      policy: −Σ log π(choice)·(reward − baseline), gradient to the logits only.
      baseline: Σ (baseline − reward)², gradient to the baseline only.
      entropy: Σ H(π), a bonus: subtract it.
    """
    return reinforce(policy_terms(assignment, baseline_T, mask_T), reward_T)
