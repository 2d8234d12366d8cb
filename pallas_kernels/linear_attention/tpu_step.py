"""One token of the linear recurrence on TPU: every state is read once and written once, in place.

A grid step is up to eight heads of one row. What a token brings is a few rows a head; queries, keys and gates a channel are
wanted along the sublanes of the state, so those of all heads of the step are turned by one transposition.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_TOGETHER = 8


def refuses(state_BHKV) -> str | None:
    """Why the kernel cannot serve the call, or None."""
    if state_BHKV.dtype != jnp.float32:
        return f"it keeps a float32 state, and these inputs want {state_BHKV.dtype}"
    return None


def copies(state_BHKV) -> bool:
    """Whether XLA lays such a state out with its keys along lanes, to pad nothing: it would be copied into the kernel and back."""
    _, _, K, V = state_BHKV.shape
    return K % _LANES == 0 and V % _LANES != 0


def step(q_BGK, k_BGK, v_BHV, g, beta_BH, state_BHKV, *, scale, interpret=False):
    """(o_BHV, the new state), all float32; ``g`` is None, [B, H] or [B, H, K]."""
    B, H, K, V = state_BHKV.shape
    h = _TOGETHER if H % _TOGETHER == 0 else H
    if H > _LANES // 3 and h == H:
        h = next(n for n in range(_TOGETHER, 0, -1) if H % n == 0)
    heads = lambda x_BGK: jnp.repeat(x_BGK, H // x_BGK.shape[1], axis=1)  # noqa: E731
    along = lambda x_BH: jnp.broadcast_to(x_BH[..., None], (B, H, V))  # noqa: E731
    inputs = {"q": heads(q_BGK), "k": heads(k_BGK), "v": v_BHV}
    if g is not None:
        inputs["channels" if g.ndim == 3 else "decay"] = jnp.exp(g) if g.ndim == 3 else along(jnp.exp(g))
    if beta_BH is not None:
        inputs["beta"] = along(beta_BH)
    # Blocks of fewer than eight heads want an axis of their own to be whole.
    rows = lambda x: x.reshape(B, H // h, h, x.shape[-1])  # noqa: E731
    row_spec = lambda width: pl.BlockSpec((1, 1, h, width), lambda b, n: (b, n, 0, 0))  # noqa: E731
    state_spec = pl.BlockSpec((1, h, K, V), lambda b, n: (b, n, 0, 0))
    # Inside jax.shard_map, outputs vary over the mesh axes that the inputs vary over.
    varying = jax.typeof(v_BHV).manual_axis_type
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying)
        for shape in ((B, H // h, h, V), state_BHKV.shape)
    ]
    o, state_BHKV = pl.pallas_call(
        functools.partial(_kernel, names=tuple(inputs), scale=scale),
        grid=(B, H // h),
        in_specs=[*(row_spec(x.shape[-1]) for x in inputs.values()), state_spec],
        out_specs=[row_spec(V), state_spec],
        out_shape=shapes,
        input_output_aliases={len(inputs): 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="linear_attention_step",
    )(*(rows(x) for x in inputs.values()), state_BHKV)
    return o.reshape(B, H, V), state_BHKV


def _kernel(*refs, names, scale):
    x = dict(zip((*names, "state", "o", "new"), refs, strict=True))
    h = x["q"].shape[2]
    turned = [name for name in ("q", "k", "channels") if name in x]
    rows = jnp.concatenate([x[name][0, 0] for name in turned], axis=0)
    rows = jnp.concatenate([rows, jnp.zeros((_LANES - rows.shape[0], rows.shape[1]), jnp.float32)], axis=0)
    columns = rows.T
    for j in range(h):
        column = {name: columns[:, i * h + j : i * h + j + 1] for i, name in enumerate(turned)}
        row = {name: x[name][0, 0, j : j + 1] for name in names if name not in turned}
        S = x["state"][0, j]
        decay = column.get("channels", row.get("decay"))
        S = S if decay is None else S * decay
        u = row["v"]
        if "beta" in row:
            u = row["beta"] * (u - jnp.sum(S * column["k"], axis=0, keepdims=True))
        S = S + column["k"] * u
        x["new"][0, j] = S
        x["o"][0, 0, j : j + 1] = scale * jnp.sum(S * column["q"], axis=0, keepdims=True)
