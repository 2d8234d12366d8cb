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
import math
import typing

import jax
import jax.numpy as jnp

from research.axes import Array, Bool, Float, Int
from research.ops.routing.assignment import Assignment
from research.ops.routing.reinforce import PolicyTerms

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
        "smooth_load_E",
        "visits_G",
        "z",
        "entropy",
        "sequence_loss",
        "sequences",
        "margins_EQ",
        "policy",
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
      smooth_load_E: probability of being chosen under fresh noise (`noisy_top_k`); the counts where there is none.
      visits_G: int32, tokens with at least one assignment in each group of experts (a device, a host).
      z: logsumexp(logits)².
      entropy: −Σ p log p of the router probabilities, nats.
      sequence_loss: the sequence-wise balance loss, summed over sequences.
      sequences: int32, how many of them had a token.
      margins_EQ: int32, what `quantile_bias_from_margins` reads; None where the router isn't balanced so.
      policy: of a router trained by REINFORCE, the `PolicyTerms` of each token until the rewards are known, then the
        sums that `routing.reinforce` returns; else None.
    """

    tokens: Int[Array, "..."]
    counts_E: Int[Array, "... E"]
    first_counts_E: Int[Array, "... E"]
    dropped: Int[Array, "..."]
    probability_E: Float[Array, "... E"]
    importance_E: Float[Array, "... E"]
    smooth_load_E: Float[Array, "... E"]
    visits_G: Int[Array, "... G"]
    z: Float[Array, "..."]
    entropy: Float[Array, "..."]
    sequence_loss: Float[Array, "..."]
    sequences: Int[Array, "..."]
    margins_EQ: Int[Array, "... E Q"] | None = None
    policy: PolicyTerms | dict[str, Array] | None = None

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
    smooth_load_TE: Float[Array, "T E"] | None = None,
    groups: int = 1,
    sequences: int | None = None,
) -> RouterStatistics:
    """Statistics of one batch, before capacity drops anything.

    Args:
      assignment: the router's.
      mask_T: False at padding tokens, as given to the router.
      dropped: what `limit_capacity` counted.
      smooth_load_TE: what `noisy_top_k` returned.
      groups: equal groups of experts, for the device and communication losses.
      sequences: rows the tokens came from, T = sequences · length, for the sequence-wise loss; None leaves it out.

    Raises:
      ValueError: groups that don't divide the experts, sequences that don't divide the tokens.
    """
    experts = assignment.experts
    if groups < 1 or experts % groups:
        raise ValueError(f"groups is {groups}, it must divide the {experts} experts")
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
    sequence_loss, sequences_seen = jnp.zeros_like(z_T[0]), jnp.zeros((), jnp.int32)
    if sequences is not None:
        sequence_loss, sequences_seen = _sequence_loss(assignment, probability_TE, live_T, sequences)
    group_A = assignment.expert_A // (experts // groups)
    if assignment.per_token is not None:
        visited_TG = (group_A.reshape(assignment.tokens, -1, 1) == jnp.arange(groups)).any(1)
    else:
        visited_TG = jnp.zeros((assignment.tokens, groups), bool)
        visited_TG = visited_TG.at[assignment.token_A, group_A].max(True, mode="drop")
    return RouterStatistics(
        tokens=live_T.sum(dtype=jnp.int32),
        counts_E=counts_E,
        first_counts_E=first_counts_E,
        dropped=jnp.zeros((), jnp.int32) if dropped is None else dropped.astype(jnp.int32),
        probability_E=probability_TE.sum(0),
        importance_E=jnp.zeros(assignment.experts, weight_A.dtype).at[assignment.expert_A].add(weight_A, mode="drop"),
        smooth_load_E=counts_E.astype(z_T.dtype) if smooth_load_TE is None else smooth_load_TE.sum(0),
        visits_G=visited_TG.sum(0, dtype=jnp.int32),
        z=z_T.sum(),
        entropy=-(positive_TE * jnp.log(positive_TE)).sum(),
        sequence_loss=sequence_loss,
        sequences=sequences_seen,
    )


def _sequence_loss(assignment, probability_TE, live_T, sequences):
    """Σ over sequences of Σ_i f_i P_i (DeepSeek-V3 eqs. 17-20): f from the K best **unbiased** scores."""
    tokens, experts = probability_TE.shape
    if sequences < 1 or tokens % sequences:
        raise ValueError(f"sequences is {sequences}, it must divide the {tokens} tokens")
    if assignment.per_token is None:
        raise ValueError("sequences is given, but the assignment has no choices per token (expert choice)")
    _, best_TK = jax.lax.top_k(jax.lax.stop_gradient(assignment.scores_TE), assignment.per_token)
    chosen_TE = (best_TK[:, :, None] == jnp.arange(experts)).any(1) & live_T[:, None]
    length_B = live_T.reshape(sequences, -1).sum(1)
    share_BE = chosen_TE.reshape(sequences, -1, experts).sum(1) * experts / assignment.per_token
    probability_BE = probability_TE.reshape(sequences, -1, experts).sum(1)
    length_B1 = jnp.maximum(length_B, 1)[:, None].astype(probability_BE.dtype)
    loss_B = (share_BE / length_B1 * (probability_BE / length_B1)).sum(-1)
    return loss_B.sum(), (length_B > 0).sum(dtype=jnp.int32)


def token_count(statistics: RouterStatistics) -> Float[Array, "..."]:
    """Tokens as a divisor: at least 1, in the dtype of the sums."""
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
    tokens = token_count(statistics)
    counts_E = statistics.first_counts_E if first_choice else statistics.counts_E
    fraction_E = _fraction(counts_E, tokens.dtype)
    if normalisation == "per_token":
        fraction_E = counts_E.astype(tokens.dtype) / tokens[..., None]
    return statistics.experts * (fraction_E * statistics.probability_E).sum(-1) / tokens


def device_loss(statistics: RouterStatistics, groups: int) -> Float[Array, "..."]:
    """Σ_d f'_d P'_d (DeepSeekMoE eqs. 15-17), without its coefficient: f' the mean of f = N·c/(K·T) over the experts of
    group d, P' their summed probability. The expert-level loss of the same paper is `switch_loss`."""
    fraction_E = _fraction(statistics.counts_E, statistics.probability_E.dtype) * statistics.experts
    fraction_G = _by_group(fraction_E, groups).mean(-1)
    probability_G = _by_group(statistics.probability_E, groups).sum(-1) / token_count(statistics)[..., None]
    return (fraction_G * probability_G).sum(-1)


