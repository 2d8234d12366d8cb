"""The calls that ``tpu_cycles`` compiles: their shapes, the forms they are compared with, and what is compiled."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from research.ops.attention import attention, tokens_of
from research.ops.causal_conv import causal_conv
from research.ops.dispatch import combine, dispatch, expert_mlp, group, swiglu
from research.ops.gated_deltanet_step import gated_deltanet_step
from research.ops.grouped_matmul import grouped_matmul
from research.ops.linear_attention import linear_attention, linear_attention_step
from research.ops.losses import projected_cross_entropy
from research.ops.mamba2_step import mamba2_step
from research.ops.routing import Assignment
from research.ops.sparse_attention import select_mask

SHAPE = {"B": 1, "T": 8192, "H": 16, "K": 128, "V": 128}


@dataclasses.dataclass(frozen=True)
class Call:
    """build: ``(form, **shape) -> (function of one pytree, that pytree as shapes)``; others: forms besides the kernel's.

    steps: ``(form, way, **shape)`` -> grid steps to count for kernels whose grid is known only when they run, or None.
    inner: ``(**shape)`` -> trips, at most, of loops within a grid step that are known only then, or None.
    donates: the arguments are the callee's to overwrite.
    kernel: there is a kernel of our own.
    """

    build: Callable[..., tuple[Callable, Any]]
    shape: dict[str, Any]
    others: tuple[str, ...]
    ways: tuple[str, ...] = ("forward", "forward_backward")
    steps: Callable[..., int | None] = lambda form, way, **shape: None
    inner: Callable[..., int | None] = lambda **shape: None
    donates: bool = False
    kernel: bool = True


def case(name: str, way: str, form: str | None, **shape):
    """(function, arguments as shapes)."""
    forward, x = CASES[name].build(form, **shape)
    if way == "forward" or not CASES[name].kernel:  # what has no kernel is a whole call already
        return forward, (x,)
    if way in ("dx", "dw"):  # one leg: what the others need is dead code
        return lambda x, cotangent: jax.vjp(forward, x)[1](cotangent)[0][way[1]], (x, jax.eval_shape(forward, x))

    def both(x, cotangents):
        results, pull = jax.vjp(forward, x)
        return results, [dx for dx in jax.tree.leaves(pull(cotangents)) if dx.dtype != jax.dtypes.float0]

    return both, (x, jax.eval_shape(forward, x))


def _low(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _single(*shape) -> Any:
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


def _mixer_step(form, B: int, G: int, H: int, K: int, V: int, W: int):
    """One token of all of a Gated DeltaNet layer but its projections; state and tail are written where they were read."""
    N, M = 2 * G * K + H * V, H * V
    x = {"x": _low(B, N), "gate": _low(B, M), "strength": _single(B, H), "decay": _single(B, H)}
    x |= {"tail": _low(B, W - 1, N), "state": _single(B, H, K, V), "w": _low(W, N)}
    x |= {"rate": _single(H), "bias": _single(H), "norm": _single(V)}

    order = tuple(x)

    def forward(x):
        return gated_deltanet_step(*(x[name] for name in order), implementation=form)

    return forward, x


def _mamba2_step(form, B: int, G: int, H: int, K: int, V: int, W: int):
    """One token of all of a Mamba-2 layer but its projections; state and tail are written where they were read."""
    N, M = 2 * G * K + H * V, H * V
    x = {"x": _low(B, N), "gate": _low(B, M), "dt": _low(B, H), "tail": _low(B, W - 1, N)}
    x |= {"state": _single(B, H, K, V), "w": _low(W, N), "conv_bias": _low(N)}
    x |= {"rate": _single(H), "bias": _single(H), "skip": _single(H), "norm": _single(M)}

    order = tuple(x)

    def forward(x):
        return mamba2_step(*(x[name] for name in order), norm_groups=G, implementation=form)

    return forward, x


def _convolution(form, B: int, T: int, D: int, W: int, packed: int = 0):
    """silu, and documents if ``packed``; padding in the middle is a branch of the program then."""
    x = {"x": _low(B, T, D), "w": _low(W, D), "bias": _low(D), "tail": _low(B, W - 1, D)}
    if packed:
        x["ids"] = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def forward(x):
        options = {"tail": x["tail"], "segment_ids": x.get("ids"), "activation": "silu", "implementation": form}
        return causal_conv(x["x"], x["w"], x["bias"], **options)

    return forward, x


def _megablox_tiling(M: int, E: int) -> tuple[int, int, int]:
    """One for all its legs, of rows, contraction and columns; fits VMEM, and rows suit the mean group."""
    return min(512, max(128, M // E // 2)), 1024, 1024


def _grouped(form, M: int, K: int, N: int, E: int):
    """'megablox' is jax's own kernel, with its transposed and outer legs."""
    x = {"x": _low(M, K), "w": _low(E, K, N), "sizes": jax.ShapeDtypeStruct((E,), jnp.int32)}

    def forward(x):
        if form == "megablox":
            from jax.experimental.pallas.ops.tpu.megablox import gmm

            return gmm(x["x"], x["w"], x["sizes"], preferred_element_type=jnp.bfloat16, tiling=_megablox_tiling(M, E))
        return grouped_matmul(x["x"], x["w"], x["sizes"], implementation=form)

    return forward, x


