"""Routing under noise: input jitter, noisy top-k, GShard's second expert, a purely random router.

All randomness comes from explicit keys; without a key a router is deterministic, as evaluation wants it. The mismatch
is real: a router trained under noise meets at evaluation scores it was never corrected on, and experts that only noise
reached go unused.
"""

import jax
import jax.numpy as jnp

from research.axes import Array, Bool, Float
from research.ops.routing.assignment import Assignment, from_choice, mask_logits, mask_scores
from research.ops.routing.token_choice import top_k


def jitter(x_TD: Float[Array, "T D"], key: Array | None, epsilon: float = 1e-2) -> Float[Array, "T D"]:
    """Router **inputs** times U(1 ± epsilon) (Switch Transformer). Unchanged without a key."""
    if key is None:
        return x_TD
    return x_TD * jax.random.uniform(key, x_TD.shape, x_TD.dtype, 1 - epsilon, 1 + epsilon)


def noisy_top_k(
    logits_TE: Float[Array, "T E"],
    k: int,
    key: Array | None,
    *,
    noise_logits_TE: Float[Array, "T E"] | None = None,
    sigma: float | None = None,
    score: str = "softmax_after",
    mask_T: Bool[Array, "T"] | None = None,
    weight_on: str = "output",
) -> tuple[Assignment, Float[Array, "T E"] | None]:
    """Noisy top-k gating (Shazeer et al. 2017, eqs. 3-5): softmax over the k largest of logits + noise.

    Args:
      logits_TE: clean logits; `Assignment.logits_TE` keeps them.
      key: None routes on the clean logits (evaluation).
      noise_logits_TE: learned noise; its standard deviation is softplus of this (Shazeer).
      sigma: a fixed standard deviation instead (V-MoE uses 1/E).
      score: weights are a softmax over the chosen noisy logits ('softmax_after', Shazeer), or over all of them, not
        renormalised ('softmax', V-MoE).

    Returns:
      The assignment and its smooth load ``P[t, e]``, the probability that fresh noise on expert e alone would choose
      it (Shazeer eq. 9), for `router_statistics`; None without a key or for k = E.
    """
    if (noise_logits_TE is None) == (sigma is None):
        raise ValueError("give either noise_logits_TE or sigma, the standard deviation of the noise")
    clean_TE = mask_logits(logits_TE, mask_T)
    if key is None:
        return top_k(clean_TE, k, score=score, mask_T=mask_T, weight_on=weight_on), None
    if sigma is None:
        deviation_TE = jax.nn.softplus(mask_logits(noise_logits_TE, mask_T))
    else:
        deviation_TE = jnp.full_like(clean_TE, sigma)
    noisy_TE = clean_TE + jax.random.normal(key, clean_TE.shape, clean_TE.dtype) * deviation_TE
    noisy = top_k(noisy_TE, k, score=score, mask_T=mask_T, weight_on=weight_on)
    expert_TK = noisy.expert_A.reshape(-1, k)
    assignment = from_choice(
        expert_TK, noisy.weight_A.reshape(-1, k), noisy.scores_TE, clean_TE, mask_T=mask_T, weight_on=weight_on
    )
    smooth_load_TE = None
    if k < logits_TE.shape[1]:
        # The threshold expert e has to pass is the k-th largest among the others: the (k+1)-th of all for those
        # already chosen, the k-th for the rest.
        best_TK = jax.lax.top_k(noisy_TE, k + 1)[0]
        chosen_TE = noisy_TE > best_TK[:, k:]
        threshold_TE = jnp.where(chosen_TE, best_TK[:, k:], best_TK[:, k - 1 : k])
        smooth_load_TE = mask_scores(jax.scipy.stats.norm.cdf((clean_TE - threshold_TE) / deviation_TE), mask_T)
    return assignment, smooth_load_TE


def gshard_top2(
    logits_TE: Float[Array, "T E"],
    key: Array | None,
    *,
    second: str = "threshold",
    mask_T: Bool[Array, "T"] | None = None,
) -> Assignment:
    """GShard's two experts (Lepikhin et al. 2021, algorithm 1): weights g1, g2 renormalised to sum 1.

    second: 'threshold', the runner-up, kept with probability min(1, 2·g2); or 'sample', drawn from the remainder in
    proportion to its probabilities. Without a key the runner-up is always kept.

    The balance loss takes f from first choices: ``switch_loss(statistics, first_choice=True)``.
    """
    if second not in ("threshold", "sample"):
        raise ValueError(f"second is {second!r}, it must be 'threshold' or 'sample'")
    if logits_TE.shape[1] < 2:
        raise ValueError(f"logits_TE has {logits_TE.shape[1]} experts, top-2 routing needs at least 2")
    logits_TE = mask_logits(logits_TE, mask_T)
    scores_TE = mask_scores(jax.nn.softmax(logits_TE, axis=-1), mask_T)
    experts = logits_TE.shape[1]
    _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(logits_TE), 2)
    if key is not None and second == "sample":
        rest_TE = jnp.where(jnp.arange(experts) == expert_TK[:, :1], -jnp.inf, jax.lax.stop_gradient(logits_TE))
        expert_TK = expert_TK.at[:, 1].set(jax.random.categorical(key, rest_TE, axis=-1).astype(expert_TK.dtype))
    weight_TK = jnp.take_along_axis(scores_TE, expert_TK, axis=1)
    weight_TK = weight_TK / (weight_TK.sum(-1, keepdims=True) + 1e-20)
    if key is not None and second == "threshold":
        kept_T = jax.random.uniform(key, weight_TK.shape[:1], weight_TK.dtype) < 2 * weight_TK[:, 1]
        expert_TK = expert_TK.at[:, 1].set(jnp.where(kept_T, expert_TK[:, 1], experts))
    return from_choice(expert_TK, weight_TK, scores_TE, logits_TE, mask_T=mask_T)


def uniform(key: Array, tokens: int, experts: int, k: int, *, mask_T: Bool[Array, "T"] | None = None) -> Assignment:
    """A control: k distinct experts drawn at random, weights 1/k, nothing learned. A fixed key makes it repeatable."""
    if not 1 <= k <= experts:
        raise ValueError(f"k is {k}, it must be between 1 and the {experts} experts")
    _, expert_TK = jax.lax.top_k(jax.random.uniform(key, (tokens, experts)), k)
    zeros_TE = jnp.zeros((tokens, experts), jnp.float32)
    scores_TE = mask_scores(zeros_TE + 1 / experts, mask_T)
    return from_choice(expert_TK, jnp.full((tokens, k), 1 / k, jnp.float32), scores_TE, zeros_TE, mask_T=mask_T)
