"""Attention to the few keys that a cheap indexer chooses (DeepSeek-AI 2025, DeepSeek-V3.2-Exp; DSA).

``select`` scores every visible key for every query and keeps the best, ``attend_selected`` is attention to those alone,
``index_divergence`` is what the indexer learns from. ``select_mask`` selects with one bit a key instead, for ``attention`` to
score every key under a mask: cheaper while most keys are selected by some query near, and in TPU kernels. The others take a block
of queries at a time and keep nothing of size T·S.
"""

from research.ops.sparse_attention.attend import attend_selected
from research.ops.sparse_attention.divergence import IndexStatistics, index_divergence
from research.ops.sparse_attention.index import PRECISIONS, few_words, index_scores, select, select_mask, select_words

__all__ = [
    "PRECISIONS", "IndexStatistics", "attend_selected", "few_words", "index_divergence", "index_scores", "select", "select_mask",
    "select_words",
]  # fmt: skip
