"""Keeping experts in use: balance losses, the loss-free bias, and what is reported every step.

Everything is a function of `RouterStatistics`, which holds **sums** over tokens. Sums add up exactly over
micro-batches, layers of a scan and devices (`merge`, ``jax.lax.psum``), and a loss taken from the total is the loss of
the whole batch (f over the global batch, arXiv 2501.11873), not a mean of losses of its parts. Fields may carry leading
axes (layers): every function works on the last axis and keeps the others.

Counts are int32, so that they are exact and the same in any order of summation: one expert may receive up to 2³¹ − 1
assignments a step; totals over experts are taken in float32 and don't overflow.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp

from research.axes import Array, Bool, Float, Int
from research.ops.routing.assignment import Assignment

NORMALISATIONS = ("per_choice", "per_token")


@typing.no_type_check  # jax rebuilds the class around things that are not arrays: specs, cotangents, sentinels
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "tokens",
        "counts_E",
        "first_counts_E",
        "dropped",
        "probability_E",
        "importance_E",
        "z",
        "entropy",
    ),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class RouterStatistics:
    """Sums over the tokens of a batch, padding left out.

    Attributes:
      tokens: int32, how many.
      counts_E: int32, assignments to each expert as the router chose them, before any capacity.
      first_counts_E: int32, the same for each token's first choice only (GShard).
      dropped: int32, assignments that capacity dropped.
      probability_E: router probabilities (scores normalised to sum 1 over experts).
      importance_E: weights of the assignments (Shazeer's importance).
      z: logsumexp(logits)².
      entropy: −Σ p log p of the router probabilities, nats.
    """

    tokens: Int[Array, "..."]
    counts_E: Int[Array, "... E"]
    first_counts_E: Int[Array, "... E"]
    dropped: Int[Array, "..."]
    probability_E: Float[Array, "... E"]
    importance_E: Float[Array, "... E"]
    z: Float[Array, "..."]
    entropy: Float[Array, "..."]

    @property
    def experts(self) -> int:
        return self.counts_E.shape[-1]


def merge(*statistics: RouterStatistics) -> RouterStatistics:
    """The statistics of several batches together."""
    return jax.tree.map(lambda *leaves: functools.reduce(jnp.add, leaves), *statistics)


def probabilities(scores_TE: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """Scores normalised to sum 1 over experts (sigmoid scores need it, a softmax doesn't mind)."""
    return scores_TE / jnp.maximum(scores_TE.sum(-1, keepdims=True), 1e-20)


def router_statistics(
    assignment: Assignment,
    mask_T: Bool[Array, "T"] | None = None,
    *,
    dropped: Int[Array, ""] | None = None,
) -> RouterStatistics:
    """Statistics of one batch. mask_T: False at padding tokens, as given to the router."""
    live_T = jnp.ones(assignment.tokens, bool) if mask_T is None else mask_T
    probability_TE = jnp.where(live_T[:, None], probabilities(assignment.scores_TE), 0)
    logits_TE = jnp.where(live_T[:, None], assignment.logits_TE, 0)
    z_T = jnp.where(live_T, jax.nn.logsumexp(logits_TE, axis=-1) ** 2, 0)
    # xlogy-like: p log p with a gradient of zero, not NaN, at p = 0.
    positive_TE = jnp.where(probability_TE > 0, probability_TE, 1)
    counts_E = assignment.counts_E()
    first_counts_E = counts_E
    if assignment.per_token is not None and assignment.per_token > 1:
        first_T = assignment.expert_A.reshape(assignment.tokens, assignment.per_token)[:, 0]
        first_counts_E = jnp.zeros(assignment.experts, jnp.int32).at[first_T].add(1, mode="drop")
    weight_A = assignment.weight_A
    return RouterStatistics(
        tokens=live_T.sum(dtype=jnp.int32),
        counts_E=counts_E,
        first_counts_E=first_counts_E,
        dropped=jnp.zeros((), jnp.int32) if dropped is None else dropped.astype(jnp.int32),
        probability_E=probability_TE.sum(0),
        importance_E=jnp.zeros(assignment.experts, weight_A.dtype).at[assignment.expert_A].add(weight_A, mode="drop"),
        z=z_T.sum(),
        entropy=-(positive_TE * jnp.log(positive_TE)).sum(),
    )


def _tokens(statistics):
    return jnp.maximum(statistics.tokens, 1).astype(statistics.probability_E.dtype)


def _fraction(counts_E, dtype):
    counts_E = counts_E.astype(dtype)
    return counts_E / jnp.maximum(counts_E.sum(-1, keepdims=True), 1)


def switch_loss(
    statistics: RouterStatistics, *, normalisation: str = "per_choice", first_choice: bool = False
) -> Float[Array, "..."]:
    """N·Σ f_i P_i (Switch Transformer eq. 4), without its coefficient; 1 at perfect balance.

    Args:
      normalisation: 'per_choice', f sums to 1 over experts (Megatron-Core, OLMo-core, MegaBlocks), or 'per_token', f
        sums to K (MaxText, flaxformer: K times stronger at the same coefficient).
      first_choice: f from each token's first choice only (GShard).
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation is {normalisation!r}, it must be one of {NORMALISATIONS}")
    tokens = _tokens(statistics)
    counts_E = statistics.first_counts_E if first_choice else statistics.counts_E
    fraction_E = _fraction(counts_E, tokens.dtype)
    if normalisation == "per_token":
        fraction_E = counts_E.astype(tokens.dtype) / tokens[..., None]
    return statistics.experts * (fraction_E * statistics.probability_E).sum(-1) / tokens


def z_loss(statistics: RouterStatistics) -> Float[Array, "..."]:
    """Mean of logsumexp(logits)² (ST-MoE eq. 5), without its coefficient."""
    return statistics.z / _tokens(statistics)


def update_bias(bias_E: Float[Array, "*L E"], counts_E: Int[Array, "*L E"], rate: float) -> Float[Array, "*L E"]:
    """DeepSeek-V3's loss-free balancing: b + rate·sign(mean(c) − c), once per optimizer step.

    counts_E are summed over the whole global batch. Keep the bias in float32: bfloat16's spacing near 1 is above
    the usual rate of 1e-3.
    """
    counts_E = counts_E.astype(jnp.promote_types(bias_E.dtype, jnp.float32))
    return (bias_E + rate * jnp.sign(counts_E.mean(-1, keepdims=True) - counts_E)).astype(bias_E.dtype)


def load(statistics: RouterStatistics) -> Float[Array, "... E"]:
    """Each expert's share of the assignments; sums to 1."""
    return _fraction(statistics.counts_E, statistics.probability_E.dtype)


def metrics(statistics: RouterStatistics) -> dict[str, Array]:
    """What is worth a line in the log.

    load (share of assignments, [..., E]), max_violation (busiest expert over the mean, minus 1), dead_experts (experts
    with no assignment), entropy (mean router entropy, nats) and dropped (share of assignments dropped).
    """
    load_E = load(statistics)
    total = jnp.maximum(statistics.counts_E.astype(load_E.dtype).sum(-1), 1)
    return {
        "load": load_E,
        "max_violation": load_E.max(-1) * statistics.experts - 1,
        "dead_experts": (statistics.counts_E == 0).sum(-1),
        "entropy": statistics.entropy / _tokens(statistics),
        "dropped": statistics.dropped / total,
    }