def communication_loss(statistics: RouterStatistics, top_groups: int) -> Float[Array, "..."]:
    """Σ_d f''_d P''_d (DeepSeek-V2 eqs. 29-31), without its coefficient: f'' = D/(M·T)·(tokens sent to group d).

    Groups are those `router_statistics` counted; top_groups is M, how many a token may visit.
    """
    groups = statistics.visits_G.shape[-1]
    tokens = token_count(statistics)[..., None]
    sent_G = statistics.visits_G.astype(tokens.dtype) * groups / (top_groups * tokens)
    return (sent_G * (_by_group(statistics.probability_E, groups).sum(-1) / tokens)).sum(-1)


def _by_group(values_E, groups):
    experts = values_E.shape[-1]
    if groups < 1 or experts % groups:
        raise ValueError(f"groups is {groups}, it must divide the {experts} experts")
    return values_E.reshape(*values_E.shape[:-1], groups, experts // groups)


def sequence_loss(statistics: RouterStatistics) -> Float[Array, "..."]:
    """DeepSeek-V3's sequence-wise balance loss, the mean over sequences, without its coefficient."""
    return statistics.sequence_loss / jnp.maximum(statistics.sequences, 1)


def importance_loss(statistics: RouterStatistics, *, of: str = "weights") -> Float[Array, "..."]:
    """CV² of each expert's importance, without its coefficient.

    of: 'weights', the summed weights of what was chosen (Shazeer et al. 2017 eq. 7), which says nothing to an expert
    that nobody visits; or 'probabilities', summed over all experts (V-MoE, Riquelme et al. 2021, arXiv 2106.05974).
    """
    if of not in ("weights", "probabilities"):
        raise ValueError(f"of is {of!r}, it must be 'weights' or 'probabilities'")
    return _squared_variation(statistics.importance_E if of == "weights" else statistics.probability_E)


def load_loss(statistics: RouterStatistics) -> Float[Array, "..."]:
    """CV² of the smooth load per expert (Shazeer et al. 2017 eq. 11), without its coefficient."""
    return _squared_variation(statistics.smooth_load_E)


def _squared_variation(values_E):
    mean_1 = values_E.mean(-1, keepdims=True)
    return jnp.square(values_E / jnp.where(mean_1 > 0, mean_1, 1) - 1).mean(-1)


def z_loss(statistics: RouterStatistics) -> Float[Array, "..."]:
    """Mean of logsumexp(logits)² (ST-MoE eq. 5), without its coefficient."""
    return statistics.z / token_count(statistics)


def update_bias(bias_E: Float[Array, "*L E"], counts_E: Int[Array, "*L E"], rate: float) -> Float[Array, "*L E"]:
    """DeepSeek-V3's loss-free balancing: b + rate·sign(mean(c) − c), once per optimizer step.

    counts_E are summed over the whole global batch. Keep the bias in float32: bfloat16's spacing near 1 is above
    the usual rate of 1e-3.
    """
    counts_E = counts_E.astype(jnp.promote_types(bias_E.dtype, jnp.float32))
    return (bias_E + rate * jnp.sign(counts_E.mean(-1, keepdims=True) - counts_E)).astype(bias_E.dtype)


def quantile_bias(
    scores_TE: Float[Array, "T E"],
    bias_E: Float[Array, "E"],
    k: int,
    *,
    mask_T: Bool[Array, "T"] | None = None,
) -> Float[Array, "E"]:
    """Quantile balancing: the bias that would have let each expert win its share K/N of these tokens. No coefficient.

    α_t is the (1 − K/N)-quantile over experts of s + b, each token's price of admission; the new b_i is minus the
    (1 − K/N)-quantile over tokens of s_i − α_t.
    """
    experts = scores_TE.shape[1]
    if not 1 <= k < experts:
        raise ValueError(f"k is {k}, it must be at least 1 and below the {experts} experts")
    level = 1 - k / experts
    scores_TE = jax.lax.stop_gradient(scores_TE)
    price_T = jnp.quantile(scores_TE + bias_E, level, axis=1)
    margin_TE = scores_TE - price_T[:, None]
    if mask_T is not None:
        margin_TE = jnp.where(mask_T[:, None], margin_TE, jnp.nan)
        return jnp.nan_to_num(-jnp.nanquantile(margin_TE, level, axis=0)).astype(bias_E.dtype)
    return -jnp.quantile(margin_TE, level, axis=0).astype(bias_E.dtype)


# Margins are counted on a grid that is logarithmic on both sides of zero: scores of many experts are small.
_FINEST, _WIDEST = 1e-6, 4.0


def _to_grid(margin, bins):
    place = jnp.sign(margin) * jnp.log1p(jnp.abs(margin) / _FINEST) / math.log1p(_WIDEST / _FINEST)
    return (place + 1) / 2 * bins


def _from_grid(place, bins):
    place = place / bins * 2 - 1
    return jnp.sign(place) * _FINEST * jnp.expm1(jnp.abs(place) * math.log1p(_WIDEST / _FINEST))


def quantile_margins(
    scores_TE: Float[Array, "T E"],
    bias_E: Float[Array, "E"],
    k: int,
    *,
    bins: int = 1024,
    mask_T: Bool[Array, "T"] | None = None,
) -> Int[Array, "E Q"]:
    """Each expert's histogram of s_i − α_t (see `quantile_bias`): counts, so that they add up over micro-batches and
    devices, where quantiles don't."""
    experts = scores_TE.shape[1]
    if not 1 <= k < experts:
        raise ValueError(f"k is {k}, it must be at least 1 and below the {experts} experts")
    scores_TE = jax.lax.stop_gradient(scores_TE)
    margin_TE = scores_TE - jnp.quantile(scores_TE + bias_E, 1 - k / experts, axis=1)[:, None]
    bin_TE = jnp.clip(_to_grid(margin_TE, bins).astype(jnp.int32), 0, bins - 1)
    if mask_T is not None:
        bin_TE = jnp.where(mask_T[:, None], bin_TE, bins)
    return jnp.zeros((experts, bins), jnp.int32).at[jnp.arange(experts), bin_TE].add(1, mode="drop")


def quantile_bias_from_margins(margins_EQ: Int[Array, "*L E Q"], k: int) -> Float[Array, "*L E"]:
    """`quantile_bias` of the whole batch, from the sums of `quantile_margins`; within 1.5 % of each bias, or 1e-6.

    Experts that saw no token keep a bias of 0.
    """
    experts, bins = margins_EQ.shape[-2:]
    up_to_EQ = jnp.cumsum(margins_EQ, axis=-1)
    rank_E1 = (1 - k / experts) * up_to_EQ[..., -1:].astype(jnp.float32)
    bin_E1 = jnp.minimum((up_to_EQ < rank_E1).sum(-1, keepdims=True), bins - 1)
    inside_E1 = jnp.take_along_axis(margins_EQ, bin_E1, axis=-1)
    before_E1 = jnp.take_along_axis(up_to_EQ, bin_E1, axis=-1) - inside_E1
    part_E1 = jnp.clip((rank_E1 - before_E1) / jnp.maximum(inside_E1, 1), 0, 1)
    quantile_E1 = _from_grid(bin_E1 + part_E1, bins)
    return jnp.where(up_to_EQ[..., -1] > 0, -quantile_E1[..., 0], 0)


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
        "entropy": statistics.entropy / token_count(statistics),
        "dropped": statistics.dropped / total,
    }
