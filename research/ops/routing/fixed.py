"""Hash routing: the token's id decides, nothing is learned (Roller et al. 2021, arXiv 2106.04426)."""

import jax.numpy as jnp
import numpy as np

from research.axes import Array, Bool, Int
from research.ops.routing.assignment import Assignment, from_choice, mask_scores


def random_table(seed: int, vocabulary: int, experts: int, k: int = 1) -> np.ndarray:
    """[vocabulary, k] int32: k distinct experts at random for every token id."""
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((vocabulary, experts)), axis=1)[:, :k].astype(np.int32)


def balanced_table(counts_V: np.ndarray, experts: int, k: int = 1) -> np.ndarray:
    """[vocabulary, k] int32: the most frequent ids first, each to the k least loaded experts (Roller's greedy fill)."""
    load_E = np.zeros(experts)
    table_VK = np.zeros((len(counts_V), k), np.int32)
    for token in np.argsort(-np.asarray(counts_V), kind="stable"):
        table_VK[token] = np.argsort(load_E, kind="stable")[:k]
        load_E[table_VK[token]] += counts_V[token]
    return table_VK


def by_token_id(
    token_ids_T: Int[Array, "T"],
    table_VK: Int[Array, "V K"],
    experts: int,
    *,
    mask_T: Bool[Array, "T"] | None = None,
) -> Assignment:
    """Token t visits ``table_VK[token_ids_T[t]]`` with weights 1/K. Scores say the same, logits are zero."""
    width = table_VK.shape[1]
    expert_TK = jnp.asarray(table_VK)[token_ids_T]
    scores_TE = (expert_TK[:, :, None] == jnp.arange(experts)).any(1).astype(jnp.float32) / width
    weight_TK = jnp.full(expert_TK.shape, 1 / width, jnp.float32)
    logits_TE = jnp.zeros_like(scores_TE)
    return from_choice(expert_TK, weight_TK, mask_scores(scores_TE, mask_T), logits_TE, mask_T=mask_T)
