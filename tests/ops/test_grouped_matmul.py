"""grouped_matmul against a loop over rows in float64, for every load."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.grouped_matmul import aligned_rows, grouped_matmul, padded_sizes, tile_rows
from tests.ops import moe_oracle

IMPLEMENTATIONS = ("looped", "tiled", "ragged_dot", "dense", None)


@functools.partial(jax.jit, static_argnames=("alignment", "implementation"))
def forward_and_backward(x_MK, w_EKN, sizes_E, dy_MN, *, alignment=1, implementation=None):
    function = functools.partial(grouped_matmul, alignment=alignment, implementation=implementation)
    y_MN, pull = jax.vjp(lambda x_MK, w_EKN: function(x_MK, w_EKN, sizes_E), x_MK, w_EKN)
    return y_MN, *pull(dy_MN)


def arrays(seed, rows, experts, width=6, columns=5):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(rows, width)),
        rng.normal(size=(experts, width, columns)),
        rng.normal(size=(rows, columns)),
    )


def check(x_MK, w_EKN, sizes, dy_MN, **options):
    """Rows past the sum are NaN on the way in, and finite and zero on the way out."""
    live = sum(sizes)
    expected = moe_oracle.grouped_matmul(x_MK, w_EKN, sizes, dy_MN)
    poisoned_MK, poisoned_MN = x_MK.copy(), dy_MN.copy()
    poisoned_MK[live:], poisoned_MN[live:] = np.nan, np.nan
    with jax.enable_x64(True):
        actual = forward_and_backward(poisoned_MK, w_EKN, np.array(sizes, np.int32), poisoned_MN, **options)
        for name, a, b in zip(("y", "dx", "dw"), actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=f"{name} {sizes} {options}")
        assert not np.any(actual[0][live:]) and not np.any(actual[1][live:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "sizes", [(3, 0, 9, 8), (40, 0, 0, 0), (0, 0, 0, 40), (0, 0, 0, 0), (1, 37, 1, 1), (2, 32, 3, 1)]
)
def test_equals_the_loop(implementation, sizes):
    x_MK, w_EKN, dy_MN = arrays(0, 40, 4)
    check(x_MK, w_EKN, sizes, dy_MN, implementation=implementation)


@pytest.mark.parametrize("implementation", ["looped", "tiled"])
@pytest.mark.parametrize("sizes", [(0, 2, 0, 1, 0, 0), (4, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0), (0, 0, 1, 1, 1, 1)])
def test_no_more_rows_than_groups(implementation, sizes):
    """As in decoding: every row reads its own matrix."""
    x_MK, w_EKN, dy_MN = arrays(5, 4, 6)
    check(x_MK, w_EKN, sizes, dy_MN, implementation=implementation)


@pytest.mark.parametrize(("implementation", "alignment"), [("looped", 1), ("looped", 8), ("tiled", 1), ("tiled", 8)])
def test_every_pattern_of_empty_groups(implementation, alignment):
    rows = 8 * 3 * alignment
    x_MK, w_EKN, dy_MN = arrays(1, rows, 8, 3, 2)
    patterns = np.array(list(itertools.product((0, 1), repeat=8)), np.int32)
    sizes_BE = patterns * alignment * (1 + np.arange(8, dtype=np.int32) % 3)
    one = functools.partial(forward_and_backward, implementation=implementation, alignment=alignment)
    with jax.enable_x64(True):
        actual = jax.jit(lambda sizes_BE: jax.lax.map(lambda sizes_E: one(x_MK, w_EKN, sizes_E, dy_MN), sizes_BE))(
            sizes_BE
        )
    actual = [np.asarray(a) for a in actual]
    for i, sizes_E in enumerate(sizes_BE):
        for a, b in zip(actual, moe_oracle.grouped_matmul(x_MK, w_EKN, sizes_E, dy_MN), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-12, atol=1e-12, err_msg=str(sizes_E))


@pytest.mark.parametrize("implementation", ["looped", "tiled"])
@pytest.mark.parametrize("sizes", [(16, 0, 8, 24), (64, 0, 0, 0), (0, 0, 0, 0)])
def test_alignment_changes_nothing(sizes, implementation):
    check(*arrays(2, 64, 4)[:2], sizes, arrays(2, 64, 4)[2], alignment=8, implementation=implementation)


@pytest.mark.parametrize("implementation", ["looped", "tiled", "ragged_dot"])
def test_bfloat16_accumulates_in_float32(implementation):
    # 4096 products of 1 × 2⁻¹⁰: summed in bfloat16 they would stick at 2⁻².
    x_MK = jnp.ones((8, 4096), jnp.bfloat16)
    w_EKN = jnp.full((2, 4096, 3), 2.0**-10, jnp.bfloat16)
    y_MN = jax.jit(functools.partial(grouped_matmul, implementation=implementation))(x_MK, w_EKN, jnp.array([5, 3]))
    assert y_MN.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y_MN.astype(jnp.float32), 4.0)


def test_gradient_of_the_matrix_has_its_dtype():
    x_MK, w_EKN, dy_MN = (jnp.asarray(a, jnp.float32) for a in arrays(3, 16, 2))
    _, pull = jax.vjp(lambda w_EKN: grouped_matmul(x_MK.astype(jnp.bfloat16), w_EKN, jnp.array([9, 7])), w_EKN)
    assert pull(dy_MN.astype(jnp.bfloat16))[0].dtype == jnp.float32


def test_one_program_for_every_load_and_bitwise_again():
    x_MK, w_EKN, dy_MN = (jnp.asarray(a, jnp.float32) for a in arrays(4, 96, 4))
    function = jax.jit(lambda *a: forward_and_backward(*a))
    first = function(x_MK, w_EKN, jnp.array([96, 0, 0, 0]), dy_MN)
    function(x_MK, w_EKN, jnp.array([20, 30, 40, 6]), dy_MN)
    again = function(x_MK, w_EKN, jnp.array([96, 0, 0, 0]), dy_MN)
    assert function._cache_size() == 1
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_cost_follows_rows_not_experts():
    def flops(experts, implementation):
        rows, width, columns = 4096, 64, 64
        shapes = ((rows, width), (experts, width, columns))
        arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        arguments += [jax.ShapeDtypeStruct((experts,), jnp.int32), jax.ShapeDtypeStruct((rows, columns), jnp.float32)]
        return forward_and_backward.lower(*arguments, implementation=implementation).compile().cost_analysis()["flops"]

    # The three ways (equal, evenly padded, tiled) are all counted, though one of them runs; of a loop, one step.
    ideal = 3 * 2 * 4096 * 64 * 64
    assert flops(8, "tiled") < 3 * 1.25 * ideal and flops(64, "tiled") < 3 * 1.5 * ideal
    assert flops(8, "looped") < 2.3 * ideal and flops(64, "looped") < 2.5 * ideal


def test_platform_is_chosen_when_lowered():
    """On TPU the kernel, or XLA's own where it does not serve the dtype; nothing of either elsewhere. On CUDA the kernel where it
    serves the dtype and the widths."""
    low = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((64, 64), (2, 64, 64))]
    traced = jax.jit(lambda x, w: grouped_matmul(x, w, jnp.full(2, 32))).trace(*low)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    for dtype, form in ((jnp.float32, "tpu_custom_call"), (jnp.float16, "ragged_dot")):
        arguments = [jax.ShapeDtypeStruct(s, dtype) for s in ((32, 8), (4, 8, 8))]
        traced = jax.jit(lambda x, w: grouped_matmul(x, w, jnp.full(4, 8))).trace(*arguments)
        assert form in traced.lower(lowering_platforms=("tpu",)).as_text()
        for platform in ("cpu", "cuda"):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert not any(name in text for name in ("ragged_dot", "tpu_custom_call", "mosaic_gpu"))


def test_vmap():
    x_MK, w_EKN, _ = arrays(5, 24, 3)
    x_BMK = jnp.stack([jnp.asarray(x_MK, jnp.float32), 2 * jnp.asarray(x_MK, jnp.float32)])
    sizes_BE = jnp.array([[8, 8, 8], [0, 20, 1]])
    w_EKN = jnp.asarray(w_EKN, jnp.float32)
    y_BMN = jax.jit(jax.vmap(grouped_matmul, (0, None, 0)))(x_BMK, w_EKN, sizes_BE)
    for i in range(2):
        np.testing.assert_allclose(y_BMN[i], jax.jit(grouped_matmul)(x_BMK[i], w_EKN, sizes_BE[i]), rtol=1e-6)


def test_empty_shapes():
    assert grouped_matmul(jnp.zeros((0, 4)), jnp.zeros((2, 4, 3)), jnp.zeros(2, jnp.int32)).shape == (0, 3)


def test_refusals():
    call = functools.partial(grouped_matmul, jnp.zeros((4, 2)), jnp.zeros((2, 2, 2)), jnp.array([2, 2]))
    with pytest.raises(ValueError, match="implementation is 'fast'"):
        call(implementation="fast")
    with pytest.raises(ValueError, match="alignment is 3"):
        call(alignment=3)


def test_worst_case_rows():
    for rows, groups, alignment in ((10, 3, 4), (1, 8, 16), (64, 4, 8), (0, 3, 8), (33, 3, 16)):
        room = aligned_rows(rows, groups, alignment)
        assert room % alignment == 0 and (rows < 4 * groups or room % groups == 0)
        for cuts in itertools.combinations_with_replacement(range(rows + 1), groups - 1):
            edges = (0, *cuts, rows)
            assert sum(-(-(b - a) // alignment) * alignment for a, b in itertools.pairwise(edges)) <= room
    assert tile_rows(1, 64) == 8 and tile_rows(2**20, 4) == 256


def test_groups_share_evenly_when_they_can():
    room = aligned_rows(64, 4, 8)
    np.testing.assert_array_equal(padded_sizes(jnp.array([20, 10, 20, 14]), room, 8), room // 4)
    np.testing.assert_array_equal(padded_sizes(jnp.array([64, 0, 0, 0]), room, 8), [64, 0, 0, 0])
    np.testing.assert_array_equal(padded_sizes(jnp.array([1, 0, 2]), aligned_rows(3, 3, 8) + 8, 8), [8, 0, 8])


@pytest.mark.parametrize("implementation", ["looped", "tiled"])
@pytest.mark.parametrize("sizes", [(16, 16, 16, 16), (20, 10, 20, 14)])
def test_even_shares_equal_the_loop(sizes, implementation):
    check(*arrays(2, 64, 4)[:2], sizes, arrays(2, 64, 4)[2], implementation=implementation)
    if sizes == (16, 16, 16, 16):
        check(*arrays(2, 64, 4)[:2], sizes, arrays(2, 64, 4)[2], alignment=8, implementation=implementation)
