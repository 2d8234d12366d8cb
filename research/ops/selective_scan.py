"""Mamba-1's selective scan (Gu & Dao 2023, arXiv 2312.00752, eq. 2 with the discretisation of section 3.6).

    h_t[d, k] = e^{dt_t[d] A[d, k]} h_{t−1}[d, k] + dt_t[d] B_t[k] x_t[d]        y_t[d] = Σ_k C_t[k] h_t[d, k] + skip[d] x_t[d]

It is ``linear_attention`` with V = 1, a head a channel and one gate a channel and state, whose keys and queries all heads share.
There is no matrix product to gain from: so it has its own scan. A chunk's tokens are cut into blocks; the recurrence runs
through all blocks at once, then from block to block, and what enters a block is added to it. Decays are only ever multiplied, so
nothing overflows. From chunk to chunk it is recurrent. The backward pass keeps the states between chunks alone (K / 64 of x a
channel) and recomputes a chunk at a time.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from research.axes import Array, Float, Int
from research.ops.explicit_mesh import run_on_shards, spec_of, vary_alike
from research.ops.segments import real_and_reset, select
from research.ops.sequence_shards import compose, previous_id

Implementation = Literal["recurrent", "chunked"]
# Of 16 to 256 by forward and backward time on CPU at D=256 and 512, K=16. jax.lax.associative_scan inside a chunk is slower.
_CHUNK = 64


def selective_scan(
    x_BTD: Float[Array, "B T D"],
    dt_BTD: Float[Array, "B T D"],
    A_DK: Float[Array, "D K"],
    B_BTK: Float[Array, "B T K"],
    C_BTK: Float[Array, "B T K"],
    *,
    skip_D: Float[Array, " D"] | None = None,
    dt_bias_D: Float[Array, " D"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Array, "B D K"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D K"]]:
    """Run the selective recurrence over a sequence, each channel with K states of its own.

    Args:
      x_BTD: inputs of D channels.
      dt_BTD: step sizes; with ``dt_bias_D`` added and, if ``dt_softplus``, through softplus. What comes out must be ≥ 0.
      A_DK: rates, ≤ 0.
      B_BTK, C_BTK: how each token writes to and reads from the states, the same for every channel.
      skip_D: weight of the token's own input in its output; none when None.
      initial_state: [B, D, K], zeros when None. It belongs to the row's first segment.
      segment_ids: [B, T], as for ``linear_attention``: a token whose id differs from the last non-zero id before it starts
        from a zero state; id 0 is padding, which outputs 0 and touches nothing, whatever its values.
      implementation: 'recurrent' (token by token: the definition), 'chunked', or None, which is 'chunked' except that on a
        CPU the forward pass walks a chunk token by token.
      chunk_size: tokens a chunk, a power of two; None is the tuned size.
      axis_name: inside ``jax.shard_map``, the mesh axis over which the sequence is sharded. ``initial_state`` and the state
        returned are then the whole sequence's, the same on every shard, and segments may cross shards.

    Returns:
      y_BTD in x's dtype, and the state after the last real token, [B, D, K] in promote_types(input, float32).

    On an explicit-sharding mesh every device runs its own rows and channels, as x is split.

    Raises:
      ValueError: shapes that do not fit together, an unknown implementation, a sharded time axis.
      NotImplementedError: a chunk size that the implementation cannot honour.
    """
    check_arguments(x_BTD, dt_BTD, A_DK, B_BTK, C_BTK, skip_D, dt_bias_D, initial_state, segment_ids)
    check_form(implementation, chunk_size)
    run = functools.partial(_local, dt_softplus, implementation, chunk_size, axis_name)
    arrays = (x_BTD, dt_BTD, A_DK, B_BTK, C_BTK, skip_D, dt_bias_D, initial_state, segment_ids)
    split = spec_of(x_BTD)
    if split is None:
        return run(*arrays)
    b, t, d = split
    if t is not None:
        raise ValueError(f"the time axis of x must not be sharded, got {split}")
    rows, channels, state = P(b, None, d), P(d), P(b, d)
    specs = (rows, rows, channels, P(b), P(b), channels, channels, state, P(b))
    return run_on_shards(run, x_BTD, arrays, specs, (rows, state))


def selective_scan_step(
    x_BD: Float[Array, "B D"],
    dt_BD: Float[Array, "B D"],
    A_DK: Float[Array, "D K"],
    B_BK: Float[Array, "B K"],
    C_BK: Float[Array, "B K"],
    state_BDK: Float[Array, "B D K"],
    *,
    skip_D: Float[Array, " D"] | None = None,
    dt_bias_D: Float[Array, " D"] | None = None,
    dt_softplus: bool = False,
) -> tuple[Float[Array, "B D"], Float[Array, "B D K"]]:
    """One token of ``selective_scan``: returns its output and the new state."""
    y_BTD, state_BDK = selective_scan(
        x_BD[:, None], dt_BD[:, None], A_DK, B_BK[:, None], C_BK[:, None], skip_D=skip_D, dt_bias_D=dt_bias_D,
        dt_softplus=dt_softplus, initial_state=state_BDK, implementation="recurrent",
    )  # fmt: skip
    return y_BTD[:, 0], state_BDK


def _local(dt_softplus, implementation, chunk_size, axis_name, *arrays):
    x_BTD, dt_BTD, A_DK, B_BTK, C_BTK, skip_D, dt_bias_D, state, ids = arrays
    dtype = jnp.promote_types(jnp.result_type(*(x for x in arrays[:-1] if x is not None)), jnp.float32)
    state_BDK = jnp.zeros((x_BTD.shape[0], *A_DK.shape), dtype) if state is None else state.astype(dtype)
    y_dtype, A_DK, real_BT, reset_BT = x_BTD.dtype, A_DK.astype(dtype), None, None
    if ids is not None:
        real_BT, reset_BT = real_and_reset(ids, None if axis_name is None else previous_id(ids, axis_name))
        x_BTD, dt_BTD, B_BTK, C_BTK = (select(real_BT, x) for x in (x_BTD, dt_BTD, B_BTK, C_BTK))
    dt_BTD = dt_BTD.astype(dtype)
    dt_BTD = dt_BTD if dt_bias_D is None else dt_BTD + dt_bias_D.astype(dtype)
    dt_BTD = jax.nn.softplus(dt_BTD) if dt_softplus else dt_BTD
    if real_BT is not None:
        dt_BTD = select(real_BT, dt_BTD)  # a step of no length: nothing decays, nothing is written
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (x_BTD, dt_BTD, B_BTK, C_BTK, reset_BT))
    walk = functools.partial(_walk, implementation, chunk_size, tokens, A_DK)
    if axis_name is None:
        y_TBD, state_BDK = walk(state_BDK)
    else:
        # Shards walk from nothing, learn what enters them, and walk again from that.
        decay_BDK = jnp.exp(jnp.sum(dt_BTD, axis=1)[..., None] * A_DK)
        if reset_BT is not None:
            decay_BDK = jnp.where(jnp.any(reset_BT, axis=1)[:, None, None], 0, decay_BDK)
        written_BDK = walk(jnp.zeros_like(state_BDK))[1]
        entering_BDK, state_BDK = compose(jnp.multiply, decay_BDK, written_BDK, state_BDK, axis_name)
        y_TBD, _ = walk(entering_BDK)
    y_BTD = jnp.moveaxis(y_TBD, 0, 1)
    if skip_D is not None:
        y_BTD = y_BTD + skip_D.astype(dtype) * x_BTD.astype(dtype)
    y_BTD = y_BTD if real_BT is None else select(real_BT, y_BTD)
    return y_BTD.astype(y_dtype), state_BDK


def _walk(implementation, chunk_size, tokens, A_DK, state_BDK):
    """(y_TBD, the last state); tokens lead with [T, B]."""
    arguments = vary_alike((tokens, A_DK, state_BDK))
    if implementation == "recurrent":
        return _recurrent(*arguments)
    T = tokens[0].shape[0]
    return _chunked(implementation, chunk_size or min(_CHUNK, 1 << (T - 1).bit_length()), *arguments)


def _terms(token, A_DK):
    """(decay, write, C) of tokens with any leading axes: a [..., D, K], b [..., D, K], C [..., K]."""
    x, dt, B, C, reset = token
    dtype = A_DK.dtype
    decay = jnp.exp(dt[..., None] * A_DK)
    decay = decay if reset is None else jnp.where(reset[..., None, None], 0, decay)
    write = (dt * x.astype(dtype))[..., None] * B.astype(dtype)[..., None, :]
    return decay, write, C.astype(dtype)


def _recurrent(tokens, A_DK, h_BDK):
    """Token by token; tokens lead with [T, B]."""

    def body(h_BDK, token):
        decay_BDK, write_BDK, C_BK = _terms(token, A_DK)
        h_BDK = decay_BDK * h_BDK + write_BDK
        return h_BDK, jnp.sum(C_BK[:, None] * h_BDK, axis=-1)

    h_BDK, y_TBD = jax.lax.scan(body, h_BDK, tokens)
    return y_TBD, h_BDK


def _parallel(tokens, A_DK, h_BDK):
    """All states of the tokens at once; tokens lead with [C, B]."""
    decay_CBDK, write_CBDK, C_CBK = _terms(tokens, A_DK)
    h_CBDK = _states(decay_CBDK, write_CBDK, h_BDK)
    return jnp.sum(C_CBK[:, :, None] * h_CBDK, axis=-1), h_CBDK[-1]


def _chunked(implementation, C, tokens, A_DK, h_BDK):
    T, B, D = tokens[0].shape
    J = -(-T // C)

    def chunks(x_TB):
        """[J, C, B, ...], the last chunk filled up with steps of no length."""
        x_TB = jnp.pad(x_TB, [(0, J * C - T)] + [(0, 0)] * (x_TB.ndim - 1))
        return x_TB.reshape(J, C, *x_TB.shape[1:])

    def body(h_BDK, chunk):
        stepped: Any = _chunk(implementation, chunk, A_DK, h_BDK)
        return stepped[1], stepped[0]

    h_BDK, y_JCBD = jax.lax.scan(body, h_BDK, jax.tree.map(chunks, tokens))
    return y_JCBD.reshape(J * C, B, D)[:T], h_BDK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk(implementation, tokens, A_DK, h_BDK):
    """(y_CBD, the state after the chunk); keeps nothing but its arguments for the backward pass."""
    if implementation == "chunked":
        return _parallel(tokens, A_DK, h_BDK)
    # A CPU has no use for more parallelism than rows and channels offer, and all states at once is twice the work.
    return jax.lax.platform_dependent(tokens, A_DK, h_BDK, cpu=_recurrent, default=_parallel)


def _chunk_forward(implementation, *arguments):
    return _chunk(implementation, *arguments), arguments


def _chunk_backward(implementation, arguments, cotangents):
    return jax.vjp(_parallel, *arguments)[1](cotangents)


_chunk.defvjp(_chunk_forward, _chunk_backward)


@jax.custom_vjp
def _states(a_C, b_C, h):
    """All h_t = a_t h_{t−1} + b_t of a chunk, elementwise, from the state before it."""
    return _blocked(a_C, b_C, h)


def _states_forward(a_C, b_C, h):
    h_C = _blocked(a_C, b_C, h)
    return h_C, (a_C, h_C, h)


def _states_backward(residuals, dh_C):
    """The same recurrence the other way: λ_t = dh_t + a_{t+1} λ_{t+1}; db = λ, da_t = λ_t h_{t−1}."""
    a_C, h_C, h = residuals
    next_C = jnp.concatenate([a_C[1:], jnp.zeros_like(a_C[:1])])
    lambda_C = _blocked(next_C[::-1], dh_C[::-1], jnp.zeros_like(h))[::-1]
    before_C = jnp.concatenate([h[None], h_C[:-1]])
    return lambda_C * before_C, lambda_C, a_C[0] * lambda_C[0]


_states.defvjp(_states_forward, _states_backward)


def _blocked(a_C, b_C, h):
    """n blocks of s tokens: inside all blocks at once, then from block to block."""
    C = a_C.shape[0]
    s = 1 << (C.bit_length() // 2)
    a_ns, b_ns = (x.reshape(C // s, s, *x.shape[1:]) for x in (a_C, b_C))
    decays, states = [a_ns[:, 0]], [b_ns[:, 0]]
    for i in range(1, s):
        decays.append(a_ns[:, i] * decays[-1])
        states.append(a_ns[:, i] * states[-1] + b_ns[:, i])
    decay_ns, state_ns = jnp.stack(decays, axis=1), jnp.stack(states, axis=1)
    entering = [h]
    for n in range(C // s - 1):
        entering.append(decays[-1][n] * entering[-1] + states[-1][n])
    return (state_ns + decay_ns * jnp.stack(entering)[:, None]).reshape(a_C.shape)


def check_form(implementation, chunk_size) -> None:
    """Refuse an unknown implementation, and chunks it cannot have."""
    if implementation not in (None, "recurrent", "chunked"):
        raise ValueError(f"implementation must be None, 'recurrent' or 'chunked'; got {implementation!r}")
    if chunk_size is None:
        return
    if implementation == "recurrent":
        raise NotImplementedError(f"implementation='recurrent' has no chunks; got chunk_size={chunk_size}")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be None or a positive power of two, got {chunk_size!r}")
    if chunk_size & (chunk_size - 1):
        raise NotImplementedError(f"implementation='chunked' needs chunk_size to be a power of two, got {chunk_size}")


def check_arguments(x_BTD, dt_BTD, A_DK, B_BTK, C_BTK, skip_D, dt_bias_D, initial_state, segment_ids) -> None:
    """Name the argument whose shape does not fit, what it was and what it must be."""
    if x_BTD.ndim != 3 or x_BTD.shape[1] < 1:
        raise ValueError(f"x must be [B, T, D] with T at least 1, got shape {x_BTD.shape}")
    B, T, D = x_BTD.shape
    if A_DK.ndim != 2 or A_DK.shape[0] != D:
        raise ValueError(f"A must be [D, K] with D={D}, got shape {A_DK.shape}")
    K = A_DK.shape[1]
    shapes: tuple[tuple[str, Any, tuple[int, ...]], ...] = (
        ("dt", dt_BTD, (B, T, D)),
        ("B", B_BTK, (B, T, K)),
        ("C", C_BTK, (B, T, K)),
        ("skip", skip_D, (D,)),
        ("dt_bias", dt_bias_D, (D,)),
        ("initial_state", initial_state, (B, D, K)),
        ("segment_ids", segment_ids, (B, T)),
    )
    for name, value, shape in shapes:
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {value.shape}")
