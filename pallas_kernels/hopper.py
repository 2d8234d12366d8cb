"""What the Mosaic GPU kernels share: which GPUs they are for, how wgmma's operands lie, and their launch."""

import re
from typing import Any

import jax
import jax.extend.backend
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # its types name neither what it exports nor what it takes
PROCESSORS = 132  # of an H100 or H200


def not_hopper() -> str | None:
    """What the call is traced for, where that is known and is no Hopper GPU (wgmma exists nowhere else)."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform == "gpu":
        hopper = re.search(r"\bG?H\d", device.device_kind)
        return None if hopper else f"it is for Hopper GPUs, and this one is {device.device_kind}"
    device = jax.extend.backend.get_default_device()
    if device.platform == "gpu" and not device.compute_capability.startswith("9."):
        return f"it is for Hopper GPUs, and this one is {device.device_kind}"
    return None


def tiles():
    """How a bfloat16 array lies in shared memory for wgmma."""
    return (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def launch(body, inputs, outputs, scratch=(), *, name, grid, grid_names, interpret=False, **threads):
    """What ``body`` writes, a list like ``outputs`` (shapes and dtypes).

    Args:
      scratch: shared memory and barriers, a sequence or by name.
      interpret: True, or parameters of JAX's interpreter; False and None compile.
      threads: of a thread block of more than one warpgroup, ``num_threads`` and ``thread_name``.
    """
    out = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=grid,
        grid_names=grid_names,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=name,
        interpret=plgpu.InterpretGPUParams() if interpret is True else interpret or None,
        **threads,
    )(*inputs)
    # Inside jax.shard_map: what comes out of a kernel varies over the mesh axes that its inputs vary over; its type says so.
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))
    return [jax.lax.pcast(x, tuple(axes), to="varying") if axes else x for x in out]
