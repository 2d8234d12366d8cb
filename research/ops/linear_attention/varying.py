"""Inside ``jax.shard_map``: which mesh axes an array varies over."""

from typing import Any

import jax


def vary_alike(arrays: tuple) -> Any:
    """Mark every array of a tree as varying over the axes that any of them varies over: a loop's carry must."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)))

    def cast(x):
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(cast, arrays)
