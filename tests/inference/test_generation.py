"""Generated tokens against the model's own parallel form, and the promises of the arguments."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.inference import decoding, generate, stream
from research.inference.generation import size_class
from research.models.language_model import LanguageModel
from research.sharding.mesh import MeshConfig, make_mesh
from research.training.runs import placed
from tests.models.small import CONFIG

SMALLER = dataclasses.replace(CONFIG, pattern=("linear", "moe", "full"), repeats=1)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7], [30], [0, 0, 7]]
NEW = 12


def random_model() -> LanguageModel:
    """Every parameter drawn at random, with nothing to compile."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        scale = leaf.shape[-2] ** -0.5 if leaf.ndim > 2 else 0.3
        return jax.device_put((scale * rng.normal(size=leaf.shape)).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, placed(jax.eval_shape(lambda: LanguageModel(SMALLER, rngs=nnx.Rngs(0)))))


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, NEW)


SAMPLED = {"max_new_tokens": NEW, "temperature": 1.5, "top_k": 20, "top_p": 0.95, "min_p": 0.01}


@pytest.fixture(scope="module")
def sampled(model):
    return generate(model, PROMPTS, **SAMPLED, seed=1)


def test_greedy_is_the_argmax_of_the_parallel_form(model, greedy):
    T = max(map(len, PROMPTS)) + NEW
    rows_BT, ids_BT = np.zeros((4, T), np.int32), np.zeros((4, T), np.int32)
    for b, (prompt, new) in enumerate(zip(PROMPTS, greedy, strict=True)):
        assert len(new) == NEW
        rows_BT[b, : len(prompt) + NEW], ids_BT[b, : len(prompt) + NEW] = prompt + new, 1
    logits_BTV = np.asarray(jax.jit(lambda model, *args: model(*args).logits_BTV)(model, rows_BT, ids_BT))
    for b, (prompt, new) in enumerate(zip(PROMPTS, greedy, strict=True)):
        before_NV = logits_BTV[b, len(prompt) - 1 : len(prompt) + NEW - 1]
        top_N2 = np.sort(before_NV, axis=-1)[:, -2:]
        assert np.diff(top_N2).min() > 1e-4, "a tie would prove nothing"
        assert before_NV.argmax(-1).tolist() == new


def test_a_batch_of_different_lengths_equals_each_alone(model, greedy):
    for prompt, new in zip(PROMPTS, greedy, strict=True):
        assert generate(model, [prompt] * 4, NEW) == [new] * 4


def test_sampling_goes_by_seed_row_and_place(model, sampled):
    assert generate(model, PROMPTS, **SAMPLED, seed=1) == sampled
    other = generate(model, PROMPTS, **SAMPLED, seed=2)
    assert all(a != b for a, b in zip(sampled, other, strict=True))
    twins = generate(model, [PROMPTS[0]] * 4, **SAMPLED, seed=1)
    assert twins[0] == sampled[0], "what stands in the other rows must not matter"
    assert len(set(map(tuple, twins))) == 4, "equal prompts must not get equal samples"


def test_a_row_ends_with_its_stop_token(model, sampled):
    stop = {sampled[0][4], sampled[2][0]}
    expected = []
    for row in sampled:
        end = next((n for n, token in enumerate(row) if token in stop), NEW - 1)
        expected.append(row[: end + 1])
    assert len(expected[0]) <= 5 and len(expected[2]) == 1
    assert generate(model, PROMPTS, **SAMPLED, stop=stop, seed=1) == expected


def test_streaming_equals_generating(model, sampled):
    blocks = list(stream(model, PROMPTS, **SAMPLED, seed=1, block=5))
    assert [[len(row) for row in block] for block in blocks] == [[n] * 4 for n in (1, 5, 5, 1)]
    assert [list(itertools.chain(*rows)) for rows in zip(*blocks, strict=True)] == sampled
    stopped = list(stream(model, PROMPTS, **SAMPLED, seed=1, block=2, stop=range(31)))
    assert stopped == [[[row[0]] for row in sampled]], "nothing is yielded once every row has ended"


