"""One token of the linear recurrence on Hopper GPUs: every state is read once and written once (Mosaic GPU).

A thread block is one head and 64 value columns: its state [K, 64] goes through registers; nothing else is large.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.hopper import launch, not_hopper

plgpu: Any = mosaic_gpu  # its types name neither what it exports nor what it takes

_TILE = 64
_LARGEST_KEY = 256


def refuses(state_BHKV) -> str | None:
    """Why the kernel cannot serve the call, or None."""
    K, V = state_BHKV.shape[2:]
    if state_BHKV.dtype != jnp.float32:
        return f"it keeps a float32 state, and these inputs want {state_BHKV.dtype}"
    if K % _TILE or V % _TILE or K > _LARGEST_KEY:
        return f"it takes K and V in multiples of {_TILE}, and K up to {_LARGEST_KEY}; got K = {K} and V = {V}"
    return not_hopper()


def step(q_BGK, k_BGK, v_BHV, g, beta_BH, state_BHKV, *, scale, interpret=False):
    """(o_BHV, the new state), all float32; ``g`` is None, [B, H] or [B, H, K]."""
    B, H, K, V = state_BHKV.shape
    inputs = {"q": q_BGK, "k": k_BGK, "v": v_BHV, "state": state_BHKV}
    if g is not None:
        decay = jnp.exp(g)
        inputs["decay"] = decay if g.ndim == 3 else jnp.broadcast_to(decay[..., None], (B, H, K))
    if beta_BH is not None:
        inputs["beta"] = jnp.broadcast_to(beta_BH[..., None], (B, H, V))
    return tuple(
        launch(
            functools.partial(_kernel, names=tuple(inputs), group=H // q_BGK.shape[1], scale=scale),
            list(inputs.values()),
            [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (v_BHV, state_BHKV)],
            name="linear_attention_step",
            grid=(V // _TILE, H, B),
            grid_names=("columns", "head", "batch"),
            interpret=interpret,
        )
    )


def _kernel(*refs, names, group, scale):
    x = dict(zip((*names, "o", "new"), refs, strict=True))
    b, h = jax.lax.axis_index("batch"), jax.lax.axis_index("head")
    columns = pl.ds(jax.lax.axis_index("columns") * _TILE, _TILE)
    K = x["state"].shape[2]
    load = functools.partial(plgpu.load, optimized=False)

    def channels(name, head):
        return jax.lax.broadcast_in_dim(load(x[name].at[b, head], layout=plgpu.Layout.WGMMA.reduce(1)), (K, _TILE), [0])

    def values(name):
        return load(x[name].at[b, h, columns], layout=plgpu.Layout.WGMMA.reduce(0))

    S = load(x["state"].at[b, h, :, columns], layout=plgpu.Layout.WGMMA)
    k = channels("k", h // group)
    if "decay" in x:
        S = S * channels("decay", h)
    u = values("v")
    if "beta" in x:
        u = values("beta") * (u - jnp.sum(S * k, axis=0))
    S = S + k * jax.lax.broadcast_in_dim(u, (K, _TILE), [1])
    x["new"].at[b, h, :, columns][...] = S
    x["o"].at[b, h, columns][...] = jnp.sum(S * channels("q", h // group), axis=0) * scale
