"""Meshes, and where each axis lives.

Mesh axes are ``data`` and ``fsdp``. Rows of a batch are split over both; a parameter is split over ``fsdp`` along the
axis its layer names, and gathered where it is used. Every mesh has both axes (of size 1 where unused), so that a
declaration holds on any of them; with no mesh set (a notebook, a unit test) declarations are without effect.
"""

import dataclasses
import math

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; ``data=-1`` takes whatever the others leave."""

    data: int = -1
    fsdp: int = 1

    def __post_init__(self):
        if self.fsdp < 1:
            raise ValueError(f"fsdp must be at least 1, got {self.fsdp}")
        if self.data < 1 and self.data != -1:
            raise ValueError(f"data must be at least 1, or -1 for the devices that fsdp leaves, got {self.data}")


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """A mesh with explicit axes over all devices (or those given).

    Raises:
      ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    data = len(devices) // config.fsdp if config.data == -1 else config.data
    if data * config.fsdp != len(devices):
        raise ValueError(
            f"mesh.data × mesh.fsdp must be the number of devices, {len(devices)}; "
            f"got data={config.data} and fsdp={config.fsdp}"
        )
    return jax.make_mesh((data, config.fsdp), BATCH, devices=devices)


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
    return spec if on_mesh() else None


def gathered(x):
    """``x`` whole on every device: a parameter as its layer computes with it."""
    return jax.reshard(x, P()) if on_mesh() else x


def look_up(table_VD, tokens_BT):
    """Rows of a table that every device holds whole, for tokens spread over the batch axes."""
    return table_VD.at[tokens_BT].get(out_sharding=P(BATCH) if on_mesh() else None)


def per_shard(function, batched, replicated=(), *, summed: bool = False):
    """``function(batched, replicated)`` on each device's own rows: for code that sorts, scans or calls a kernel.

    Args:
      function: of two pytrees; returns a pytree of batched arrays, or with ``summed`` a pair (batched, sums), where
        sums are added over devices.
      batched: arrays whose first axis is the batch.
      replicated: arrays that every device needs whole.
    """
    if not on_mesh():
        return function(batched, replicated)

    def local(batched, replicated):
        out = function(batched, replicated)
        return (out[0], jax.lax.psum(out[1], BATCH)) if summed else out

    return jax.shard_map(
        local,
        in_specs=(P(BATCH), P()),
        out_specs=(P(BATCH), P()) if summed else P(BATCH),
        check_vma=False,
    )(batched, replicated)
