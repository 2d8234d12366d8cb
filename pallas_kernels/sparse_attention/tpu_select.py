"""The lightning indexer on TPU: scores, their top-k, and the selection as one bit a key; scores never leave VMEM.

A grid step scores a block of queries against all keys that one of them may see. The scores lie in VMEM as integers of the same
order, and the k-th best of each query is found bit by bit from the highest: 32 counts of how many keys are at least as good. Only where more keys than k are, a second search finds the slot from which equals are left out.

Bit j of word g·128 + c stands for slot g·4096 + j·128 + c: words are made and read without moving anything between lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
GROUP = 32 * LANES  # keys of 128 words
_KEYS = 256  # of a block: their sums stay in registers
_QUERIES = 128
_SCORE_BYTES = 16 * 1024 * 1024
_KEY_BYTES = 16 * 1024 * 1024
_VMEM_BYTES = 56 * 1024 * 1024
_UNSEEN = jnp.iinfo(jnp.int32).min


def refuses(q_BTHK, S: int) -> str | None:
    """Why the kernel cannot serve the call, or None."""
    if q_BTHK.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, got {q_BTHK.dtype}"
    width = -(-q_BTHK.shape[-1] // LANES) * LANES * q_BTHK.dtype.itemsize
    most = min(_KEY_BYTES // width, _SCORE_BYTES // 64)
    if most < S:
        return f"it keeps all keys and 16 queries' scores in VMEM: at most {most}, got {S}"
    return None


def select(q_BTHK, k_BSK, w_BTH, query_BT2, source_BS2, *, top_k, interpret=False):
    """int32 words [B, T, W] of the ``top_k`` best visible keys of each query, ties to the lowest slot.

    ``query_BT2`` and ``source_BS2`` hold document and place of each token, document 0 of padding.
    """
    B, T, H, K = q_BTHK.shape
    S = k_BSK.shape[1]
    bt = _QUERIES
    while bt > 16 and (bt * S * 4 > _SCORE_BYTES or bt >= 2 * T):
        bt //= 2
    bs = min(_KEYS, -(-S // LANES) * LANES)
    rows = lambda x, block: jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    q_BTHK, w_BTH, query_BT2 = (rows(x, bt) for x in (q_BTHK, w_BTH.astype(jnp.float32), query_BT2))
    k_BSK, source_BS2 = rows(k_BSK, bs), rows(source_BS2, bs)
    NT, NS = q_BTHK.shape[1] // bt, k_BSK.shape[1] // bs
    W = -(-S // GROUP) * LANES
    stop_BN = _last_blocks(query_BT2, source_BS2, bt, bs)
    # Inside jax.shard_map, outputs vary over the mesh axes that the inputs vary over.
    varying = jax.typeof(q_BTHK).manual_axis_type
    words_BTW = pl.pallas_call(
        functools.partial(_kernel, top_k=top_k, slots=S, interpret=bool(interpret)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, NT),
            in_specs=[
                pl.BlockSpec((1, H, bt, K), lambda b, i, stop: (b, 0, i, 0)),
                pl.BlockSpec((1, NS, bs, K), lambda b, i, stop: (b, 0, 0, 0)),
                pl.BlockSpec((1, bt, H), lambda b, i, stop: (b, i, 0)),
                pl.BlockSpec((1, bt, 2), lambda b, i, stop: (b, i, 0)),
                pl.BlockSpec((1, NS, 2, bs), lambda b, i, stop: (b, 0, 0, 0)),
            ],
            out_specs=pl.BlockSpec((1, bt, W), lambda b, i, stop: (b, i, 0)),
            scratch_shapes=[
                pltpu.VMEM((NS, bt, bs), jnp.int32),
                pltpu.VMEM((H, bt, LANES), jnp.float32),
                pltpu.VMEM((bt, LANES), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, NT * bt, W), jnp.int32, manual_axis_type=varying),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name="sparse_attention_select",
    )(
        stop_BN,
        jnp.swapaxes(q_BTHK, 1, 2),
        k_BSK.reshape(B, NS, bs, K),
        w_BTH,
        query_BT2,
        jnp.swapaxes(source_BS2.reshape(B, NS, bs, 2), 2, 3),
    )
    return words_BTW[:, :T]


def _last_blocks(query_BT2, source_BS2, bt, bs):
    """[B, N]: the block of keys after the last one that a block of queries may see."""

    def ranges(x_BT2, block):
        x_BNC2 = x_BT2.reshape(len(x_BT2), -1, block, 2)
        real_BNC1, most = x_BNC2[..., :1] > 0, jnp.iinfo(jnp.int32).max
        least = jnp.min(jnp.where(real_BNC1, x_BNC2, most), axis=2)
        return least, jnp.max(jnp.where(real_BNC1, x_BNC2, -1), axis=2)

    (t_least, t_most), (s_least, s_most) = ranges(query_BT2, bt), ranges(source_BS2, bs)
    meet_BNM = (t_least[:, :, None, 0] <= s_most[:, None, :, 0]) & (s_least[:, None, :, 0] <= t_most[:, :, None, 0])
    meet_BNM &= s_least[:, None, :, 1] <= t_most[:, :, None, 1]
    after_M = 1 + jnp.arange(s_least.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(meet_BNM, after_M, 0), axis=2)


def _kernel(stop, q, k, w, query, source, words, order, weights, first_out, *, top_k, slots, interpret):
    H, bt, bs = q.shape[1], q.shape[2], k.shape[2]
    count = stop[pl.program_id(0), pl.program_id(1)]
    for h in range(H):
        weights[h] = jnp.broadcast_to(w[0, :, h : h + 1], (bt, LANES))

    def score(n, _):
        total = jnp.zeros((bt, bs), jnp.float32)
        for h in range(H):
            weight = jnp.concatenate([weights[h]] * (bs // LANES), axis=1)
            total += jnp.maximum(_dot(q[0, h], k[0, n], interpret), 0) * weight
        bits = jax.lax.bitcast_convert_type(jnp.where(total == 0, 0.0, total), jnp.int32)
        bits = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
        segment, place = source[0, n, :1], source[0, n, 1:]
        seen = (query[0, :, :1] == segment) & (segment > 0) & (place <= query[0, :, 1:])
        order[n] = jnp.where(seen, bits, _UNSEEN)
        return 0

    jax.lax.fori_loop(0, count, score, 0)
    _choose(order, words, first_out, count, top_k, slots)


def _choose(order, words, first_out, count, top_k, slots):
    """Words from the scores' integers in blocks 0 … count-1 of ``order``."""
    _, bt, bs = order.shape
    tiles = [slice(c * LANES, (c + 1) * LANES) for c in range(bs // LANES)]
    lane = jax.lax.broadcasted_iota(jnp.int32, (bt, LANES), 1)

    def number(holds):
        """How many (order, slot) hold, by query, the same in every lane."""

        def add(n, total):
            for c, tile in enumerate(tiles):
                total += jnp.where(holds(order[n, :, tile], n * bs + c * LANES + lane), 1.0, 0.0)
            return total

        total = jax.lax.fori_loop(0, count, add, jnp.zeros((bt, LANES), jnp.float32))
        return jnp.broadcast_to(jnp.sum(total, axis=1, keepdims=True), (bt, LANES))

    def lower(n, least):
        """The highest bit is the sign: adding it to the least number gives 0."""
        higher = least + jax.lax.shift_left(jnp.int32(1), 31 - n)
        return jnp.where(number(lambda x, _: x >= higher) >= top_k, higher, least)

    least = jax.lax.fori_loop(0, 32, lower, jnp.full((bt, LANES), _UNSEEN, jnp.int32))
    first_out[...] = jnp.full((bt, LANES), slots, jnp.int32)
    surplus = jnp.where((least > _UNSEEN) & (number(lambda x, _: x >= least) > top_k), 1.0, 0.0)

    @pl.when(jnp.max(surplus) > 0)
    def _():
        wanted = top_k - number(lambda x, _: x > least)
        bits = max(1, (slots - 1).bit_length())

        def later(n, slot):
            """The last slot before which too few equals lie: it is itself the last one wanted."""
            after = slot + jax.lax.shift_left(jnp.int32(1), bits - 1 - n)
            return jnp.where(number(lambda x, s: (x == least) & (s < after)) < wanted, after, slot)

        last = jax.lax.fori_loop(0, bits, later, jnp.zeros((bt, LANES), jnp.int32))
        first_out[...] = jnp.where(surplus > 0, last + 1, slots)

    words[0] = jnp.zeros(words.shape[1:], jnp.int32)
    per_group = GROUP // bs
    above = jnp.maximum(least, _UNSEEN + 1)
    end = first_out[...]

    def write(n, _):
        lanes = pl.ds(pl.multiple_of(n // per_group * LANES, LANES), LANES)
        word = words[0, :, lanes]
        for c, tile in enumerate(tiles):
            x, slot = order[n, :, tile], n * bs + c * LANES + lane
            chosen = (x >= above) & ((x > least) | (slot < end))
            bit = jax.lax.shift_left(jnp.int32(1), n % per_group * len(tiles) + c)
            word |= jnp.where(chosen, bit, 0)
        words[0, :, lanes] = word
        return 0

    jax.lax.fori_loop(0, count, write, 0)


def _dot(x, y, interpret):
    """x yᵀ in float32."""
    if interpret:  # XLA:CPU lacks some bfloat16 products; these operands' float32 products are the same
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
