"""Linear attention with a feature map and softmax's denominator (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 9).

    o_t = Σ_{s ≤ t} ⟨φ(q_t), φ(k_s)⟩ v_s / Σ_{s ≤ t} ⟨φ(q_t), φ(k_s)⟩

The denominator is one more column of v, all ones, in the same call of ``linear_attention``: one scan, one state [K, V + 1].
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from research.axes import Array, Float, Int
from research.ops.linear_attention import linear_attention, linear_attention_step
from research.ops.linear_attention.context_parallel import context_parallel
from research.ops.segments import select

FeatureMap = Literal["identity", "elu", "relu", "softmax"]
FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu": lambda x: jax.nn.elu(x) + 1,
    "relu": jax.nn.relu,
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
}


def feature_map(x: Float[Array, "*heads K"], name: str) -> Float[Array, "*heads K"]:
    """φ over the features of a head, in promote_types(x, float32): 'identity', 'elu' (elu(x) + 1, Katharopoulos et al.
    2020), 'relu' (Kasai et al. 2021, arXiv 2103.13076) or 'softmax' (over the K features).

    Raises:
      ValueError: an unknown name.
    """
    if name not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}; got {name!r}")
    return FEATURE_MAPS[name](x.astype(jnp.promote_types(x.dtype, jnp.float32)))


def normalised_linear_attention(
    q_BTGK: Float[Array, "B T G K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTHV: Float[Array, "B T H V"],
    *,
    feature_map: str = "elu",
    initial_state: Float[Array, "B H K V+1"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V+1"]]:
    """The averages above over the token's own segment.

    Args:
      q_BTGK, k_BTGK, v_BTHV: as for ``linear_attention``; q and k before the feature map.
      feature_map: as in ``feature_map`` here. All but 'identity' keep the weights from being negative.
      initial_state: [B, H, K, V + 1]: Σ φ(k) vᵀ and, last, Σ φ(k), of the tokens before; zeros when None.
      segment_ids, implementation, chunk_size: as for ``linear_attention``, padding rule included.
      axis_name: inside ``jax.shard_map``, the mesh axis over which the sequence is sharded (see ``context_parallel``).

    Returns:
      o_BTHV in v's dtype, and the state after the last real token in promote_types(input, float32). Where the weights sum to
      nothing (ReLU may cut every feature off) the output is 0, and so is its gradient.

    Raises:
      ValueError, NotImplementedError: as ``linear_attention``; an unknown feature map.
    """
    if segment_ids is not None:
        # Before the feature map, or what is NaN in the padding would be NaN in its gradient.
        q_BTGK, k_BTGK, v_BTHV = (select(segment_ids > 0, x) for x in (q_BTGK, k_BTGK, v_BTHV))
    attend = linear_attention if axis_name is None else functools.partial(context_parallel, axis_name=axis_name)
    o_BTHV, state = attend(
        *_with_ones(q_BTGK, k_BTGK, v_BTHV, feature_map), initial_state=initial_state, segment_ids=segment_ids,
        implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip
    return _divide(o_BTHV).astype(v_BTHV.dtype), state


def normalised_linear_attention_step(
    q_BGK: Float[Array, "B G K"],
    k_BGK: Float[Array, "B G K"],
    v_BHV: Float[Array, "B H V"],
    state: Float[Array, "B H K V+1"],
    *,
    feature_map: str = "elu",
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V+1"]]:
    """One token of ``normalised_linear_attention``: returns its output and the new state."""
    o_BHV, state = linear_attention_step(*_with_ones(q_BGK, k_BGK, v_BHV, feature_map), state)
    return _divide(o_BHV).astype(v_BHV.dtype), state


_features = feature_map  # the functions above take an argument of that name


def _with_ones(q, k, v, name) -> tuple[Any, Any, Any]:
    wide = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    return _features(q, name), _features(k, name), jnp.concatenate([wide, jnp.ones_like(wide[..., :1])], axis=-1)


def _divide(sums):
    total, weight = sums[..., :-1], sums[..., -1:]
    # So small a sum of weights is rounding; its reciprocal would overflow in the gradient.
    some = jnp.abs(weight) > jnp.finfo(weight.dtype).tiny / jnp.finfo(weight.dtype).eps
    return jnp.where(some, total / jnp.where(some, weight, 1), 0)
