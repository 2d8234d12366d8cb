"""The public function: argument checks, padding, and the choice of an implementation behind one custom_vjp."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.axes import Array, Float, Int, UInt32
from research.ops.attention import blocked, kernels
from research.ops.attention.dense import dense
from research.ops.attention.masks import Tokens, tokens_of
from research.ops.kept import keepable

IMPLEMENTATIONS = ("dense", "blocked", "splash", "splash_interpret", "cudnn", "pallas_tpu", "pallas_tpu_interpret")
# Scores per row and head up to which all of them at once are faster than blocks, and few enough queries for any row.
_DENSE, _FEW = 1 << 18, 8
# The largest array that says which keys were selected, in bytes.
_CHOSEN = 1 << 26


class Plan(NamedTuple):
    """What is static about a call. ``aligned``: the keys are the queries' own tokens; ``packed``: there are segment ids."""

    implementation: str | None
    window: int | None
    chunk: int | None
    softcap: float | None
    block: int
    aligned: bool
    packed: bool


def attention(
    q_BTHK: Float[Array, "B T H K"],
    k_BSGK: Float[Array, "B S G K"],
    v_BSGV: Float[Array, "B S G V"],
    *,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks_H: Float[Array, " H"] | None = None,
    temperature_BT: Float[Array, "B T"] | None = None,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    source_segment_ids_BS: Int[Array, "B S"] | None = None,
    places_BT: Int[Array, "B T"] | None = None,
    source_places_BS: Int[Array, "B S"] | None = None,
    selected_BTN: Int[Array, "B T N"] | UInt32[Array, "B T W"] | None = None,
    implementation: str | None = None,
    block_size: int | None = None,
) -> Float[Array, "B T H V"]:
    """Causal softmax attention (Vaswani et al. 2017, eq. 1): query head i reads key head ``i // (H // G)``.

    A query sees the keys of its own document up to its own place. Id 0 is padding: it sees nothing, nothing sees it, and its
    output is 0 (NaN in it reaches nothing, gradients included); windows and chunks count real tokens of the document.

    Args:
      scale: of the scores; K^-1/2 by default.
      window: places a query sees, itself included; None is all.
      chunk: a query sees keys of its own run of ``chunk`` places alone (Llama 4).
      softcap: c·tanh(score / c) takes the place of the score (Gemma 2, Grok-1).
      sinks_H: a score per head that takes part in the softmax and has no value (gpt-oss).
      temperature_BT: multiplies the scores of each query (Llama 4).
      segment_ids_BT: document of each query; None is one document a row.
      source_segment_ids_BS: document of each key; the queries' own by default, and required where S ≠ T and ids are given.
        With it ids of queries and keys are compared as they are, and keys and values must be finite, those of id 0 too:
        they are a cache's, and selecting would copy it whole.
      places_BT, source_places_BS: place of each query and key in its document, where they are not the rows themselves: a
        cache's keys are at 0 … S-1 by default, and its queries behind them.
      selected_BTN: distinct slots of the keys that each query sees of those that it could (at least one of them); a slot of S
        is none. Or, as uint32, one bit a key (``research.ops.sparse_attention.select_mask``). Scores of the others are still
        computed: ``research.ops.sparse_attention`` reads these alone.
      implementation: 'dense' (the definition), 'blocked' (XLA in bounded memory), 'splash' (TPU; its window counts slots,
        so documents must be without padding inside), 'splash_interpret', 'cudnn', 'pallas_tpu' (selections of one bit a key),
        'pallas_tpu_interpret'; never falls back. None takes 'dense' for short calls, else chooses for the platform when lowered.
      block_size: tokens a block of 'blocked'; None is 512.

    Returns:
      [B, T, H, V] in v's dtype; scores and sums are float32 or wider.

    Raises:
      ValueError: shapes or numbers that do not fit; names the argument.
      NotImplementedError: the named implementation cannot serve the call.
    """
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    _check(H, G, window, chunk, softcap, implementation, block_size)
    aligned = source_segment_ids_BS is None and source_places_BS is None and places_BT is None and S == T
    if segment_ids_BT is not None and source_segment_ids_BS is None and S != T:
        raise ValueError(f"source_segment_ids_BS is needed where keys ({S}) and queries ({T}) differ in number")
    packed = segment_ids_BT is not None or source_segment_ids_BS is not None
    if aligned:
        query = source = tokens_of(segment_ids_BT, (B, T))
    else:
        source_ids_BS = segment_ids_BT if source_segment_ids_BS is None else source_segment_ids_BS
        query = _given(segment_ids_BT, places_BT, (B, T))
        source = _given(source_ids_BS, source_places_BS, (B, S))
    if packed:
        q_BTHK = _zero_padding(q_BTHK, query)
    if aligned and packed:
        k_BSGK, v_BSGV = _zero_padding(k_BSGK, source), _zero_padding(v_BSGV, source)
    q_BTHK = q_BTHK * jnp.asarray(K**-0.5 if scale is None else scale, q_BTHK.dtype)
    if temperature_BT is not None:
        q_BTHK = q_BTHK * temperature_BT[:, :, None, None].astype(q_BTHK.dtype)
    # A window or chunk that holds the longest row is none.
    longest = T if aligned else None
    window, chunk = (None if n is not None and longest is not None and n >= longest else n for n in (window, chunk))
    block = min(512 if block_size is None else block_size, 1 << (max(S, T) - 1).bit_length())
    if implementation is None and (T * S <= _DENSE or T <= _FEW):
        implementation = "dense"
    if selected_BTN is not None:
        block = min(block, max(64, 1 << (max(1, _CHOSEN // (B * S)).bit_length() - 1)))
    plan = Plan(implementation, window, chunk, softcap, block, aligned, packed)
    arrays = (q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN)
    o_BTHV: Any = dense(plan, *arrays) if implementation == "dense" else _attend(plan, *arrays)
    return _zero_padding(o_BTHV, query) if packed else o_BTHV


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, *arrays):
    return _forward(plan, *arrays)[0]


def _forward(plan, *arrays):
    """(o, residuals): the residuals have the same shapes whatever runs."""
    o_BTHV, lse_BHT = _choose(plan, arrays, "forward")
    o_BTHV, lse_BHT = keepable((o_BTHV, lse_BHT), "attention")
    return o_BTHV, (*arrays, o_BTHV, lse_BHT)


def _backward(plan, residuals, do_BTHV):
    return *_choose(plan, (*residuals, do_BTHV), "backward"), None, None, None


_attend.defvjp(_forward, _backward)


def _library(kernel):
    """(forward, backward) of a kernel that keeps its residuals to itself: its forward pass runs again."""

    def forward(plan, *arrays):
        B, T, H, _ = arrays[0].shape
        return kernel(plan, *arrays), jnp.zeros((B, H, T), jnp.promote_types(arrays[0].dtype, jnp.float32))

    def backward(plan, q_BTHK, k_BSGK, v_BSGV, sinks_H, query, source, selected_BTN, o_BTHV, lse_BHT, do_BTHV):
        floats = (q_BTHK, k_BSGK, v_BSGV, sinks_H)
        return jax.vjp(lambda *floats: kernel(plan, *floats, query, source, selected_BTN), *floats)[1](do_BTHV)

    return {"forward": forward, "backward": backward}


def _choose(plan, arrays, way):
    """The blocked form, or the kernel that the plan or the platform names."""
    run_blocked = functools.partial(getattr(blocked, way), plan)
    if plan.implementation == "blocked":
        return run_blocked(*arrays)
    call = (plan, *arrays[:7])
    if plan.implementation is not None:
        refuse, ways, _ = _KERNELS[plan.implementation]
        if why := refuse(*call):
            raise NotImplementedError(f"implementation={plan.implementation!r} cannot serve this call: {why}")
        return ways[way](plan, *arrays)

    def run_kernel(run, miscounts, *arrays):
        miscounted = miscounts(plan, arrays[4])
        if miscounted is None:
            return run(plan, *arrays)
        return jax.lax.cond(miscounted, run_blocked, functools.partial(run, plan), *arrays)

    own = "splash" if arrays[6] is None else "pallas_tpu"
    served = {
        platform: functools.partial(run_kernel, ways[way], miscounts)
        for platform, (refuse, ways, miscounts) in {"tpu": _KERNELS[own], "cuda": _KERNELS["cudnn"]}.items()
        if refuse(*call) is None
    }
    return jax.lax.platform_dependent(*arrays, default=run_blocked, **served)


def _selected(**options):
    ways = {"forward": kernels.selected_forward, "backward": kernels.selected_backward}
    ways = {name: functools.partial(run, **options) for name, run in ways.items()}
    return kernels.refuse_selected, ways, lambda plan, query: None


# name: why it can't serve a call, its ways, and whether it would serve these documents wrongly.
_KERNELS = {
    "splash": (kernels.refuse_splash, _library(kernels.splash), kernels.splash_miscounts),
    "splash_interpret": (
        kernels.refuse_splash, _library(functools.partial(kernels.splash, interpret=True)), kernels.splash_miscounts
    ),
    "cudnn": (kernels.refuse_cudnn, _library(kernels.cudnn), lambda plan, query: None),
    "pallas_tpu": _selected(),
    "pallas_tpu_interpret": _selected(interpret=True),
}  # fmt: skip


def _given(segment_ids_BT, places_BT, shape) -> Tokens:
    """Tokens as the caller describes them; the rest as in a cache: one document, in order."""
    segment_BT = jnp.ones(shape, jnp.int32) if segment_ids_BT is None else segment_ids_BT
    if places_BT is None:
        places_BT = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    return Tokens(segment_BT, places_BT)


def _zero_padding(x_BTHK, tokens: Tokens):
    return jnp.where((tokens.segment_BT > 0)[:, :, None, None], x_BTHK, 0)


def _check(H, G, window, chunk, softcap, implementation, block_size) -> None:
    if H % G:
        raise ValueError(f"query heads must be a multiple of key heads, got {H} over {G}")
    for name, value in (("window", window), ("chunk", chunk), ("block_size", block_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be None or at least 1, got {value}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be None or more than 0, got {softcap}")
    check_implementation(implementation)


def check_implementation(implementation) -> None:
    """Raises ValueError for an unknown name."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
