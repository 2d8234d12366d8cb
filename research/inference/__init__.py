"""Text out of a model: a prompt read in the parallel form, new tokens decoded in the recurrent form."""

from research.inference.generation import generate, stream
from research.inference.speculative import Speculation, speculate

__all__ = ["Speculation", "generate", "speculate", "stream"]
