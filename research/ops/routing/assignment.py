"""What every router returns, and what dispatch, balancing and expert parallelism take."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp

from research.axes import Array, Bool, Float, Int


@typing.no_type_check  # jax rebuilds the class around things that are not arrays: specs, cotangents, sentinels
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("token_A", "expert_A", "weight_A", "scores_TE", "logits_TE"),
    meta_fields=("weight_on", "per_token"),
)
@dataclasses.dataclass(frozen=True)
class Assignment:
    """A flat list of "this token visits this expert, with this weight".

    Attributes:
      token_A: token of each assignment, in [0, T).
      expert_A: its expert, in [0, E); the id E means none (padding, or a choice that was dropped).
      weight_A: float32 weight; 0 where the expert is none.
      scores_TE: the router's scores, float32, zero at padding tokens. Balance losses read them.
      logits_TE: the logits before any bias or noise, float32, zero at padding tokens. The z-loss reads them.
      weight_on: 'output' (the expert's output is weighted) or 'input' (its input is: Llama 4).
      per_token: K when assignment a is choice a % K of token a // K, so that combining is a reshape; None when
        assignments stand in another order (expert choice).
    """

    token_A: Int[Array, "A"]
    expert_A: Int[Array, "A"]
    weight_A: Float[Array, "A"]
    scores_TE: Float[Array, "T E"]
    logits_TE: Float[Array, "T E"]
    weight_on: str = "output"
    per_token: int | None = None

    @property
    def tokens(self) -> int:
        return self.scores_TE.shape[0]

    @property
    def experts(self) -> int:
        return self.scores_TE.shape[1]

    def counts_E(self) -> Int[Array, "E"]:
        """Assignments to each expert, int32."""
        return jnp.zeros(self.experts, jnp.int32).at[self.expert_A].add(1, mode="drop")


def from_choice(
    expert_TK: Int[Array, "T K"],
    weight_TK: Float[Array, "T K"],
    scores_TE: Float[Array, "T E"],
    logits_TE: Float[Array, "T E"],
    *,
    mask_T: Bool[Array, "T"] | None = None,
    weight_on: str = "output",
) -> Assignment:
    """The assignment in which token t visits the experts ``expert_TK[t]``. Tokens outside the mask visit none."""
    if weight_on not in ("output", "input"):
        raise ValueError(f"weight_on is {weight_on!r}, it must be 'output' or 'input'")
    tokens, experts = scores_TE.shape
    width = expert_TK.shape[1]
    if mask_T is not None:
        expert_TK = jnp.where(mask_T[:, None], expert_TK, experts)
    weight_TK = jnp.where(expert_TK < experts, weight_TK, 0)
    return Assignment(
        token_A=jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), width, total_repeat_length=tokens * width),
        expert_A=expert_TK.astype(jnp.int32).reshape(-1),
        weight_A=weight_TK.reshape(-1),
        scores_TE=scores_TE,
        logits_TE=logits_TE,
        weight_on=weight_on,
        per_token=width,
    )


def flatten_rows(assignment: Assignment) -> Assignment:
    """The assignment of a whole batch from one whose leaves carry a leading axis of rows (``jax.vmap`` of a router)."""
    rows, tokens = assignment.scores_TE.shape[:2]
    first_B1 = jnp.arange(rows, dtype=jnp.int32)[:, None] * tokens
    return jax.tree.map(
        lambda leaf: leaf.reshape(-1, *leaf.shape[2:]),
        dataclasses.replace(assignment, token_A=assignment.token_A + first_B1),
    )


def as_token_choice(assignment: Assignment) -> Assignment:
    """The same visits with ``per_token`` choices a token: E of them, mostly none, where the order was another."""
    if assignment.per_token is not None:
        return assignment
    place = (assignment.token_A, assignment.expert_A)
    empty_TE = jnp.zeros((assignment.tokens, assignment.experts), assignment.weight_A.dtype)
    weight_TE = empty_TE.at[place].add(assignment.weight_A, mode="drop")
    chosen_TE = empty_TE.astype(bool).at[place].set(True, mode="drop")
    expert_TE = jnp.where(chosen_TE, jnp.arange(assignment.experts), assignment.experts)
    return from_choice(expert_TE, weight_TE, assignment.scores_TE, assignment.logits_TE, weight_on=assignment.weight_on)


def slice_tokens(assignment: Assignment, start: Int[Array, ""], count: int) -> Assignment:
    """What ``count`` tokens from ``start`` on were assigned, as a batch of their own."""
    assignment = as_token_choice(assignment)
    by_token = (
        assignment.expert_A.reshape(assignment.tokens, -1),
        assignment.weight_A.reshape(assignment.tokens, -1),
        assignment.scores_TE,
        assignment.logits_TE,
    )
    part = [jax.lax.dynamic_slice_in_dim(leaf, start, count) for leaf in by_token]
    return from_choice(*part, weight_on=assignment.weight_on)


def mask_logits(logits_TE, mask_T):
    """Logits in float32 (or wider), zero at padding tokens: what stands there, NaN included, reaches nothing."""
    logits_TE = logits_TE.astype(jnp.promote_types(logits_TE.dtype, jnp.float32))
    return logits_TE if mask_T is None else jnp.where(mask_T[:, None], logits_TE, 0)


def mask_scores(scores_TE, mask_T):
    return scores_TE if mask_T is None else jnp.where(mask_T[:, None], scores_TE, 0)
