"""Kernels where they can serve a call: splash attention on TPU, cuDNN flash attention on GPU, and our own of selected keys.

Each says why it can't serve a call, or None where it can. The answer depends on what is static alone, so that a program can
be lowered for a platform from a machine without it; cuDNN itself must be present where the call is traced.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention import tpu_attend
from research.ops.explicit_mesh import vary_alike

_LANES = 128


def refuse_splash(plan, q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN) -> str | None:
    if not plan.aligned:
        return "splash attention serves rows without a cache"
    if selected_BTN is not None:
        return "splash attention's masks are known beforehand"
    if q_BTHK.shape[1] % _LANES:
        return f"splash attention needs T to be a multiple of {_LANES}, got {q_BTHK.shape[1]}"
    if plan.packed and plan.chunk is not None:
        return "splash attention counts chunks from the start of the row, not of each document"
    if q_BTHK.dtype not in (jnp.float32, jnp.bfloat16):
        return f"splash attention needs float32 or bfloat16, got {q_BTHK.dtype}"
    return None


def splash(plan, q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN, *, interpret: bool = False):
    """jax.experimental's splash attention; heads are padded to whole lanes, which changes no score."""
    kernel, segment_class = _make_splash(plan.window, plan.chunk, plan.softcap, *q_BTHK.shape[1:3], interpret)
    heads_first = [jnp.swapaxes(_whole_lanes(x), 1, 2) for x in (q_BTHK, k_BSGK, v_BSGV)]
    segments = segment_class(query.segment_BT, source.segment_BT) if plan.packed else None
    sinks_H = None if sinks_H is None else sinks_H.astype(jnp.float32)

    def row(q_HTK, k_GSK, v_GSV, segments):
        return kernel(q_HTK, k_GSK, v_GSV, segment_ids=segments, sinks=sinks_H)

    rows: Any = jax.vmap(row)
    o_BHTV = rows(*heads_first, segments)
    return jnp.swapaxes(o_BHTV, 1, 2)[..., : v_BSGV.shape[-1]]


def splash_miscounts(plan, query) -> jax.Array | None:
    """Whether padding lies within a document that has a window: the kernel's window counts slots. None where it can't."""
    if plan.window is None or not plan.packed:
        return None
    later_BT = (query.segment_BT[:, 1:] > 0) & (query.place_BT[:, 1:] > 0)
    return jnp.any(later_BT & (query.segment_BT[:, :-1] == 0))


@functools.lru_cache(maxsize=64)
def _make_splash(window, chunk, softcap, T, H, interpret):
    """The kernel for rows of T, and its class of segment ids. It looks at each of the T² places once: seconds at 32K."""
    # Imported here: it is for TPUs alone, and slow to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.CausalMask((T, T))
    if window is not None:
        mask = masks.LocalMask((T, T), (window - 1, 0), 0)
    if chunk is not None:
        chunks = masks.ChunkedCausalMask((T, T), chunk)
        mask = chunks if window is None else masks.LogicalAnd(mask, chunks)
    block = next(size for size in (512, 256, _LANES) if T % size == 0)
    blocks: dict[str, Any] = {
        f"block_{name}": block
        for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    }
    with jax.ensure_compile_time_eval():
        kernel = kernels.make_splash_mha(
            mask=masks.MultiHeadMask([mask] * H),
            block_sizes=kernels.BlockSizes(**blocks),
            attn_logits_soft_cap=softcap,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
    return kernel, kernels.SegmentIds


def refuse_selected(plan, q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN) -> str | None:
    if selected_BTN is None or selected_BTN.dtype != jnp.uint32:
        return "it serves selections of one bit a key (select_mask)"
    if plan.window is not None or plan.chunk is not None or plan.softcap is not None or sinks_H is not None:
        return "it has no window, chunks, soft cap or sinks"
    return tpu_attend.refuses(q_BTHK, v_BSGV)


def selected_forward(plan, q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, words_BTW, *, interpret: bool = False):
    """As ``blocked.forward``; what a query may see was asked when its keys were selected."""
    q_BTHK, k_BSGK, v_BSGV, words_BTW = vary_alike((q_BTHK, k_BSGK, v_BSGV, _signed(words_BTW)))
    return tpu_attend.forward(q_BTHK, k_BSGK, v_BSGV, words_BTW, interpret=interpret)


def selected_backward(
    plan,
    q_BTHK,
    k_BSGK,
    v_BSGV,
    sinks_H,
    query,
    source,
    words_BTW,
    o_BTHV,
    lse_BHT,
    do_BTHV,
    *,
    interpret: bool = False,
):
    arrays = (q_BTHK, k_BSGK, v_BSGV, _signed(words_BTW), o_BTHV, lse_BHT, do_BTHV)
    return *tpu_attend.backward(*vary_alike(arrays), interpret=interpret), None


def _signed(words_BTW):
    return jax.lax.bitcast_convert_type(words_BTW, jnp.int32)


def refuse_cudnn(plan, q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN) -> str | None:
    if not plan.aligned or plan.packed:
        return "cuDNN attention serves rows of one document without padding or a cache"
    if plan.softcap is not None or plan.chunk is not None or sinks_H is not None or selected_BTN is not None:
        return "cuDNN attention has no soft cap, chunks, sinks or selection"
    if q_BTHK.dtype not in (jnp.float16, jnp.bfloat16):
        return f"cuDNN attention needs float16 or bfloat16, got {q_BTHK.dtype}"
    if q_BTHK.shape[-1] != v_BSGV.shape[-1]:
        return f"cuDNN attention needs keys as wide as values, got {q_BTHK.shape[-1]} and {v_BSGV.shape[-1]}"
    try:
        # The library looks for cuDNN, and at its version and the card, while it is traced.
        jax.eval_shape(jax.grad(lambda q, k, v: jnp.sum(_cudnn(plan, q, k, v), dtype=q.dtype)), q_BTHK, k_BSGK, v_BSGV)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"cuDNN attention: {error}"
    return None


def cudnn(plan, q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN):
    return _cudnn(plan, q_BTHK, k_BSGK, v_BSGV)


def _cudnn(plan, q_BTHK, k_BSGK, v_BSGV):
    window = None if plan.window is None else (plan.window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTHK, k_BSGK, v_BSGV, scale=1.0, is_causal=True, local_window_size=window, implementation="cudnn"
    )


def _whole_lanes(x):
    return jnp.pad(x, [(0, 0)] * 3 + [(0, -x.shape[-1] % _LANES)])
