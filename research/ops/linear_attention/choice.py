"""The choice of an implementation, made when the call is lowered, behind one custom_vjp.

Every implementation under the choice saves residuals of the same shapes: the state before each block of chunks and, for the delta
rule, each chunk's inverse. So a program differentiated on one platform can be lowered for another.
"""

import functools
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from research.ops.linear_attention import chunked


class Plan(NamedTuple):
    """What is static about a call."""

    implementation: str | None
    scale: float
    chunk_size: int
    chunks: int


def tuned(T, K, V, per_channel, delta):
    """(chunk size, chunks a block) for the XLA form, by measurement on CPU at B1 H8 T4096 K=V=64 and at B16 H4 T256 K=V=32.

    Per-channel gates cost a pass of exponentials a level of the split, and the delta rule a solve: both want short chunks.
    The state is saved once a block; J chunks a block keep what is saved within about four times the size of v.
    """
    C = 16 if per_channel else 32 if delta else 64
    C = min(C, 1 << (T - 1).bit_length())
    return C, chunks_per_block(T, C, K, V)


def chunks_per_block(T, C, K, V):
    """How many chunks share one saved state."""
    return min(max(1, -(-min(K, V) // (4 * C))), -(-T // C))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan, q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, state_BHKV):
    """(o_BTHV, state_BHKV) of the chunked recurrence, by the implementation the plan or the platform names."""
    inputs = (q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, state_BHKV)
    return _choose(plan, chunked.forward, inputs, save=False)[:2]


def _attend_forward(plan, *inputs):
    o_BTHV, state_BHKV, saved = _choose(plan, chunked.forward, inputs, save=True)
    saved = checkpoint_name(saved, "linear_attention_states")
    return (o_BTHV, state_BHKV), (inputs[:-1], saved)


def _attend_backward(plan, residuals, cotangents):
    inputs, saved = residuals
    return _choose(plan, chunked.backward, (*inputs, saved, *cotangents))


attend.defvjp(_attend_forward, _attend_backward)


def _choose(plan, function, arrays, **options):
    run = functools.partial(function, scale=plan.scale, chunk_size=plan.chunk_size, chunks=plan.chunks, **options)
    if plan.implementation == "chunked":
        return run(*arrays)
    return jax.lax.platform_dependent(*arrays, default=run)
