"""The calls that ``kernels`` measures: shapes, what they must compute at least, and what they must move at least."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.moe import group_sizes
from research.ops.attention import attention
from research.ops.causal_conv import causal_conv
from research.ops.grouped_matmul import grouped_matmul
from research.ops.linear_attention import linear_attention, linear_attention_step
from research.ops.losses import cross_entropy

LOW, SINGLE = jnp.bfloat16, jnp.float32


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op.

    kernels: the platforms that have a kernel of it; ``xla``: the implementation that needs none, where it matters by platform.
    build: ``(implementation) -> (function, differentiable arguments)``.
    flops: the least that forward computes, of products alone; backward is counted twice that. What the op's definition asks
    for: a chunked form computes more.
    calls: how many calls one run of ``function`` chains. target: the figure to beat, and whose it is, by way.
    """

    name: str
    shape: dict[str, int | str]
    build: Callable[[str | None], tuple[Callable, tuple]]
    flops: float
    kernels: tuple[str, ...] = ()
    xla: str | dict[str, str] | None = None
    ways: tuple[str, ...] = ("forward", "backward")
    calls: int = 1
    target: dict[str, str] = dataclasses.field(default_factory=dict)

    def implementations(self, platform: str) -> dict[str, str | None]:
        """What to measure on a platform, by the name it is reported under: its kernel and the XLA form of the same call."""
        kernel = {f"pallas_{platform}": f"pallas_{platform}"} if platform in self.kernels else {}
        xla = self.xla[platform] if isinstance(self.xla, dict) else self.xla
        return {**kernel, xla or "xla": xla}


def cases(quick: bool = False) -> list[Case]:
    """Every case; ``quick`` are small ones that run anywhere, to see whether they run at all."""
    if quick:
        return [
            linear("gated_deltanet", 1, 256, 2, 4, 32, "token", True),
            decode(2, 4, 32, steps=4),
            convolution(1, 256, 64),
            grouped("uniform", 256, 32, 64, 4),
            entropy(64, 32, 512),
            dense_attention(1, 128, 4, 2, 32),
        ]
    flash = {
        (16, 64, 8192): {"forward": "0.397 ms FlashQLA, H200"},
        (16, 64, 32768): {"forward": "1.521 ms FlashQLA, H200"},
        (16, 32, 8192): {"forward": "0.280 ms FlashQLA, H200", "backward": "0.789 ms FlashQLA, H200"},
        (16, 32, 32768): {"backward": "2.515 ms FlashQLA, H200"},
        (2, 8, 32768): {"forward": "0.320 ms FlashQLA, H200"},
    }
    shares = [(262144, 7168, 2048, 256), (262144, 4096, 1536, 128), (393216, 2048, 768, 128), (8192, 4096, 14336, 8)]
    return [
        *(linear("gated_deltanet", 1, T, G, H, 128, "token", True, t) for (G, H, T), t in flash.items()),
        linear("kda", 1, 8192, 64, 64, 128, "channel", True, {"forward": "1.758 ms cuLA, H200"}),
        linear("mamba2", 1, 8192, 1, 64, 128, "token", False),
        linear("gated_deltanet", 1, 8192, 16, 16, 128, "token", True),
        *(decode(B, 32, 128) for B in (1, 16, 256)),
        convolution(1, 8192, 8192),
        *(grouped(load, *sizes) for sizes in shares for load in ("uniform", "multinomial")),
        entropy(8192, 4096, 151936),
        dense_attention(1, 8192, 32, 8, 128),
    ]


def linear(mechanism, B, T, G, H, D, decay, delta, target=None) -> Case:
    """fla's and FlashQLA's conditions: g = log σ(randn) / 16, zero on a quarter of the heads, a random state, unit keys."""

    def build(implementation):
        draw = _Draw()
        q, k = (_unit(draw(B, T, G, D)).astype(LOW) for _ in range(2))
        g = jax.nn.log_sigmoid(draw(B, T, H, *[D] * (decay == "channel"))) / 16
        quiet_H = jnp.arange(H) % 4 == 3
        g = jnp.where(quiet_H[:, None] if decay == "channel" else quiet_H, 0, g)
        x = {"q": q, "k": k, "v": draw(B, T, H, D).astype(LOW), "log_decay": g, "initial_state": draw(B, H, D, D)}
        if delta:
            x["beta"] = jax.nn.sigmoid(draw(B, T, H))

        def function(x):
            x = dict(x)
            q, k, v = (x.pop(name) for name in "qkv")
            return linear_attention(q, k, v, **x, scale=D**-0.5, implementation=implementation)

        return function, (x,)

    # A token and head: read, write and, with the delta rule, predict, each a K x V product with a vector.
    flops = 2.0 * B * T * H * D * D * (3 if delta else 2)
    shape = {"B": B, "T": T, "G": G, "H": H, "K": D, "V": D, "dtype": "bfloat16"}
    kernels = ("tpu",) if delta or decay == "channel" else ("tpu", "gpu")
    return Case(f"linear_attention {mechanism}", shape, build, flops, kernels, "chunked", target=target or {})


