"""Attention to the few keys that a cheap indexer chooses (DeepSeek-AI 2025, DeepSeek-V3.2-Exp; DSA).

``select`` scores every visible key for every query and keeps the best, ``attend_selected`` is attention to those alone,
``index_divergence`` is what the indexer learns from. All take a block of queries at a time: nothing of size T·S is kept.
"""

from research.ops.sparse_attention.attend import attend_selected
from research.ops.sparse_attention.divergence import IndexStatistics, index_divergence
from research.ops.sparse_attention.index import PRECISIONS, index_scores, select

__all__ = ["PRECISIONS", "IndexStatistics", "attend_selected", "index_divergence", "index_scores", "select"]
