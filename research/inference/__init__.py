"""Text out of a model: a prompt read in the parallel form, new tokens decoded in the recurrent form; given text scored."""

from research.inference.generation import (
    Continuation,
    generate,
    generate_with_logprobs,
    stream,
    stream_with_logprobs,
)
from research.inference.scoring import Scores, pieces, score
from research.inference.speculative import Speculation, speculate

__all__ = [
    "Continuation",
    "Scores",
    "Speculation",
    "generate",
    "generate_with_logprobs",
    "pieces",
    "score",
    "speculate",
    "stream",
    "stream_with_logprobs",
]
