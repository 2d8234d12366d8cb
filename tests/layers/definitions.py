"""Each recurrent mixer in float64 numpy, from its paper, on one document [T, D] with the layer's own parameters.

``parameters`` maps a parameter's name to its value; ``c`` is the configuration.
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)


def rms(x, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def unit(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def conv(x_TN, w_WN, bias=0):
    W = len(w_WN)
    row = np.concatenate([np.zeros((W - 1, x_TN.shape[1])), x_TN])
    return silu(np.stack([np.sum(row[t : t + W] * w_WN, axis=0) for t in range(len(x_TN))]) + bias)


def cut(x_TN, *sizes):
    parts = np.split(x_TN, np.cumsum([heads * width for heads, width in sizes])[:-1], axis=-1)
    return [x.reshape(len(x), heads, width) for x, (heads, width) in zip(parts, sizes, strict=True)]


def delta(q, k, v, beta, alpha):
    """S ← diag(α) S; S ← (I − β k kᵀ) S + β k vᵀ; o = Sᵀ q / √K. α is [T, H, K]; keys are shared by groups of heads."""
    T, H, V = v.shape
    K, share = k.shape[2], H // k.shape[1]
    o = np.zeros((T, H, V))
    for h in range(H):
        S, g = np.zeros((K, V)), h // share
        for t in range(T):
            S = alpha[t, h][:, None] * S
            S = (np.eye(K) - beta[t, h] * np.outer(k[t, g], k[t, g])) @ S + beta[t, h] * np.outer(k[t, g], v[t, h])
            o[t, h] = S.T @ q[t, g] / np.sqrt(K)
    return o


def weights(q, k, decay=None):
    """The matrix ⟨q_t, k_s⟩ Π decay over (s, t], lower triangular, of one head; decay [T] or [T, K]."""
    T = len(q)
    decay = np.ones((T, 1)) if decay is None else decay.reshape(T, -1)
    P = np.zeros((T, T))
    for t in range(T):
        for s in range(t + 1):
            P[t, s] = np.sum(q[t] * k[s] * np.prod(decay[s + 1 : t + 1], axis=0))
    return P


def linear_attention(p, c, x):
    phi = {
        "elu": lambda z: np.where(z > 0, z + 1, np.exp(np.minimum(z, 0))),
        "relu": lambda z: np.maximum(z, 0),
        "softmax": lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True),
    }[c.feature_map]
    keys = (c.key_heads, c.key_width)
    q, k, v = cut(x @ p["w_qkv_DN"], keys, keys, (c.heads, c.value_width))
    o = np.zeros_like(v)
    for h in range(c.heads):
        g = h // (c.heads // c.key_heads)
        P = weights(phi(q[:, g]), phi(k[:, g]))
        o[:, h] = P / P.sum(1, keepdims=True) @ v[:, h] if c.normalise else rms(P @ v[:, h], c.norm_eps) * p["scale_D"]
    return o.reshape(len(x), -1) @ p["w_out_ND"]


def retnet(p, c, x):
    T, half = len(x), c.key_width // 2
    q, k, v = cut(x @ p["w_qkv_DN"], *((c.heads, c.key_width),) * 2, (c.heads, c.value_width))
    turn = np.exp(1j * np.arange(T)[:, None] * c.rope_theta ** (-np.arange(half) / half))
    o = np.zeros_like(v)
    for h in range(c.heads):
        Q, K = ((z[:, h, :half] + 1j * z[:, h, half:]) * turn for z in (q, k))
        n = np.arange(T)
        D = np.where(n[:, None] >= n, (1 - 2.0 ** (-5 - h)) ** np.abs(n[:, None] - n), 0)
        out = ((Q @ K.conj().T).real * D) @ v[:, h] / np.sqrt(c.key_width)
        mean = out.mean(-1, keepdims=True)
        o[:, h] = (out - mean) / np.sqrt(out.var(-1, keepdims=True) + c.norm_eps)
    return (o.reshape(T, -1) * silu(x @ p["w_gate_DN"])) @ p["w_out_ND"]


def lightning(p, c, x):
    q, k, v = cut(silu(x @ p["w_qkv_DN"]), *((c.heads, c.head_width),) * 3)
    o = np.zeros_like(v)
    for h in range(c.heads):
        o[:, h] = weights(q[:, h], k[:, h], np.full(len(x), np.exp(p["log_decay_H"][h]))) @ v[:, h]
    o = rms(o.reshape(len(x), -1), c.norm_eps) * p["scale_D"]
    return (o * sigmoid(x @ p["w_gate_DN"])) @ p["w_out_ND"]


def mamba(p, c, x):
    u, z = np.split(x @ p["w_in_DN"] + p.get("bias_N", 0), 2, axis=-1)
    u = conv(u, p["w_conv_WN"], p["conv_bias_N"])
    r, B, C = np.split(u @ p["w_select_NM"], [c.dt_rank, c.dt_rank + c.state_width], axis=-1)
    if c.select_norm_eps is not None:
        r, B, C = (rms(a, c.select_norm_eps) for a in (r, B, C))
    dt = softplus(r @ p["w_dt_RN"] + p["dt_bias_N"])
    A = -np.exp(p["log_rate_NK"])
    h, y = np.zeros(A.shape), np.zeros_like(u)
    for t in range(len(x)):
        h = np.exp(dt[t][:, None] * A) * h + (dt[t] * u[t])[:, None] * B[t]
        y[t] = h @ C[t] + p["skip_N"] * u[t]
    return (y * silu(z)) @ p["w_out_ND"] + p.get("out_bias_D", 0)


def mamba2(p, c, x):
    T, N = len(x), c.heads * c.head_width
    in_TN = x @ p["w_in_DN"] + p.get("bias_N", 0)
    z, xBC, dt = np.split(in_TN, [N, 2 * N + 2 * c.groups * c.state_width], axis=-1)
    u, B, C = cut(
        conv(xBC, p["w_conv_WN"], p["conv_bias_N"]), (c.heads, c.head_width), *((c.groups, c.state_width),) * 2
    )
    dt = np.clip(softplus(dt + p["dt_bias_H"]), *(c.dt_limits or (0, np.inf)))
    y = np.zeros_like(u)
    for h in range(c.heads):
        S, g = np.zeros((c.head_width, c.state_width)), h // (c.heads // c.groups)  # transposed, as the authors have it
        for t in range(T):
            S = np.exp(-np.exp(p["log_rate_H"][h]) * dt[t, h]) * S + dt[t, h] * np.outer(u[t, h], B[t, g])
            y[t, h] = S @ C[t, g] + p["skip_H"][h] * u[t, h]
    y = y.reshape(T, N) * silu(z)
    y = rms(y.reshape(T, c.norm_groups or c.groups, -1), c.norm_eps).reshape(T, N) * p["norm_N"]
    return y @ p["w_out_ND"] + p.get("out_bias_D", 0)


def gla(p, c, x):
    q, k, v = cut(x @ p["w_qkv_DN"], *((c.heads, c.key_width),) * 2, (c.heads, c.value_width))
    alpha = sigmoid(x @ p["w_decay_DR"] @ p["w_decay_RN"] + p["decay_bias_N"]) ** (1 / c.normaliser)
    alpha = alpha.reshape(len(x), c.heads, c.key_width)
    o = np.zeros_like(v)
    for h in range(c.heads):
        o[:, h] = weights(q[:, h], k[:, h], alpha[:, h]) @ v[:, h] / np.sqrt(c.key_width)
    o = rms(o, c.norm_eps) * p["scale_D"]
    return (o.reshape(len(x), -1) * silu(x @ p["w_gate_DN"])) @ p["w_out_ND"]


def deltanet(p, c, x):
    q, k, v = cut(conv(x @ p["w_qkv_DN"], p["w_conv_WN"]), *((c.heads, c.key_width),) * 2, (c.heads, c.value_width))
    beta = sigmoid(x @ p["w_beta_DH"]) * (2 if c.negative_eigenvalues else 1)
    o = delta(unit(q), unit(k), v, beta, np.ones((*v.shape[:2], c.key_width)))
    return (rms(o, c.norm_eps) * p["scale_D"]).reshape(len(x), -1) @ p["w_out_ND"]


def gated_deltanet(p, c, x):
    keys = (c.key_heads, c.key_width)
    q, k, v = cut(conv(x @ p["w_qkv_DN"], p["w_conv_WN"]), keys, keys, (c.heads, c.value_width))
    b, a = np.split(x @ p["w_ba_DN"], 2, axis=-1)
    alpha = np.exp(-np.exp(p["log_rate_H"]) * softplus(a + p["dt_bias_H"]))[..., None]
    o = delta(unit(q), unit(k), v, sigmoid(b), np.broadcast_to(alpha, (*v.shape[:2], c.key_width)))
    o = rms(o, c.norm_eps) * p["scale_D"]
    return (o.reshape(len(x), -1) * silu(x @ p["w_gate_DN"])) @ p["w_out_ND"]


def kda(p, c, x):
    T = len(x)
    q, k, v = cut(conv(x @ p["w_qkv_DN"], p["w_conv_WN"]), *((c.heads, c.key_width),) * 2, (c.heads, c.value_width))
    decay, gate = np.split(x @ p["w_low_DR"], 2, axis=-1)
    a = (decay @ p["w_decay_RN"]).reshape(T, c.heads, c.key_width) + p["dt_bias_HK"]
    alpha = np.exp(-np.exp(p["log_rate_H"])[:, None] * softplus(a))
    o = delta(unit(q), unit(k), v, sigmoid(x @ p["w_beta_DH"]), alpha)
    o = (rms(o, c.norm_eps) * p["scale_D"]).reshape(T, -1)
    return (o * sigmoid(gate @ p["w_gate_RN"])) @ p["w_out_ND"]