def test_nothing_is_traced_twice(model, sampled):
    before = decoding.prefill._cache_size(), decoding.decode._cache_size()
    # Other prompts of the size class, numbers, stops, seeds and lengths: the same programs.
    generate(model, [[1] * 20, [2], [3], [4]], 7, temperature=0.7, top_k=3, top_p=0.5, min_p=0.2, stop=(1, 2), seed=5)
    list(stream(model, PROMPTS, **SAMPLED, block=3))
    assert (decoding.prefill._cache_size(), decoding.decode._cache_size()) == before


def test_decoding_takes_constant_memory(model):
    """The loop's cache is the one given, updated in place; what it needs beside does not grow with the tokens drawn."""
    empty = model.init_cache(4, 64)
    keys = jax.random.split(jax.random.key(0), 4)
    zeros_B = jnp.zeros(4, jnp.int32)
    state = decoding.Decoding(empty, zeros_B, zeros_B, zeros_B > 0, keys)
    arguments = (model, state, np.zeros(31, bool), decoding.Sampling(None))
    compiled = decoding.decode.lower(*arguments, np.int32(8)).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(empty))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= 4 * decoding.BLOCK * 4 + 256


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_state_keeps_its_types_in_any_dtype(dtype):
    """Traced, not run: prefill gives what decode takes and gives back."""
    config = dataclasses.replace(SMALLER, dtype=dtype, param_dtype=dtype)
    with jax.enable_x64(dtype == "float64"):
        model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
        rest = np.zeros(31, bool), decoding.Sampling(0.5, top_k=3)
        prompts = np.zeros((2, 32), np.int32), np.ones(2, np.int32)
        prefill = functools.partial(decoding.prefill, max_length=64)
        _, state = jax.eval_shape(prefill, model, *prompts, rest[0], np.uint32(0), rest[1])
        drawn, after = jax.eval_shape(decoding.decode, model, state, *rest, np.int32(3))
        told, _ = jax.eval_shape(functools.partial(decoding.decode, top=2), model, state, *rest, np.int32(3))
    assert drawn.ids_BN.dtype == np.int32 and told.top_logprobs_BNK.shape == (2, decoding.BLOCK, 2)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


@pytest.mark.slow
def test_a_mesh_changes_nothing(greedy):
    """Six devices, four prompts: rows of no tokens fill up the mesh."""
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:6])):
        assert generate(random_model(), PROMPTS, NEW) == greedy


def test_no_prompts_give_nothing(model):
    assert generate(model, []) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty: it must hold at least one token id"),
        ({"prompts": [[1, 31]]}, r"prompts\[0\] must hold token ids from 0 to 30, got 31"),
        ({"prompts": [[-1]]}, r"prompts\[0\] must hold token ids from 0 to 30, got -1"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, r"temperature must be a number of at least 0, got -1.0"),
        ({"top_k": 0}, r"top_k must be at least 1, got 0"),
        ({"top_p": 0}, r"top_p must be None, or more than 0 and at most 1, got 0"),
        ({"min_p": 2}, r"min_p must be None or from 0 to 1, got 2"),
        ({"stop": [31]}, r"stop must hold token ids from 0 to 30, got 31"),
        ({"seed": -1}, r"seed must be at least 0 and at most 4294967295, got -1"),
        ({"seed": 2**32}, r"seed must be at least 0 and at most 4294967295, got 4294967296"),
    ],
)
def test_a_bad_argument_is_named_before_anything_runs(model, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        stream(model, **{"prompts": [[1]], **arguments})


def test_ids_of_any_kind_of_array(model, greedy):
    prompts = [np.asarray(PROMPTS[0]), jnp.asarray(PROMPTS[1]), tuple(PROMPTS[2]), np.asarray(PROMPTS[3], np.uint8)]
    assert generate(model, prompts, np.int64(NEW), 0) == greedy


def test_size_classes_waste_little():
    sizes = [size_class(n) for n in range(1, 5000)]
    assert all(n <= size <= max(32, n * 1.25) or size - n < 32 for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and len(set(sizes)) < 35
    assert all(size_class(size) == size for size in sizes)
