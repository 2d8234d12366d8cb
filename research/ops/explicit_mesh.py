"""Ops on arrays that an explicit-sharding mesh holds: rows and heads are independent, so each device runs its own."""

import math
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def spec_of(x) -> P | None:
    """How ``x`` is split over the explicit axes of its mesh, one entry an axis of ``x``; None where there are none."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return P(*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))


def shards(x, names) -> int:
    """Over how many devices one entry of ``spec_of`` splits an axis of ``x``."""
    names = () if names is None else names if isinstance(names, tuple) else (names,)
    return math.prod(jax.typeof(x).sharding.mesh.shape[name] for name in names)


def run_on_shards(function, mesh_of, arguments, in_specs, out_specs):
    """``function(*arguments)`` on every device's part, over the explicit axes of ``mesh_of``'s mesh.

    Arguments that are None stay None. Each is resharded to its spec where it lies otherwise.
    """
    mesh = jax.typeof(mesh_of).sharding.mesh
    names = {n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    given = [x is not None for x in arguments]
    placed = [jax.sharding.reshard(x, s) for x, s in zip(arguments, in_specs, strict=True) if x is not None]
    specs = tuple(s for s, here in zip(in_specs, given, strict=True) if here)

    def local(*parts):
        parts = iter(parts)
        return function(*(next(parts) if here else None for here in given))

    return jax.shard_map(local, mesh=mesh, axis_names=names, in_specs=specs, out_specs=out_specs)(*placed)


def vary_alike(arrays: tuple) -> Any:
    """Inside ``jax.shard_map``: mark every array of a tree as varying over the axes that any of them varies over: a loop's carry must."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)))

    def cast(x):
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(cast, arrays)