def _megablox_steps(form, way, M: int, K: int, N: int, E: int):
    """As many visits of tiles as any load needs, like the steps counted for our own kernel."""
    if form != "megablox":
        return None
    if way == "dx":
        K, N = N, K
    rows, inner, columns = (-(-size // tile) for size, tile in zip((M, K, N), _megablox_tiling(M, E), strict=True))
    return (rows + E - 1) * inner * columns


def _experts(form, M: int, K: int, N: int, E: int, D: int):
    """All of an expert MLP but its router: M tokens to K of E experts of hidden width N (gate and up) over a model of width D.
    'unfused' is the plain products' kernels and XLA's activation between them."""
    count = M * K
    of_choices: Any = jax.ShapeDtypeStruct((count,), jnp.int32)
    of_experts = _single(M, E)
    assignment = Assignment(of_choices, of_choices, _single(count), of_experts, of_experts, "output", K)
    x = {
        "x": _low(M, D),
        "w_in": _low(E, D, 2 * N),
        "w_out": _low(E, N, D),
        "groups": jax.eval_shape(group, assignment),
    }

    def forward(x):
        groups = x["groups"]
        if form == "unfused":
            h_MF = swiglu(groups.matmul(dispatch(x["x"], groups), x["w_in"]))
            return combine(
                groups.matmul(h_MF * groups.weight_M[:, None].astype(h_MF.dtype), x["w_out"]), groups, weighted=True
            )
        return expert_mlp(x["x"], x["w_in"], x["w_out"], groups, activation=swiglu, implementation=form)

    return forward, x


def _selection(form, B: int, T: int, H: int, K: int, N: int):
    """DSA's indexer: scores, top-k, and a bit a key; XLA's form sorts."""
    x = {"q": _low(B, T, H, K), "k": _low(B, T, K), "w": _single(B, T, H)}
    tokens = tokens_of(None, (B, T))
    return lambda x: select_mask(x["q"], x["k"], x["w"], tokens, tokens, top_k=N, implementation=form), x


def _selected(form, B: int, T: int, H: int, K: int, V: int):
    """Attention to a selection of one bit a key; 'splash' attends to every key before."""
    x = {"q": _low(B, T, H, K), "k": _low(B, T, H, K), "v": _low(B, T, H, V)}
    words = jax.ShapeDtypeStruct((B, T, 128 * -(-T // 4096)), jnp.uint32)

    def forward(x):
        selected = None if form == "splash" else x["words"]
        return (attention(x["q"], x["k"], x["v"], selected_BTN=selected, implementation=form),)

    return forward, x | {"words": words}


def _cross_entropy(form, N: int, D: int, V: int):
    """Sum of losses and both gradients from hidden states and head; 'tokamax' is that library's TPU kernel in the block
    sizes of fewest cycles out of fourteen."""
    x = {"x": _low(N, D), "head": _low(D, V), "targets": jax.ShapeDtypeStruct((N,), jnp.int32)}

    def ours(x):
        def loss(x_BTD, head_DV):
            return projected_cross_entropy(x_BTD, head_DV, x["targets"][None], jnp.ones((1, N), bool))[0]

        return jax.value_and_grad(loss, (0, 1))(x["x"][None], x["head"])

    def theirs(x):
        library, blocks = _tokamax(), dict(b_block_size=2048, h_block_size=2048, v_block_size=1024, reduction="sum")
        forward = library.linear_softmax_cross_entropy_loss_fwd_pallas_mosaic_tpu
        backward = library.linear_softmax_cross_entropy_loss_bwd_pallas_mosaic_tpu
        loss, log_sums = forward(x["x"], x["targets"], x["head"], **blocks)
        return loss, backward(jnp.float32(1), log_sums, x["x"], x["targets"], x["head"], **blocks)

    return theirs if form == "tokamax" else ours, x


def _tokamax():
    """The one file: the package wants more than is installed here, and to know the device (``pip install --no-deps tokamax``)."""
    package = importlib.util.find_spec("tokamax")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("tokamax is not installed: pip install --no-deps tokamax")
    path = Path(package.origin).parent / "_src/ops/linear_softmax_cross_entropy_loss/pallas_mosaic_tpu_kernel.py"
    spec: Any = importlib.util.spec_from_file_location("tokamax_cross_entropy", path)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = {
    "additive": _linear("token", False),
    "delta_rule": _linear("token", True),
    "gla": dataclasses.replace(_linear("channel", False), ways=()),
    "kda": _linear("channel", True),
    **{
        f"grouped_matmul_{name}": Call(
            _grouped,
            dict(zip("MKNE", sizes, strict=True)),
            ("ragged_dot", "megablox"),
            ("forward", "dx", "dw"),
            _megablox_steps,
        )
        for name, sizes in (("wide", (8192, 4096, 14336, 8)), ("fine", (32768, 2048, 768, 128)))
    },
    "expert_mlp": Call(
        _experts,
        {"M": 4096, "K": 8, "N": 768, "E": 128, "D": 2048},
        ("unfused",),
        ("forward", "dx", "forward_backward"),
    ),
    "sparse_select": Call(
        _selection,
        {"B": 1, "T": 8192, "H": 64, "K": 128, "N": 2048},
        ("xla",),
        ("forward",),
        inner=lambda T, **shape: -(-T // 256),  # blocks of keys
    ),
    "sparse_attention": Call(_selected, {"B": 1, "T": 8192, "H": 16, "K": 128, "V": 128}, ("splash",)),
    "step": Call(_step, {"B": 64, "H": 32, "K": 128, "V": 128}, ("recurrent",), ("forward",), donates=True),
    "gated_deltanet_step": Call(
        _mixer_step, {"B": 64, "G": 16, "H": 32, "K": 128, "V": 128, "W": 4}, ("xla",), ("forward",), donates=True
    ),
    "mamba2_step": Call(
        _mamba2_step, {"B": 64, "G": 8, "H": 128, "K": 128, "V": 64, "W": 4}, ("xla",), ("forward",), donates=True
    ),
    "cross_entropy": Call(
        _cross_entropy,
        {"N": 8192, "D": 4096, "V": 151936},
        ("xla", *(("tokamax",) if importlib.util.find_spec("tokamax") else ())),
        ("forward_backward",),
        kernel=False,
    ),
    "causal_conv": Call(_convolution, {"B": 1, "T": 8192, "D": 8192, "W": 4}, ("xla",)),
}
