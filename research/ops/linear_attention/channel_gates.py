"""One chunk of the recurrence with one gate a token and key channel (GLA, KDA): forward, and backward by ``jax.vjp``."""

import jax

from research.ops.linear_attention.quadratic import block


def forward(q_NCK, k_NCK, v_MCV, g_MCK, beta_MC, S_MKV):
    """Returns (o without its scale, the next state, None)."""
    one = lambda x: None if x is None else x[None]  # noqa: E731
    o, S = block(one(q_NCK), one(k_NCK), one(v_MCV), one(g_MCK), one(beta_MC), one(S_MKV), 1.0)
    return o[0], S[0], None


def backward(q_NCK, k_NCK, v_MCV, g_MCK, beta_MC, S_MKV, X_MCC, do_MCV, dS_MKV):
    """Cotangents of (q, k, v, g, beta, S) from those of (o without its scale, the next state)."""
    run = lambda *x: forward(*x)[:2]  # noqa: E731
    return jax.vjp(run, q_NCK, k_NCK, v_MCV, g_MCK, beta_MC, S_MKV)[1]((do_MCV, dS_MKV))
