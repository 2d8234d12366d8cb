"""The identity of a corpus and its held-out part.

**Held-out rule.** Documents are ordered by the SHA-256 of their name. Going down that order, a document joins the
held-out set until the next one would take the set past ``held_out_bytes``; documents larger than a quarter of
``held_out_bytes`` are passed over, so that no single file is the set. What was not chosen is for training. The choice
depends on names and sizes alone: not on the order of the files, the seed, the tokenizer or the number of processes.
"""

import hashlib
from collections.abc import Callable, Sequence

from research.config import ConfigError


def corpus_hash(names: Sequence[str], digests: Sequence[bytes]) -> str:
    """SHA-256 (hex) over names and the SHA-256 of each content, held-out ones included; any order gives the same."""
    total = hashlib.sha256()
    for name, digest in sorted(zip(names, digests, strict=True)):
        total.update(hashlib.sha256(name.encode()).digest())
        total.update(digest)
    return total.hexdigest()


def split(names: Sequence[str], size: Callable[[int], int], held_out_bytes: int) -> tuple[list[int], list[int]]:
    """Indices of the documents for training and of the held-out ones, each in the order given.

    Args:
      names: name of each document.
      size: bytes of document i; asked only as far down the order as is needed.
      held_out_bytes: most bytes to hold out; 0 holds out nothing.

    Raises:
      ConfigError: nothing could be held out, or nothing would be left to train on.
    """
    if not held_out_bytes:
        return list(range(len(names))), []
    chosen: set[int] = set()
    total = 0
    for index in sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest()):
        length = size(index)
        if length > held_out_bytes / 4:
            continue
        if total + length > held_out_bytes:
            break
        chosen.add(index)
        total += length
    if not chosen:
        raise ConfigError(
            f"data.held_out_bytes is {held_out_bytes:,}, and no document is as small as a quarter of that: "
            f"raise it, split the data into more documents, or set it to 0 for no held-out set"
        )
    if len(chosen) == len(names):
        raise ConfigError(
            f"data.held_out_bytes is {held_out_bytes:,}, and the whole data ({total:,} bytes in {len(names)} "
            f"document{'s' * (len(names) > 1)}) fits in it: lower it, or set it to 0 for no held-out set"
        )
    return [i for i in range(len(names)) if i not in chosen], sorted(chosen)
