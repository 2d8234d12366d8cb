"""The recurrence in float64 numpy, written from the papers alone, with its gradients by hand.

    S_t = diag(e^{g_t}) S_{t−1} + k_t u_tᵀ,     u_t = v_t   or   β_t (v_t − (diag(e^{g_t}) S_{t−1})ᵀ k_t),     o_t = scale S_tᵀ q_t

Segments and padding are handled token by token, by their definition, not by rewriting gates.
"""

import numpy as np


def _expand(q, k, v, log_decay, beta, segment_ids):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, H, _ = v.shape
    K = k.shape[-1]
    repeat = H // k.shape[2]
    q, k = np.repeat(q, repeat, axis=2), np.repeat(k, repeat, axis=2)
    g = np.zeros((B, T, H, K))
    if log_decay is not None:
        x = np.asarray(log_decay, np.float64)
        g = np.broadcast_to(x if x.ndim == 4 else x[..., None], g.shape)
    real = np.ones((B, T), bool)
    keep = np.ones((B, T))
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        real = ids > 0
        for b in range(B):
            last = 0
            for t in range(T):
                if ids[b, t] > 0:
                    if last > 0 and ids[b, t] != last:
                        keep[b, t] = 0
                    last = ids[b, t]
    return q, k, v, g, None if beta is None else np.asarray(beta, np.float64), real, keep


def forward(q, k, v, log_decay=None, beta=None, scale=1.0, initial_state=None, segment_ids=None):
    """(o, final state, tape). The tape holds the decayed state before each write and the write."""
    qh, kh, vh, g, b, real, keep = _expand(q, k, v, log_decay, beta, segment_ids)
    B, T, H, V = vh.shape
    K = kh.shape[-1]
    S = np.zeros((B, H, K, V)) if initial_state is None else np.array(initial_state, np.float64)
    o = np.zeros_like(vh)
    tape = []
    for t in range(T):
        on = real[:, t][:, None, None, None]
        decay = np.exp(g[:, t]) * keep[:, t][:, None, None]
        D = decay[..., None] * S
        u = vh[:, t]
        if b is not None:
            u = b[:, t][..., None] * (vh[:, t] - np.einsum("bhkv,bhk->bhv", D, kh[:, t]))
        new = D + kh[:, t][..., None] * u[..., None, :]
        tape.append((decay, D, u))
        S = np.where(on, new, S)
        o[:, t] = np.where(on[..., 0], scale * np.einsum("bhkv,bhk->bhv", S, qh[:, t]), 0)
    return o, S, tape


def value_and_gradients(q, k, v, do, dS, log_decay=None, beta=None, scale=1.0, initial_state=None, segment_ids=None):
    """(o, final state, {name: gradient}) for cotangents ``do`` of o and ``dS`` of the final state."""
    options = dict(log_decay=log_decay, beta=beta, scale=scale, initial_state=initial_state, segment_ids=segment_ids)
    o, final, tape = forward(q, k, v, **options)
    qh, kh, vh, g, b, real, _ = _expand(q, k, v, log_decay, beta, segment_ids)
    do = np.asarray(do, np.float64)
    dS = np.array(dS, np.float64)
    dq, dk, dv, dg = np.zeros_like(qh), np.zeros_like(kh), np.zeros_like(vh), np.zeros_like(g)
    db = np.zeros(vh.shape[:3])
    for t in reversed(range(vh.shape[1])):
        decay, D, u = tape[t]
        new = D + kh[:, t][..., None] * u[..., None, :]
        on = real[:, t][:, None, None]
        dq[:, t] = np.where(on, scale * np.einsum("bhkv,bhv->bhk", new, do[:, t]), 0)
        d = dS + scale * qh[:, t][..., None] * do[:, t][..., None, :]
        du = np.einsum("bhkv,bhk->bhv", d, kh[:, t])
        dkt = np.einsum("bhkv,bhv->bhk", d, u)
        if b is None:
            dv[:, t] = np.where(on, du, 0)
        else:
            bt = b[:, t][..., None]
            dv[:, t] = np.where(on, bt * du, 0)
            error = vh[:, t] - np.einsum("bhkv,bhk->bhv", D, kh[:, t])
            db[:, t] = np.where(on[..., 0], np.sum(du * error, axis=-1), 0)
            dkt = dkt - np.einsum("bhkv,bhv->bhk", D, bt * du)
            d = d - kh[:, t][..., None] * (bt * du)[..., None, :]
        dk[:, t] = np.where(on, dkt, 0)
        dg[:, t] = np.where(on, np.sum(d * D, axis=-1), 0)
        dS = np.where(on[..., None], decay[..., None] * d, dS)
    G = np.asarray(k).shape[2]
    fold = lambda x: x.reshape(*x.shape[:2], G, -1, x.shape[-1]).sum(3)  # noqa: E731
    grads = {"q": fold(dq), "k": fold(dk), "v": dv, "initial_state": dS}
    if log_decay is not None:
        shape = np.asarray(log_decay).shape
        grads["log_decay"] = dg if len(shape) == 4 else dg.sum(3) if len(shape) == 3 else dg.sum((0, 1, 3))
    if beta is not None:
        grads["beta"] = db
    return o, final, grads
