"""One chunk of the recurrence with no gate or one gate a token and head: forward, and backward by hand.

    E_ij = e^{span(j, i]}        P = tril(q kᵀ) ⊙ E        A = β_i (k kᵀ)_ij E_ij  (i > j)        X = (I + A)⁻¹
    a_i = e^{span[0, i]}         z_j = e^{span(j, C)}      Z = e^{span[0, C)}
    U = v − a (k S)              v' = X β U   (delta rule)  or  v' = v   (additive)
    o = scale · (a (q S) + P v')                           S ← Z S + kᵀ (z v')

Products of q and k are made once a key head; only what meets a state is repeated to value heads. Axes: N = B·G key-head
rows, M = B·H value-head rows, C tokens. The state, the decay and the solve are in the accumulation dtype.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.axes import Array
from research.ops.linear_attention.solve import unit_lower_inverse

# e^−10⁴ is 0 in float64 too, and a masked sum by matrix product must not meet −inf · 0.
_ERASE = -1e4


class Decay(NamedTuple):
    """Decay factors of a chunk: within (E), from its start (a), to its end (z), across it (Z)."""

    E_MCC: Array
    a_MC1: Array
    z_MC1: Array
    Z_M11: Array


def decay(g_MC) -> Decay:
    """All factors of a chunk, every span summed directly: D_ij = Σ_l [l ≤ i] g_l [l > j]."""
    C = g_MC.shape[1]
    lower_CC = jnp.tril(jnp.ones((C, C), bool))
    g_MC = jnp.maximum(g_MC, _ERASE)
    rows_MCC = jnp.where(lower_CC, g_MC[:, None, :], 0)
    after_CC = jnp.tril(jnp.ones((C, C), g_MC.dtype), -1)
    D_MCC = jnp.einsum("mil,lj->mij", rows_MCC, after_CC, precision=jax.lax.Precision.HIGHEST)
    a_MC1 = jnp.exp(g_MC[:, :1] + D_MCC[:, :, 0])[..., None]
    return Decay(jnp.where(lower_CC, jnp.exp(D_MCC), 0), a_MC1, jnp.exp(D_MCC[:, -1, :])[..., None], a_MC1[:, -1:, :])


def decay_gradient(Q_MCC, c_MC, e_MC, f_M):
    """dg_l = Σ over spans that contain l of (factor · its gradient): Q for E, c for a, e for z, f for Z."""
    C = c_MC.shape[1]
    last_C = jnp.arange(C) == C - 1
    Q_MCC = Q_MCC + jnp.where(last_C[:, None], e_MC[:, None, :], 0)
    c_MC = c_MC + jnp.where(last_C, f_M[:, None], 0)
    before_CC = jnp.triu(jnp.ones((C, C), c_MC.dtype), 1)
    rows_MCC = c_MC[..., None] + jnp.einsum("mij,jl->mil", Q_MCC, before_CC, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.where(jnp.tril(jnp.ones((C, C), bool)), rows_MCC, 0), axis=1)


def forward(q_NCK, k_NCK, v_MCV, g_MC, beta_MC, S_MKV):
    """Returns (o without its scale, the next state, the inverse X or None)."""
    r = v_MCV.shape[0] // k_NCK.shape[0]
    C = v_MCV.shape[1]
    q_MCK, k_MCK = _repeat(q_NCK, r), _repeat(k_NCK, r)
    d = None if g_MC is None else decay(g_MC)
    E_MCC = jnp.tril(jnp.ones((C, C), S_MKV.dtype))[None] if d is None else d.E_MCC
    P_MCC = _heads(_nt(q_NCK, k_NCK), E_MCC, r)
    qS_MCV = _nn(q_MCK, S_MKV)
    X_MCC, u_MCV = None, v_MCV
    if beta_MC is not None:
        A_MCC = _heads(_nt(k_NCK, k_NCK), E_MCC, r) * beta_MC[..., None]
        X_MCC = unit_lower_inverse(A_MCC)
        kS_MCV = _nn(k_MCK, S_MKV)
        U_MCV = v_MCV - (kS_MCV if d is None else d.a_MC1 * kS_MCV)
        u_MCV = _nn(X_MCC, beta_MC[..., None] * U_MCV)
    if d is None:
        return qS_MCV + _nn(P_MCC, u_MCV), S_MKV + _tn(k_MCK, u_MCV), X_MCC
    o_MCV = d.a_MC1 * qS_MCV + _nn(P_MCC, u_MCV)
    return o_MCV, d.Z_M11 * S_MKV + _tn(k_MCK, d.z_MC1 * u_MCV), X_MCC


def backward(q_NCK, k_NCK, v_MCV, g_MC, beta_MC, S_MKV, X_MCC, do_MCV, dS_MKV):
    """Cotangents of (q, k, v, g, beta, S) from those of (o without its scale, the next state)."""
    N, C, _ = k_NCK.shape
    r = v_MCV.shape[0] // N
    q_MCK, k_MCK = _repeat(q_NCK, r), _repeat(k_NCK, r)
    d = None if g_MC is None else decay(g_MC)
    lower_CC = jnp.tril(jnp.ones((C, C), S_MKV.dtype))[None]
    E_MCC = lower_CC if d is None else d.E_MCC
    fade = (lambda factor, x: x) if d is None else (lambda factor, x: factor * x)
    a, z, Z = (None, None, None) if d is None else (d.a_MC1, d.z_MC1, d.Z_M11)

    P_MCC = _heads(_nt(q_NCK, k_NCK), E_MCC, r)
    u_MCV = v_MCV
    if beta_MC is not None:
        beta_MC1 = beta_MC[..., None]
        U_MCV = v_MCV - fade(a, _nn(k_MCK, S_MKV))
        u_MCV = _nn(X_MCC, beta_MC1 * U_MCV)
    du_MCV = _tn(P_MCC, do_MCV) + fade(z, _nn(k_MCK, dS_MKV))
    dP_MCC = _nt(do_MCV, u_MCV)
    dP_E_MCC = dP_MCC * E_MCC
    Q_MCC = dP_MCC * P_MCC
    dq_MCK = fade(a, _nt(do_MCV, S_MKV))
    dk_MCK = fade(z, _nt(u_MCV, dS_MKV))
    c_MC = jnp.sum(q_MCK * dq_MCK, axis=-1)
    e_MC = jnp.sum(k_MCK * dk_MCK, axis=-1)
    dv_MCV, dbeta_MC = du_MCV, None
    dS_next_MKV = fade(Z, dS_MKV) + _tn(q_MCK, fade(a, do_MCV))
    pairs_NCC = _sum(jnp.swapaxes(dP_E_MCC, 1, 2), r)
    dk_NCK = _nn(pairs_NCC, q_NCK)
    if beta_MC is not None:
        dR_MCV = _tn(X_MCC, du_MCV)
        dv_MCV = beta_MC1 * dR_MCV
        Y_MCV = -fade(a, dv_MCV)
        strict_CC = lower_CC - jnp.eye(C, dtype=lower_CC.dtype)
        dA_E_MCC = -_nt(dR_MCV, u_MCV) * (strict_CC * E_MCC)
        dA_kk_MCC = _heads(_nt(k_NCK, k_NCK), dA_E_MCC, r)
        Q_MCC = Q_MCC + beta_MC1 * dA_kk_MCC
        dbeta_MC = jnp.sum(dR_MCV * U_MCV, axis=-1) + jnp.sum(dA_kk_MCC, axis=-1)
        W_NCC = _sum(beta_MC1 * dA_E_MCC, r)
        dk_NCK = dk_NCK + _nn(W_NCC + jnp.swapaxes(W_NCC, 1, 2), k_NCK)
        dk_Y_MCK = _nt(Y_MCV, S_MKV)
        c_MC = c_MC + jnp.sum(k_MCK * dk_Y_MCK, axis=-1)
        dk_MCK = dk_MCK + dk_Y_MCK
        dS_next_MKV = dS_next_MKV + _tn(k_MCK, Y_MCV)
    dq_NCK = _sum(dq_MCK, r) + _nn(_sum(dP_E_MCC, r), k_NCK)
    dk_NCK = dk_NCK + _sum(dk_MCK, r)
    dg_MC = None
    if d is not None:
        f_M = jnp.sum(d.Z_M11 * S_MKV * dS_MKV, axis=(1, 2))
        dg_MC = decay_gradient(Q_MCC, c_MC, e_MC, f_M)
    return dq_NCK, dk_NCK, dv_MCV, dg_MC, dbeta_MC, dS_next_MKV


def _repeat(x_N, r):
    return x_N if r == 1 else jnp.repeat(x_N, r, axis=0)


def _sum(x_M, r):
    return x_M if r == 1 else jnp.sum(x_M.reshape(-1, r, *x_M.shape[1:]), axis=1)


def _heads(x_NCC, E_MCC, r):
    """``x`` of each key head times ``E`` of each of its value heads."""
    if r == 1:
        return x_NCC * E_MCC
    if E_MCC.shape[0] == 1:
        return _repeat(x_NCC * E_MCC, r)
    C = x_NCC.shape[1]
    return (x_NCC[:, None] * E_MCC.reshape(-1, r, C, C)).reshape(-1, C, C)


def _nn(x, y):
    return jnp.einsum("mij,mjk->mik", x, y)


def _nt(x, y):
    return jnp.einsum("mij,mkj->mik", x, y)


def _tn(x, y):
    return jnp.einsum("mji,mjk->mik", x, y)
