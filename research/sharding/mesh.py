"""Meshes, and where each axis lives.

====== ===========================================================================================================
axis   what is split over it
====== ===========================================================================================================
data   rows of the batch
fsdp   rows of the batch, and every parameter along the axis its layer names, gathered where it is used
expert rows of the batch, and experts: tokens travel to theirs (``research.sharding.expert_parallel``)
tensor the hidden width of experts
context tokens of a row, where an op says so (``research.ops.linear_attention``)
====== ===========================================================================================================

``make_mesh`` makes all of them, of size 1 where unused, so that a declaration holds on any mesh; one that names an axis a
mesh hasn't is read as if its size were 1. With no mesh set (a notebook, a unit test) declarations are without effect.
"""

import dataclasses
import math

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH = ("data", "fsdp", "expert")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; ``data=-1`` takes whatever the others leave."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self):
        for name in AXES[1:]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.data < 1 and self.data != -1:
            raise ValueError(
                f"data must be at least 1, or -1 for the devices that the other axes leave, got {self.data}"
            )


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """A mesh with explicit axes over all devices (or those given).

    Raises:
      ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, name) for name in AXES]
    others = math.prod(sizes[1:])
    sizes[0] = len(devices) // others if config.data == -1 else config.data
    if sizes[0] * others != len(devices):
        named = ", ".join(f"{n}={s}" for n, s in zip(AXES, sizes, strict=True) if s > 1 or n == "data")
        raise ValueError(
            f"the sizes of the mesh's axes must multiply to the number of devices, {len(devices)}; got {named}"
        )
    return jax.make_mesh(tuple(sizes), AXES, devices=devices)


def axis_size(name: str) -> int:
    """Devices along an axis of the current mesh; 1 where there is no such axis, or no mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def batch_axes() -> tuple[str, ...]:
    """The axes of the current mesh that rows are split over."""
    return tuple(name for name in BATCH if name in jax.sharding.get_abstract_mesh().axis_names)


def present(spec: P) -> P:
    """``spec`` without the axes that the current mesh hasn't."""
    names = jax.sharding.get_abstract_mesh().axis_names

    def kept(entry):
        if isinstance(entry, tuple):
            return tuple(name for name in entry if name in names) or None
        return entry if entry in names else None

    return P(*(kept(entry) for entry in spec))


def check_batch(batch_size: int, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> None:
    """Raises ValueError unless ``batch_size`` rows spread evenly over the mesh."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH)
    if batch_size % shards:
        raise ValueError(f"the batch must be divisible by the {shards} shards of the mesh, got {batch_size} rows")


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """How a batch lies on ``mesh``: rows over every batch axis."""
    return NamedSharding(mesh, P(BATCH))


def on_mesh() -> bool:
    """Whether a mesh is set (``jax.set_mesh``) around the code that runs or is traced."""
    return not jax.sharding.get_abstract_mesh().empty


def declare(spec: P) -> P | None:
    """A parameter's ``out_sharding``: ``spec`` on a mesh, nothing where none is set."""
    return present(spec) if on_mesh() else None


def gathered(x):
    """``x`` whole on every device: a parameter as its layer computes with it."""
    return jax.reshard(x, P()) if on_mesh() else x


def placed(x, spec: P):
    """``x`` split as ``spec`` says."""
    return jax.reshard(x, present(spec)) if on_mesh() else x


def look_up(table_VD, tokens_BT):
    """Rows of a table that every device holds whole, for tokens spread over the batch axes."""
    return table_VD.at[tokens_BT].get(out_sharding=P(batch_axes()) if on_mesh() else None)


def per_shard(function, batched, replicated=(), *, split=(), split_specs=(), summed: bool = False):
    """``function(batched, replicated)`` on each device's own rows: for code that sorts, scans or calls a kernel.

    Args:
      function: of two pytrees, or three where ``split`` is given; returns a pytree of batched arrays, or with ``summed``
        a pair (batched, sums), where sums are added over the devices that rows are split over. Devices that differ
        along other axes must return the same.
      batched: arrays whose first axis is the batch.
      replicated: arrays that every device needs whole.
      split: arrays of which each device needs the part that ``split_specs`` (a like pytree of specs) gives it.
    """
    arguments = (batched, replicated, split) if jax.tree.leaves(split) else (batched, replicated)
    if not on_mesh():
        return function(*arguments)
    axes = batch_axes()

    def local(*arguments):
        out = function(*arguments)
        return (out[0], jax.lax.psum(out[1], axes)) if summed else out

    specs = jax.tree.map(present, split_specs, is_leaf=lambda leaf: isinstance(leaf, P))
    if len(arguments) == 3:
        arguments = (batched, replicated, jax.tree.map(jax.reshard, split, specs))
    return jax.shard_map(
        local,
        in_specs=(P(axes), P(), specs)[: len(arguments)],
        out_specs=(P(axes), P()) if summed else P(axes),
        check_vma=False,
    )(*arguments)
