"""Softmax attention over packed documents and caches: full, windowed, chunked, with sinks and soft caps.

``attention`` is the one signature. See ``dispatch`` for the meaning of every argument, ``dense`` for the definition that the
other forms are held to, ``masks`` for who sees whom.
"""

from research.ops.attention.dispatch import IMPLEMENTATIONS, attention
from research.ops.attention.masks import Tokens, tokens_of, visible

__all__ = ["IMPLEMENTATIONS", "Tokens", "attention", "tokens_of", "visible"]
