"""Tiny checkpoints whose every number is a function of its tensor's name, shape and a seed.

Needs numpy alone: the tests rebuild with it what ``generate.py`` gave to PyTorch, so that only logits are stored.
"""

import hashlib
import math
import re

import numpy as np

# Tokens of the documents whose logits are stored: the first fills a row, the other two together one more.
DOCUMENTS = (80, 47, 33)
# Documents that are continued, and how many of their tokens are the prompt.
PROMPTS = ((0, 13), (1, 7))
NEW_TOKENS = 12


def uniform(name: str, count: int, seed: int) -> np.ndarray:
    """``count`` numbers of mean 0 and variance 1, float64. Raw bits of PCG64 never change between versions of numpy."""
    state = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    return (np.random.PCG64(state).random_raw(count) >> 11) * (2.0**-52 * 3**0.5) - 3**0.5


def weight(name: str, shape: tuple[int, ...], seed: int, centred: str = "(?!)") -> np.ndarray:
    """A tensor of a checkpoint, float32: activations stay of order one, and no norm, bias or buffer is at its default.

    Args:
      centred: regular expression found in the names of norms that are stored as their distance from 1.
    """
    u = uniform(f"{name} {list(shape)}", math.prod(shape), seed).reshape(shape)
    if len(shape) > 1:
        return (shape[-1] ** -0.5 * u).astype(np.float32)
    if "norm" in name and not name.endswith("bias") and not re.search(centred, name):
        return (1 + 0.3 * u).astype(np.float32)
    return ((0.5 if "A_log" in name else 0.0) + 0.3 * u).astype(np.float32)


def documents(vocab_size: int, seed: int) -> list[np.ndarray]:
    """Token ids of each document, int32."""
    unit = [(uniform(f"document {i}", length, seed) / 3**0.5 + 1) / 2 for i, length in enumerate(DOCUMENTS)]
    return [(u * vocab_size).astype(np.int32) for u in unit]
