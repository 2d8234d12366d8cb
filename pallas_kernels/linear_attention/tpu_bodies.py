"""The two TPU kernels: a grid step is one chunk of a block of heads; the state, or its cotangent, stays in VMEM."""

import collections
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention import tpu_channel_gates, tpu_token_gates
from pallas_kernels.linear_attention.tpu_solve import invert, solve, solve_transposed
from pallas_kernels.linear_attention.tpu_tiles import Heads, Products, column, iota, lockstep, widen


class Sizes(NamedTuple):
    """What is static about a call. H and G are the value and key heads of one grid step, ``together`` those in lockstep."""

    chunks: int
    C: int
    K: int
    V: int
    H: int
    G: int
    gate: str  # 'none', 'token' or 'channel'
    delta: bool
    scale: float
    products: Products
    together: int


def _named(refs, given) -> Any:
    """Refs by name; a call lacks those of what it does not have."""
    return collections.defaultdict(lambda: None, zip(given, refs, strict=True))


def _rows(x, y):
    return jnp.concatenate([x.astype(dtype), y.astype(dtype)], axis=0)


def _row(x, h):
    return None if x is None else x[0, 0, 0, h : h + 1]


def _family(sizes):
    return tpu_channel_gates if sizes.gate == "channel" else tpu_token_gates


def _gates(x, sizes, heads, constants):
    """What ``prepare`` takes for the gates of every head: nothing, sums over spans, or the gates and room to sum them."""
    if sizes.gate == "none":
        return [None] * len(heads)
    if sizes.gate == "token":
        rows = [_row(x["g"], h) for h in heads]
        return tpu_token_gates.spans(rows, constants, sizes.products)
    g = Heads(x["g"], sizes.H, sizes.K)
    return [(g.load_apart(h, x["scratch"].at[i].at[0]), x["scratch"].at[i]) for i, h in enumerate(heads)]


def forward_kernel(*refs, sizes: Sizes, given):
    """q, k, v, g, beta, state → o, state, and the state before each chunk if it is to be saved."""
    x = _named(refs, given)
    s = sizes
    q, k = Heads(x["q"], s.G, s.K), Heads(x["k"], s.G, s.K)
    v, o = Heads(x["v"], s.H, s.V), Heads(x["o"], s.H, s.V)
    state = x["state"]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = x["start"][...]

    if x["saved"] is not None:
        x["saved"][0] = state[...]
    constants = _family(s).make_constants(s.C)
    products = s.products

    def head(h, gates):
        kh = h * s.G // s.H
        q_h, k_h, v_h = q.load(kh), k.load(kh), v.load(h)
        beta = _row(x["beta"], h)
        yield
        inside = yield from _family(s).prepare(q_h, k_h, gates, constants, products, delta=s.delta)
        S = state[0, h]
        yield
        P, k_out, w = inside.P, inside.k_out, v_h
        if s.delta:
            inverse = yield from invert(inside.M * beta, products)
            w = yield from solve(inverse, v_h - products.nn(inside.k_in, S), products)
            P, k_out = P * beta, k_out * beta
        yield
        beside = lambda x, y, axis: jnp.concatenate([x.astype(products.dtype), y.astype(products.dtype)], axis)  # noqa: E731
        out = products.nn(beside(inside.q_in, P, 1), beside(S, w, 0))
        new = products.nn(k_out, w)
        yield
        state[0, h] = new + (S if inside.Z is None else widen(inside.Z, s.V) * S)
        o.store(h, out * s.scale)

    for first in range(0, s.H, s.together):
        heads = range(first, min(first + s.together, s.H))
        lockstep(map(head, heads, _gates(x, s, heads, constants)))


def backward_kernel(*refs, sizes: Sizes, given):
    """The chunks from last to first: cotangents of q, k, v, g, beta and the first state."""
    x = _named(refs, given)
    s = sizes
    q, k, v = Heads(x["q"], s.G, s.K), Heads(x["k"], s.G, s.K), Heads(x["v"], s.H, s.V)
    do, dv = Heads(x["do"], s.H, s.V), Heads(x["dv"], s.H, s.V)
    dq, dk = Heads(x["dq"], s.G, s.K), Heads(x["dk"], s.G, s.K)
    dstate = x["dstate"]

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = x["end"][...]

    constants = _family(s).make_constants(s.C)
    products = s.products
    diagonal = iota((s.C, s.C), 0) == iota((s.C, s.C), 1)

    def head(h, gates):
        kh = h * s.G // s.H
        q_h, k_h, v_h = q.load(kh), k.load(kh), v.load(h)
        do_h = (do.load(h) * s.scale).astype(products.dtype)
        beta = _row(x["beta"], h)
        yield
        inside = yield from _family(s).prepare(q_h, k_h, gates, constants, products, delta=s.delta, backwards=True)
        S, dS = x["saved"][0, 0, h], dstate[0, h]
        yield
        w = u = v_h
        inverse: Any = None
        beta_C: Any = None
        if s.delta:
            inverse = yield from invert(inside.M * beta, products)
            w = yield from solve(inverse, v_h - products.nn(inside.k_in, S), products)
            beta_C = column(beta, s.V)
            u = beta_C * w
        du = products.tn(inside.P, do_h) + products.nn(inside.k_out, dS)
        yield
        before = products.tn(inside.q_in, do_h) + (dS if inside.Z is None else widen(inside.Z, s.V) * dS)
        dM = dk_in = None
        dw = du
        if s.delta:
            dw = yield from solve_transposed(inverse, beta_C * du, products)
            before = before - products.tn(inside.k_in, dw)
            # β times its cotangent is dw · w; du is taken afresh so that β = 0 has its gradient too.
            du = du - products.tn(inside.M, dw)
            yield
            dM = -products.nt(dw, u)
            dk_in = -products.nt(dw, S)
            dbeta = jnp.sum(du * w, axis=1, keepdims=True)
            x["dbeta"][0, 0, 0, h : h + 1] = jnp.sum(jnp.where(diagonal, dbeta, 0.0), axis=0, keepdims=True)
        yield
        dP = products.nt(do_h, u)
        dq_in = products.nt(do_h, S)
        dk_out = products.nt(u, dS)
        yield
        cotangents = (dP, dM, dq_in, dk_in, dk_out, (S, dS), constants, products)
        if s.gate == "channel":
            dq_h, dk_h, dg = yield from tpu_channel_gates.backward(q_h, k_h, inside, *cotangents, gates[1])
            Heads(x["dg"], s.H, s.K).store_apart(h, dg, gates[1].at[0])
        else:
            dq_h, dk_h, dg = yield from tpu_token_gates.backward(q_h, k_h, inside, *cotangents)
            if dg is not None:
                x["dg"][0, 0, 0, h : h + 1] = dg
        dstate[0, h] = before
        dv.store(h, dw)
        return dq_h, dk_h

    r = s.H // s.G
    pending = {}
    for first in range(0, s.H, s.together):
        heads = range(first, min(first + s.together, s.H))
        results = lockstep(map(head, heads, _gates(x, s, heads, constants)))
        for h, pair in zip(heads, results, strict=True):
            pending.setdefault(h // r, []).append(pair)
            if len(pending[h // r]) == r:
                pairs = pending.pop(h // r)
                dq.store(h // r, sum(p[0] for p in pairs))
                dk.store(h // r, sum(p[1] for p in pairs))
