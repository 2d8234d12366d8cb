"""A sequence sharded over a mesh axis, inside ``jax.shard_map``: what its earlier shards leave to the later ones."""

import jax
import jax.numpy as jnp

from research.ops.explicit_mesh import vary_alike


def compose(apply, M, N_BHKV, state_BHKV, axis_name):
    """(the state that enters this shard, the state after the last shard)."""
    shards, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    M_all, N_all = jax.lax.all_gather((M, N_BHKV), axis_name)

    def body(S, x):
        return apply(x[0], S) + x[1], S

    M_all, N_all, start = vary_alike((M_all, N_all, state_BHKV))
    final_BHKV, entering = jax.lax.scan(body, start, (M_all, N_all))
    final_BHKV = jax.lax.psum(jnp.where(here == shards - 1, final_BHKV, 0), axis_name)
    return jax.lax.dynamic_index_in_dim(entering, here, keepdims=False), final_BHKV


def previous_id(segment_ids_BT, axis_name):
    """The last non-zero id on the shards before this one, 0 for none."""
    T = segment_ids_BT.shape[1]
    position_BT = jnp.where(segment_ids_BT > 0, jnp.arange(T, dtype=jnp.int32), -1)
    last_B1 = jnp.max(position_BT, axis=1, keepdims=True)
    id_B = jnp.where(last_B1 >= 0, jnp.take_along_axis(segment_ids_BT, jnp.maximum(last_B1, 0), axis=1), 0)[:, 0]
    id_SB = jax.lax.all_gather(id_B, axis_name)
    shard_S1 = jnp.arange(id_SB.shape[0], dtype=jnp.int32)[:, None]
    usable_SB = (shard_S1 < jax.lax.axis_index(axis_name)) & (id_SB > 0)
    nearest_B = jnp.max(jnp.where(usable_SB, shard_S1, -1), axis=0)
    picked_B = jnp.take_along_axis(id_SB, jnp.maximum(nearest_B, 0)[None], axis=0)[0]
    return jnp.where(nearest_B >= 0, picked_B, 0)
