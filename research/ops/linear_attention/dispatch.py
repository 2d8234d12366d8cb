"""The public functions: argument checks, segments, and the choice of an implementation."""

import functools
import numbers

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from research.axes import Array, Float, Int
from research.ops.explicit_mesh import run_on_shards, shards, spec_of, vary_alike
from research.ops.linear_attention import single
from research.ops.linear_attention.choice import attend, make_plan, refuses
from research.ops.linear_attention.quadratic import quadratic
from research.ops.linear_attention.recurrent import recurrent
from research.ops.linear_attention.segments import fold
from research.ops.segments import real_and_reset, select

_KERNELS = ("pallas_tpu", "pallas_gpu", "pallas_tpu_interpret", "pallas_gpu_interpret")
IMPLEMENTATIONS = ("recurrent", "quadratic", "chunked", *_KERNELS)


def linear_attention(
    q_BTGK: Float[Array, "B T G K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTHV: Float[Array, "B T H V"],
    *,
    log_decay: Float[Array, "..."] | None = None,
    beta: Float[Array, "B T H"] | None = None,
    scale: float = 1.0,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Run the linear recurrence over a sequence.

    For each value head, with state S [K, V], decay first, then write, then read:
    ``S ← e^g S;  u = v or β (v − Sᵀk);  S ← S + k uᵀ;  o = scale · Sᵀ q``.

    Args:
      q_BTGK, k_BTGK: queries and keys of G key heads; G divides H and value head i reads key head i // (H // G).
      v_BTHV: values of H heads.
      log_decay: g ≤ 0 (natural logarithm a token): None, [H], [B, T, H] or [B, T, H, K]. −inf erases.
      beta: write strength of the delta rule, [B, T, H]; None writes additively.
      scale: multiplies the output.
      initial_state: [B, H, K, V], zeros when None. It belongs to the row's first segment.
      segment_ids: [B, T]. A token whose id differs from the last non-zero id before it starts from a zero state. Id 0 is
        padding, anywhere: it outputs 0 and touches nothing, whatever its values.
      implementation: 'recurrent', 'quadratic', 'chunked' or a 'pallas_*' name; never falls back. None chooses for the
        platform when the call is lowered.
      chunk_size: tokens a chunk, a power of two; None is the tuned size. Only for chunked implementations.

    Returns:
      o_BTHV in v's dtype, and the state after the last real token, [B, H, K, V] in promote_types(input, float32).

    On an explicit-sharding mesh every device runs its own rows and heads, as v is split.

    Raises:
      ValueError: shapes that do not fit together, an unknown implementation, a sharded time axis.
      NotImplementedError: the named implementation cannot serve the call.

    Sources: Katharopoulos et al. 2020 (linear attention); Dao and Gu 2024 (Mamba-2); Yang et al. 2023 (GLA); Yang et al.
    2024 (DeltaNet, Gated DeltaNet); Kimi Team 2025 (KDA).
    """
    check_arguments(q_BTGK, k_BTGK, v_BTHV, log_decay, beta, initial_state, segment_ids)
    check_implementation(implementation, chunk_size)
    scale = check_scale(scale)
    arrays = (q_BTGK, k_BTGK, v_BTHV, log_decay, beta, initial_state, segment_ids)
    run = functools.partial(_local, scale=scale, implementation=implementation, chunk_size=chunk_size)
    split = spec_of(v_BTHV)
    if split is None:
        return run(*arrays)
    b, t, h, _ = split
    if t is not None:
        raise ValueError(f"the time axis of v must not be sharded, got {split}; use context_parallel in jax.shard_map")
    h = None if k_BTGK.shape[2] % shards(v_BTHV, h) else h
    token, head = P(b, None, h), P(h)
    specs = (
        token,
        token,
        token,
        head if log_decay is not None and log_decay.ndim == 1 else token,
        token,
        P(b, h),
        P(b),
    )
    return run_on_shards(run, v_BTHV, arrays, specs, (token, P(b, h)))


def linear_attention_step(
    q_BGK: Float[Array, "B G K"],
    k_BGK: Float[Array, "B G K"],
    v_BHV: Float[Array, "B H V"],
    state_BHKV: Float[Array, "B H K V"],
    *,
    log_decay: Float[Array, "..."] | None = None,
    beta: Float[Array, "B H"] | None = None,
    scale: float = 1.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """Run the recurrence of ``linear_attention`` for one token: decoding, in constant memory a token.

    Args:
      q_BGK, k_BGK, v_BHV: the token. state_BHKV: the state before it.
      log_decay: None, [H], [B, H] or [B, H, K]. beta: None or [B, H]. scale: multiplies the output.
      implementation: 'recurrent', 'pallas_tpu', 'pallas_gpu' or one of these with '_interpret'; never falls back. None
        chooses for the platform when the call is lowered.

    Returns:
      o_BHV in v's dtype and the new state in promote_types(input, float32).

    Raises:
      ValueError: shapes that do not fit together, an unknown implementation.
      NotImplementedError: the named implementation has no step, or cannot serve the call.
    """
    check_implementation(implementation, None)
    if implementation not in single.IMPLEMENTATIONS:
        raise NotImplementedError(f"implementation={implementation!r} has no step: one token is 'recurrent'")
    scale = check_scale(scale)
    one = lambda x: None if x is None else jnp.expand_dims(x, 1)  # noqa: E731
    log_decay_T = log_decay if log_decay is None or log_decay.ndim == 1 else one(log_decay)
    check_arguments(one(q_BGK), one(k_BGK), one(v_BHV), log_decay_T, one(beta), state_BHKV, None)
    arrays = (q_BGK, k_BGK, v_BHV, state_BHKV, log_decay, beta)
    run = functools.partial(_local_step, implementation, scale)
    split = spec_of(v_BHV)
    if split is None:
        return run(*arrays)
    b, h, _ = split
    h = None if k_BGK.shape[1] % shards(v_BHV, h) else h
    rows = P(b, h)
    specs = (rows, rows, rows, rows, P(h) if log_decay is not None and log_decay.ndim == 1 else rows, rows)
    return run_on_shards(run, v_BHV, arrays, specs, (rows, rows))


def _local(q_BTGK, k_BTGK, v_BTHV, log_decay, beta, initial_state, segment_ids, *, scale, implementation, chunk_size):
    B, T, H, V = v_BTHV.shape
    K = k_BTGK.shape[-1]
    dtype = state_dtype(q_BTGK, k_BTGK, v_BTHV, log_decay, beta, initial_state)
    if initial_state is None:
        state_BHKV = jnp.zeros((B, H, K, V), dtype)
    else:
        state_BHKV = initial_state.astype(dtype)
    g = None if log_decay is None else log_decay.astype(dtype)
    beta_BTH = None if beta is None else beta.astype(dtype)
    if g is not None and g.ndim == 1:
        g = jnp.broadcast_to(g, (B, T, H))
    real_BT = None
    if segment_ids is not None:
        real_BT, reset_BT = real_and_reset(segment_ids)
        q_BTGK, k_BTGK, v_BTHV, g, beta_BTH = fold(real_BT, reset_BT, q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, dtype)
    arrays = vary_alike((q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, state_BHKV))
    o_BTHV, state_BHKV = _run(implementation, scale, chunk_size, *arrays)
    if real_BT is not None:
        o_BTHV = select(real_BT, o_BTHV)
    return o_BTHV, state_BHKV


def _local_step(implementation, scale, q_BGK, k_BGK, v_BHV, state_BHKV, log_decay, beta):
    dtype = state_dtype(q_BGK, k_BGK, v_BHV, log_decay, beta, state_BHKV)
    g_BH = log_decay
    if g_BH is not None and g_BH.ndim == 1:
        g_BH = jnp.broadcast_to(g_BH, v_BHV.shape[:2])
    cast = lambda x: None if x is None else x.astype(dtype)  # noqa: E731
    arrays = vary_alike(tuple(cast(x) for x in (q_BGK, k_BGK, v_BHV, g_BH, beta, state_BHKV)))
    stepped: Any = single.step(implementation, scale, *arrays)
    o_BHV, new_BHKV = stepped
    return o_BHV.astype(v_BHV.dtype), new_BHKV


def _run(implementation, scale, chunk_size, q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, state_BHKV) -> tuple[Array, Array]:
    arrays = (q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, state_BHKV)
    if implementation == "recurrent":
        return recurrent(*arrays, scale)
    if implementation == "quadratic":
        return quadratic(*arrays, scale)
    per_channel, delta = g is not None and g.ndim == 4, beta_BTH is not None
    shape = v_BTHV.shape[1], k_BTGK.shape[-1], v_BTHV.shape[-1]
    plan = make_plan(implementation, scale, chunk_size, *shape, per_channel, delta)
    if implementation in _KERNELS:
        why = refuses(plan, arrays)
        if why:
            raise NotImplementedError(f"implementation={implementation!r} cannot serve this call: {why}")
    return attend(plan, *arrays)


def state_dtype(*arrays):
    """promote_types(input, float32)."""
    return jnp.promote_types(jnp.result_type(*(x for x in arrays if x is not None)), jnp.float32)


def check_scale(scale) -> float:
    """``scale`` as a float; a traced value is refused (multiply q by it instead)."""
    if not isinstance(scale, numbers.Real):
        raise ValueError(f"scale must be a Python number, got {type(scale).__name__}; multiply q by an array instead")
    return float(scale)


def check_implementation(implementation, chunk_size) -> None:
    """Refuse unknown names and chunk sizes that cannot be honoured."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    if chunk_size is None:
        return
    if implementation in ("recurrent", "quadratic"):
        raise NotImplementedError(f"implementation={implementation!r} has no chunks; got chunk_size={chunk_size}")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be None or a positive power of two, got {chunk_size!r}")
    if chunk_size & (chunk_size - 1):
        raise NotImplementedError(f"chunk_size must be a power of two, got {chunk_size}")


def check_arguments(q_BTGK, k_BTGK, v_BTHV, log_decay, beta, initial_state, segment_ids) -> None:
    """Name the argument whose shape does not fit, what it was and what it must be."""
    for name, x, axes in (("q", q_BTGK, "[B, T, G, K]"), ("k", k_BTGK, "[B, T, G, K]"), ("v", v_BTHV, "[B, T, H, V]")):
        if x.ndim != 4:
            raise ValueError(f"{name} must be {axes}, got shape {x.shape}")
    if q_BTGK.shape != k_BTGK.shape:
        raise ValueError(f"q and k must have one shape, got {q_BTGK.shape} and {k_BTGK.shape}")
    B, T, H, V = v_BTHV.shape
    G, K = k_BTGK.shape[2:]
    if k_BTGK.shape[:2] != (B, T):
        raise ValueError(
            f"v must be [B, T, H, V] with k's B={k_BTGK.shape[0]} and T={k_BTGK.shape[1]}, got {v_BTHV.shape}"
        )
    if T < 1:
        raise ValueError(f"T must be at least 1, got shape {v_BTHV.shape} for v")
    if G < 1 or H % G:
        raise ValueError(f"the number of key heads G={G} must divide the number of value heads H={H}")
    allowed = [(H,), (B, T, H), (B, T, H, K)]
    if log_decay is not None and log_decay.shape not in allowed:
        raise ValueError(
            f"log_decay must be [H]={allowed[0]}, [B, T, H]={allowed[1]} or [B, T, H, K]={allowed[2]}, "
            f"got shape {log_decay.shape}"
        )
    for name, x, shape in (
        ("beta", beta, (B, T, H)),
        ("initial_state", initial_state, (B, H, K, V)),
        ("segment_ids", segment_ids, (B, T)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {x.shape}")
    for name, x in (("q", q_BTGK), ("k", k_BTGK), ("v", v_BTHV), ("log_decay", log_decay), ("beta", beta)):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids must be integers, got {segment_ids.dtype}")
