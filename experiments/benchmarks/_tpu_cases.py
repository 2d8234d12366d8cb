"""The calls that ``tpu_cycles`` compiles: their shapes, the forms they are compared with, and what is compiled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.ops.causal_conv import causal_conv
from research.ops.linear_attention import linear_attention, linear_attention_step

SHAPE = {"B": 1, "T": 8192, "H": 16, "K": 128, "V": 128}


@dataclasses.dataclass(frozen=True)
class Call:
    """build: ``(form, **shape) -> (function of one pytree, that pytree as shapes)``; others: forms besides the kernel's."""

    build: Callable[..., tuple[Callable, Any]]
    shape: dict[str, Any]
    others: tuple[str, ...]
    ways: tuple[str, ...] = ("forward", "forward_backward")


def case(name: str, way: str, form: str | None, **shape):
    """(function, arguments as shapes)."""
    forward, x = CASES[name].build(form, **shape)
    if way == "forward":
        return forward, (x,)
    return lambda x, cotangents: (*(r := jax.vjp(forward, x))[0], r[1](cotangents)), (x, jax.eval_shape(forward, x))


def _low(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _single(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _linear(decay: str, delta: bool):
    def build(form, B: int, T: int, H: int, K: int, V: int, G: int = 0):
        q = _low(B, T, G or H, K)
        x = {"q": q, "k": q, "v": _low(B, T, H, V), "initial_state": _single(B, H, K, V)}
        x["log_decay"] = _single(B, T, H, K) if decay == "channel" else _single(B, T, H)
        if delta:
            x["beta"] = _single(B, T, H)

        def forward(x):
            x = dict(x)
            q, k, v = (x.pop(n) for n in "qkv")
            return linear_attention(q, k, v, **x, scale=K**-0.5, implementation=form)

        return forward, x

    return Call(build, SHAPE, ("chunked",))


def _step(form, B: int, H: int, K: int, V: int):
    """One token of the gated delta rule; the state is written where it was read."""
    x = {"q": _low(B, H, K), "k": _low(B, H, K), "v": _low(B, H, V), "state": _single(B, H, K, V)}
    x |= {"g": _single(B, H), "beta": _single(B, H)}

    def forward(x):
        gates = {"log_decay": x["g"], "beta": x["beta"]}
        return linear_attention_step(x["q"], x["k"], x["v"], x["state"], **gates, scale=K**-0.5, implementation=form)

    return forward, x


def _convolution(form, B: int, T: int, D: int, W: int):
    """Packed documents, silu; padding in the middle is a branch that neither form takes."""
    x = {"x": _low(B, T, D), "w": _low(W, D), "bias": _low(D), "tail": _low(B, W - 1, D)}

    def forward(x):
        return causal_conv(x["x"], x["w"], x["bias"], tail=x["tail"], activation="silu", implementation=form)

    return forward, x


CASES = {
    "additive": _linear("token", False),
    "delta_rule": _linear("token", True),
    "kda": _linear("channel", True),
    "step": Call(_step, {"B": 64, "H": 32, "K": 128, "V": 128}, ("recurrent",), ("forward",)),
    "causal_conv": Call(_convolution, {"B": 1, "T": 8192, "D": 8192, "W": 4}, ("xla",)),
}
