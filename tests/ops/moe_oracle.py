"""Experts by the definition: NumPy, float64, one loop over assignments, gradients written by hand."""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def silu_slope(x):
    sigmoid = 1 / (1 + np.exp(-x))
    return sigmoid * (1 + x * (1 - sigmoid))


def grouped_matmul(x_MK, w_EKN, sizes, dy_MN):
    """y, dx, dw of one product per group; rows past the sum stay zero."""
    y_MN, dx_MK, dw_EKN = np.zeros((len(x_MK), w_EKN.shape[2])), np.zeros(x_MK.shape), np.zeros(w_EKN.shape)
    row = 0
    for expert, size in enumerate(sizes):
        for _ in range(size):
            y_MN[row] = x_MK[row] @ w_EKN[expert]
            dx_MK[row] = w_EKN[expert] @ dy_MN[row]
            dw_EKN[expert] += np.outer(x_MK[row], dy_MN[row])
            row += 1
    return y_MN, dx_MK, dw_EKN


def experts(x_TD, token_A, expert_A, weight_A, w_EDN, w_EFD, dy_TD, *, weight_on="output"):
    """SwiGLU experts: y_TD and the gradients of x, of the weights, and of both matrices."""
    y_TD, dx_TD, dweight_A = np.zeros(x_TD.shape), np.zeros(x_TD.shape), np.zeros(len(weight_A))
    dw_EDN, dw_EFD = np.zeros(w_EDN.shape), np.zeros(w_EFD.shape)
    for a, (t, e, weight) in enumerate(zip(token_A, expert_A, weight_A, strict=True)):
        if e == len(w_EDN):
            continue
        inside, outside = (weight, 1.0) if weight_on == "input" else (1.0, weight)
        gate, up = np.split(inside * x_TD[t] @ w_EDN[e], 2)
        hidden = silu(gate) * up
        out = hidden @ w_EFD[e]
        y_TD[t] += outside * out
        dout = outside * dy_TD[t]
        dw_EFD[e] += np.outer(hidden, dout)
        dhidden = w_EFD[e] @ dout
        din = np.concatenate([dhidden * up * silu_slope(gate), dhidden * silu(gate)])
        dw_EDN[e] += np.outer(inside * x_TD[t], din)
        dinput = w_EDN[e] @ din
        dx_TD[t] += inside * dinput
        dweight_A[a] = dinput @ x_TD[t] if weight_on == "input" else out @ dy_TD[t]
    return y_TD, dx_TD, dweight_A, dw_EDN, dw_EFD
