"""How many rows groups are given: few sizes that suit products, whatever the load."""

import math

import jax.numpy as jnp
import numpy as np

from research.axes import Array, Int


def tile_rows(rows: int, groups: int) -> int:
    """Rows of one tile: the power of two nearest 3·√(mean group), in [8, 256].

    `aligned_rows` has room for nearly a tile more than the mean in every group: three standard deviations of a random
    load, so that equal shares usually do.
    """
    return int(min(256, max(8, 2 ** round(np.log2(3 * max(rows / max(groups, 1), 1) ** 0.5)))))


def aligned_rows(rows: int, groups: int, alignment: int) -> int:
    """Rows enough for `rows` rows in `groups` groups under any load, each group padded to a multiple of `alignment`.

    Where a group is likely to have rows at all, groups × an equal share, so that `padded_sizes` may deal them evenly.
    """
    worst = (rows + min(groups, rows) * (alignment - 1)) // alignment * alignment
    if rows < 4 * groups:
        return worst
    step = alignment // math.gcd(groups, alignment)
    step = math.lcm(step, 8)
    return groups * (-(-worst // (groups * step)) * step)


def padded_sizes(counts_E: Int[Array, "E"], rows: int, alignment: int) -> Int[Array, "E"]:
    """Rows to give each group out of `aligned_rows`: equal shares if they are enough for all, else padded counts."""
    groups = counts_E.shape[0]
    padded_E = -(-counts_E // alignment) * alignment
    if rows % groups:
        return padded_E
    return jnp.where((counts_E <= rows // groups).all(), rows // groups, padded_E)