def decode(B, H, D, steps=64) -> Case:
    """One token of the gated delta rule after another; the state is the traffic."""

    def build(implementation):
        draw = _Draw()
        q, k, v = (_unit(draw(steps, B, H, D)).astype(LOW) for _ in range(3))
        tokens = (q, k, v, -jnp.abs(draw(steps, B, H)), jax.nn.sigmoid(draw(steps, B, H)))

        def function(tokens, state_BHKV):
            def step(state_BHKV, token):
                q, k, v, g, beta = token
                o_BHV, state_BHKV = linear_attention_step(
                    q, k, v, state_BHKV, log_decay=g, beta=beta, scale=D**-0.5, implementation=implementation
                )
                return state_BHKV, o_BHV

            return jax.lax.scan(step, state_BHKV, tokens)

        return function, (tokens, draw(B, H, D, D))

    shape = {"B": B, "H": H, "K": D, "V": D, "dtype": "bfloat16"}
    flops = 2.0 * B * H * D * D * 3
    return Case(
        "linear_attention_step", shape, build, flops, ("tpu", "gpu"), "recurrent", ways=("forward",), calls=steps
    )


def convolution(B, T, D, W=4) -> Case:
    """The short convolution of a layer with its silu, packed documents."""

    def build(implementation):
        draw = _Draw()
        ids_BT = jnp.broadcast_to(1 + jnp.arange(T, dtype=jnp.int32) // max(1, T // 5), (B, T))
        options: dict[str, Any] = {"segment_ids": ids_BT, "activation": "silu", "implementation": implementation}
        return lambda x, w: causal_conv(x, w, **options)[0], (draw(B, T, D).astype(LOW), draw(W, D).astype(LOW))

    shape = {"B": B, "T": T, "D": D, "W": W, "dtype": "bfloat16"}
    return Case("causal_conv silu", shape, build, 2.0 * B * T * D * W, ("tpu", "gpu"), "xla")


def grouped(load, M, K, N, E) -> Case:
    """One product of M rows in E groups; 'multinomial' is what an untrained router deals."""

    def build(implementation):
        draw = _Draw()
        sizes_E = jnp.asarray(group_sizes(load, M, E))

        def multiply(x_MK, w_EKN):
            # A router's sizes aren't known while the program is compiled: XLA must not specialise on them.
            hidden_E = jax.lax.optimization_barrier(sizes_E)
            return grouped_matmul(x_MK, w_EKN, hidden_E, implementation=implementation)

        return multiply, (draw(M, K, dtype=LOW), draw(E, K, N, dtype=LOW))

    shape = {"M": M, "K": K, "N": N, "E": E, "load": load, "dtype": "bfloat16"}
    target = {way: "75 % of a dense product" for way in ("forward", "backward")}
    xla = {"tpu": "ragged_dot", "gpu": "tiled", "cpu": "looped"}
    return Case("grouped_matmul", shape, build, 2.0 * M * K * N, ("tpu", "gpu"), xla, target=target)


def entropy(T, D, V) -> Case:
    """Hidden states to summed nats over a large vocabulary, the projection included."""

    def build(implementation):
        draw = _Draw()
        targets_1T = jnp.asarray(np.random.default_rng(0).integers(0, V, (1, T)), jnp.int32)
        mask_1T = jnp.ones((1, T), bool)
        loss = lambda x, w: cross_entropy(jnp.einsum("btd,dv->btv", x, w), targets_1T, mask_1T)[0]  # noqa: E731
        return loss, (draw(1, T, D, dtype=LOW), draw(D, V, dtype=LOW))

    return Case("cross_entropy", {"T": T, "D": D, "V": V, "dtype": "bfloat16"}, build, 2.0 * T * D * V)


def dense_attention(B, T, H, G, D) -> Case:
    """Causal softmax attention, the neighbour of all these; libraries' kernels where they serve it."""

    def build(implementation):
        draw = _Draw()
        q, k, v = (draw(B, T, heads, D).astype(LOW) for heads in (H, G, G))
        return functools.partial(attention, implementation=implementation), (q, k, v)

    shape = {"B": B, "T": T, "H": H, "G": G, "K": D, "dtype": "bfloat16"}
    return Case("attention", shape, build, 2.0 * B * T * T * H * D)  # half of the 4·T²: it is causal


def least_bytes(function: Callable, arguments: tuple, calls: int, way: str) -> float:
    """Every argument read and every output written once; backward reads the arguments and the cotangents of the outputs,
    and writes the gradients of the arguments. A chain of calls moves what it carries once a call."""
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    given, made = size(arguments), size(jax.eval_shape(function, *arguments))
    if calls > 1:
        carried = size(arguments[-1])
        return (given - carried + made - carried) / calls + 2 * carried
    return given + made if way == "forward" else 2 * given + made


class _Draw:
    """Normal random arrays, each another."""

    def __init__(self):
        self._key = jax.random.key(0)

    def __call__(self, *shape, dtype=SINGLE):
        self._key, key = jax.random.split(self._key)
        return jax.jit(jax.random.normal, static_argnums=(1, 2))(key, shape, dtype)


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
