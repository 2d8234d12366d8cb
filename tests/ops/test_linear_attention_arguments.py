"""What the op refuses, with what words; how much memory its gradient takes; how it lies on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research.ops.linear_attention import IMPLEMENTATIONS, linear_attention, linear_attention_step
from research.ops.linear_attention.dispatch import check_arguments
from tests.ops.test_linear_attention import MECHANISMS, error, expected, make


@pytest.mark.parametrize("name", [n for n in IMPLEMENTATIONS if n.startswith("pallas_gpu")])
def test_what_the_gpu_kernel_cannot_serve_is_refused(name):
    x = jnp.ones((1, 4, 1, 2))
    with pytest.raises(NotImplementedError, match=f"{name}.*takes bfloat16, got float32 queries"):
        linear_attention(x, x, x, implementation=name)
    with pytest.raises(NotImplementedError, match=name):
        linear_attention_step(x[:, 0], x[:, 0], x[:, 0], jnp.ones((1, 1, 2, 2)), implementation=name)


def test_names_and_sizes_are_checked():
    x = jnp.ones((1, 4, 1, 2))
    with pytest.raises(ValueError, match=r"None or one of recurrent, quadratic, chunked, pallas_tpu.*got 'triton'"):
        linear_attention(x, x, x, implementation="triton")
    with pytest.raises(NotImplementedError, match="power of two, got 24"):
        linear_attention(x, x, x, chunk_size=24)
    with pytest.raises(ValueError, match="positive power of two, got 0"):
        linear_attention(x, x, x, chunk_size=0)
    with pytest.raises(NotImplementedError, match="has no chunks; got chunk_size=16"):
        linear_attention(x, x, x, implementation="recurrent", chunk_size=16)
    with pytest.raises(NotImplementedError, match="'chunked' has no step"):
        linear_attention_step(x[:, 0], x[:, 0], x[:, 0], jnp.ones((1, 1, 2, 2)), implementation="chunked")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 5, 2)}, r"q must be \[B, T, G, K\], got shape \(2, 5, 2\)"),
        ({"q": (2, 5, 2, 3)}, r"q and k must have one shape, got \(2, 5, 2, 3\) and \(2, 5, 2, 4\)"),
        ({"v": (2, 5, 3, 6)}, "key heads G=2 must divide the number of value heads H=3"),
        ({"log_decay": (2, 5)}, r"log_decay must be \[H\]=\(4,\), .* got shape \(2, 5\)"),
        ({"beta": (2, 5)}, r"beta must have shape \(2, 5, 4\), got \(2, 5\)"),
        ({"initial_state": (2, 4, 6, 4)}, r"initial_state must have shape \(2, 4, 4, 6\)"),
        ({"segment_ids": (5,)}, r"segment_ids must have shape \(2, 5\)"),
    ],
)
def test_shapes_are_checked(change, message):
    shapes = {"q": (2, 5, 2, 4), "k": (2, 5, 2, 4), "v": (2, 5, 4, 6), "log_decay": None, "beta": None}
    shapes |= {"initial_state": None, "segment_ids": None} | change
    arrays = [
        None if s is None else np.zeros(s, np.int32 if n == "segment_ids" else np.float32) for n, s in shapes.items()
    ]
    with pytest.raises(ValueError, match=message):
        check_arguments(*arrays)


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet", "kda"])
def test_the_gradient_at_65536_tokens_fits_beside_its_inputs_and_outputs(name):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    T, H, K = 65536, 8, 64
    decay, delta = MECHANISMS[name]
    x = {"q": shape(1, T, H, K), "k": shape(1, T, H, K), "v": shape(1, T, H, K)}
    x["log_decay"] = shape(1, T, H, K) if decay == "channel" else shape(1, T, H)
    x["beta"] = shape(1, T, H) if delta else None

    def gradient(x, do):
        op = lambda x: linear_attention(x["q"], x["k"], x["v"], log_decay=x["log_decay"], beta=x["beta"])[0]  # noqa: E731
        return jax.vjp(op, x)[1](do)[0]

    compiled = jax.jit(gradient, compiler_options={"xla_backend_optimization_level": 0}).lower(x, x["v"]).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes <= 1.2 * (memory.argument_size_in_bytes + memory.output_size_in_bytes)


def test_on_an_explicit_mesh_each_device_runs_its_rows_and_heads():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    x, cotangents = make(0, 4, 20, 2, 4, 8, 6, *MECHANISMS["gated_deltanet"])
    want = expected(x, cotangents, np.ones((4, 20), np.int32))
    with jax.set_mesh(mesh):
        put = lambda a, *s: jax.device_put(a, NamedSharding(mesh, P(*s)))  # noqa: E731
        y = {
            n: put(v, "data", "model") if n == "initial_state" else put(v, "data", None, "model") for n, v in x.items()
        }
        ids = put(np.ones((4, 20), np.int32), "data")

        def op(y):
            options = {n: y[n] for n in ("log_decay", "beta", "initial_state")}
            return linear_attention(y["q"], y["k"], y["v"], **options, scale=0.5, segment_ids=ids)

        o, state = jax.jit(op)(y)
        pulled = jax.jit(lambda y, c: jax.vjp(op, y)[1](c)[0])
        gradients = pulled(y, (put(cotangents[0], "data", None, "model"), put(cotangents[1], "data", "model")))
    assert jax.typeof(o).sharding.spec == P("data", None, "model", None)
    assert error(o, want[0]) < 2e-6 and error(state, want[1]) < 2e-6
    for n in want[2]:
        assert error(gradients[n], want[2][n]) < 2e-6, n
