"""Token-choice top-k routing: each token takes its K best experts."""

import dataclasses

import jax
import jax.numpy as jnp

from research.axes import Array, Bool, Float
from research.ops.routing.assignment import Assignment, from_choice, mask_logits, mask_scores

SCORES = ("softmax", "softmax_after", "sigmoid")


@dataclasses.dataclass(frozen=True)
class GroupLimit:
    """Device-limited routing: experts stand in `groups` equal groups and a token may use the best `top` of them.

    group_score is 'max' (DeepSeek-V2: a group is as good as its best expert) or 'top2' (DeepSeek-V3: the sum of its
    two best biased scores).
    """

    groups: int
    top: int
    group_score: str = "max"

    def __post_init__(self):
        if not 1 <= self.top <= self.groups:
            raise ValueError(f"top is {self.top}, it must be between 1 and groups = {self.groups}")
        if self.group_score not in ("max", "top2"):
            raise ValueError(f"group_score is {self.group_score!r}, it must be 'max' or 'top2'")


def scores_from_logits(logits_TE: Float[Array, "T E"], score: str) -> Float[Array, "T E"]:
    """Scores over all experts: probabilities, or independent sigmoids. For 'softmax_after' the full softmax, which
    balance losses read; the weights are a softmax over the chosen logits only."""
    if score not in SCORES:
        raise ValueError(f"score is {score!r}, it must be one of {SCORES}")
    return jax.nn.sigmoid(logits_TE) if score == "sigmoid" else jax.nn.softmax(logits_TE, axis=-1)


def limit_to_groups(
    selection_TE: Float[Array, "T E"], k: int, limit: GroupLimit, ranking_TE: Float[Array, "T E"] | None = None
) -> Float[Array, "T E"]:
    """−inf wherever an expert's group is not among its token's best groups, by ``ranking_TE`` or the selection itself."""
    tokens, experts = selection_TE.shape
    if experts % limit.groups:
        raise ValueError(f"groups is {limit.groups}, it must divide the {experts} experts")
    width = experts // limit.groups
    if k > limit.top * width:
        raise ValueError(f"k is {k}, but {limit.top} groups of {width} experts hold only {limit.top * width}")
    grouped_TGE = selection_TE.reshape(tokens, limit.groups, width)
    ranking_TGE = grouped_TGE if ranking_TE is None else ranking_TE.reshape(grouped_TGE.shape)
    best = 1 if limit.group_score == "max" else min(2, width)
    score_TG = jax.lax.top_k(ranking_TGE, best)[0].sum(-1)
    _, chosen_TM = jax.lax.top_k(score_TG, limit.top)
    allowed_TG = (chosen_TM[:, :, None] == jnp.arange(limit.groups)).any(1)
    return jnp.where(allowed_TG[:, :, None], grouped_TGE, -jnp.inf).reshape(tokens, experts)


def top_k(
    logits_TE: Float[Array, "T E"],
    k: int,
    *,
    score: str = "softmax",
    renormalise: bool = False,
    gated: bool = True,
    scale: float = 1.0,
    bias_E: Float[Array, "E"] | None = None,
    group_limit: GroupLimit | None = None,
    mask_T: Bool[Array, "T"] | None = None,
    weight_on: str = "output",
) -> Assignment:
    """Each token visits the k experts with the highest score (plus bias, for the choice only).

    Args:
      logits_TE: router logits; computed on in float32 whatever their dtype.
      k: experts per token, 1 ≤ k ≤ E. Ties go to the lower expert id.
      score: 'softmax' over all experts before the choice (Shazeer's successors, OLMoE, Qwen3), 'softmax_after' the
        choice, over the k chosen logits (Mixtral, GPT-OSS), or 'sigmoid' (DeepSeek-V3, Llama 4).
      renormalise: divide the weights by their sum over the token's choices (+1e-20).
      gated: False adds the experts' outputs up unweighted: every weight is `scale`, and the router gets no gradient
        through them.
      scale: factor on every weight (DeepSeek's routed scaling factor).
      bias_E: added to the scores for the selection only (DeepSeek-V3's loss-free balancing): weights are unbiased,
        and no gradient reaches it.
      group_limit: restrict each token to its best groups of experts.
      mask_T: False at padding tokens, which visit no expert.
      weight_on: see `Assignment`.

    Returns:
      An `Assignment` with A = T·k and per_token = k.
    """
    experts = logits_TE.shape[1]
    if not 1 <= k <= experts:
        raise ValueError(f"k is {k}, it must be between 1 and the {experts} experts")
    logits_TE = mask_logits(logits_TE, mask_T)
    scores_TE = mask_scores(scores_from_logits(logits_TE, score), mask_T)
    # Selecting by logits equals selecting by softmax and survives probabilities that underflow, but a bias is defined
    # on scores, and V3's group score is a sum of them.
    by_logits = score == "softmax_after" and bias_E is None
    selection_TE = jax.lax.stop_gradient(logits_TE if by_logits else scores_TE)
    if bias_E is not None:
        selection_TE = selection_TE + jax.lax.stop_gradient(bias_E).astype(selection_TE.dtype)
    if group_limit is not None:
        sums = by_logits and group_limit.group_score == "top2"
        ranking_TE = jax.lax.stop_gradient(scores_TE) if sums else None
        selection_TE = limit_to_groups(selection_TE, k, group_limit, ranking_TE)
    _, expert_TK = jax.lax.top_k(selection_TE, k)
    if not gated:
        weight_TK = jnp.ones_like(expert_TK, scores_TE.dtype)
    elif score == "softmax_after":
        weight_TK = jax.nn.softmax(jnp.take_along_axis(logits_TE, expert_TK, axis=1), axis=-1)
    else:
        weight_TK = jnp.take_along_axis(scores_TE, expert_TK, axis=1)
        if renormalise:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdims=True) + 1e-20)
    return from_choice(expert_TK, weight_TK * scale, scores_TE, logits_TE, mask_T=mask_T, weight_on=weight_on)
