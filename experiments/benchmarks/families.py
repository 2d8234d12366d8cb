"""Three published families at hidden width 256: forward, training step and decoding, beside transformers on the same weights.

Eight layers, 1,024 tokens, float32. ``python -m experiments.benchmarks.families DIR`` writes the models as Hugging Face
directories; ``tests/interop/measure.py DIR``, in the environment of the golden files, measures transformers on them.
"""

import functools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.inference import generate
from research.interop import huggingface
from research.models.families import model_config
from research.models.language_model import LanguageModel
from research.training.optimizers import OptimizerConfig, make_optimizer
from research.training.state import create_state
from research.training.step import make_train_step

T, NEW = 1024, 64
_COMMON: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 4096,
    "attention_bias": False, "attention_dropout": 0.0, "output_router_logits": False, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": True, "dtype": "float32",
}  # fmt: skip
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
# Published models' layers, an eighth to a tenth as wide; experts as many per token, and 64 of them.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **_COMMON, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_hidden_layers": 8,
        "head_dim": 128, "num_key_value_heads": 2, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25},
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64, "linear_num_key_heads": 4, "linear_value_head_dim": 64, "linear_num_value_heads": 8,
        "num_experts": 64, "num_experts_per_tok": 10, "moe_intermediate_size": 64, "intermediate_size": 640,
        "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "hidden_act": "silu", "rms_norm_eps": 1e-6,
    },
    "nemotron_h": {
        **_COMMON, "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h",
        "layers_block_type": ["linear_attention", "moe", "linear_attention", "moe", "linear_attention",
                              "full_attention", "moe", "mlp"],
        "head_dim": 64, "num_key_value_heads": 2, "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 2,
        "ssm_state_size": 128, "conv_kernel": 4, "expand": 2, "chunk_size": 128, "use_bias": False,
        "use_conv_bias": True, "mamba_proj_bias": False, "mamba_hidden_act": "silu", "mlp_bias": False,
        "mlp_hidden_act": "relu2", "intermediate_size": 1024, "n_routed_experts": 64, "num_experts_per_tok": 6,
        "moe_intermediate_size": 192, "moe_shared_expert_intermediate_size": 384, "n_shared_experts": 1,
        "moe_latent_size": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "layer_norm_epsilon": 1e-5, "time_step_limit": [0.0, {"__float__": "Infinity"}],
    },
    "olmoe": {
        **_COMMON, "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "num_hidden_layers": 8,
        "num_key_value_heads": 4, "num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 128,
        "norm_topk_prob": False, "clip_qkv": None, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_parameters": _ROPE,
    },
}  # fmt: skip


def run(quick: bool = False) -> dict[str, Any]:
    """Of each family: milliseconds of the forward pass and of a training step (AdamW, gradients clipped) on one row of T
    tokens, tokens a second decoded after them, and the first tokens of the greedy continuation. Best of three medians;
    programs are compiled first. ``matmul_1024_ms`` is numpy's, for comparison with another process.
    """
    rounds, repeats = (1, 1) if quick else (3, 5)
    families = {}
    for name, hub in FAMILIES.items():
        model, tokens_BT = make(hub), prompt(hub["vocab_size"])
        graphdef, _, _ = nnx.split(model, nnx.Param, ...)
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5, warmup_steps=0), 1000)
        _, state = create_state(model.config, optimizer, seed=0)
        step = TrainStep(make_train_step(graphdef, optimizer), state, tokens_BT)
        forward = functools.partial(_forward, model, jnp.asarray(tokens_BT))
        first = functools.partial(generate, model, tokens_BT.tolist(), 1)
        new = generate(model, tokens_BT.tolist(), 1 + NEW)[0]
        forward_s, step_s, first_s, all_s, matmul_s = best_times(
            (forward, step, first, functools.partial(generate, model, tokens_BT.tolist(), 1 + NEW), matmul()),
            rounds,
            repeats,
        )
        families[name] = {
            "parameters": sum(x.size for x in jax.tree.leaves(model)),
            "forward_ms": round(1e3 * forward_s, 2),
            "train_step_ms": round(1e3 * step_s, 2),
            "decode_tokens_per_second": round(NEW / (all_s - first_s), 1),
            "matmul_1024_ms": round(1e3 * matmul_s, 2),
            "continuation": new[:16],
        }
    return {
        "shape": {"B": 1, "T": T, "width": 256, "layers": 8, "new_tokens": NEW, "dtype": "float32"},
        "ours": families,
    }


def make(hub: dict[str, Any]) -> LanguageModel:
    """The model of a config.json at its initialisation, the same every time."""
    build = jax.jit(lambda key: LanguageModel(model_config(hub), rngs=nnx.Rngs(params=key)))
    return build(jax.random.key(0))


def prompt(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (1, T)).astype(np.int32)


class TrainStep:
    """A step that goes on from the last: its state is donated."""

    def __init__(self, step, state, tokens_BT: np.ndarray):
        self._step, self._state = step, state
        self._batch = {
            "inputs_BT": jnp.asarray(tokens_BT),
            "targets_BT": jnp.asarray(np.roll(tokens_BT, -1, axis=1)),
            "segment_ids_BT": jnp.ones((1, T), jnp.int32),
            "positions_BT": jnp.arange(T, dtype=jnp.int32)[None],
            "loss_mask_BT": jnp.ones((1, T), bool).at[:, -1].set(False),
        }

    def __call__(self):
        self._state, metrics = self._step(self._state, self._batch)
        return metrics["loss"]


@jax.jit
def _forward(model, tokens_BT):
    return model(tokens_BT).logits_BTV


def matmul():
    """numpy's product of two 1024² float32 matrices: what the machine gives, without JAX."""
    square = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    return functools.partial(np.matmul, square, square)


def best_times(functions: Sequence[Any], rounds: int, repeats: int) -> list[float]:
    """Seconds of each, taken in turn: the best of ``rounds`` medians of ``repeats``. Each has run once before."""
    for function in functions:
        jax.block_until_ready(function())
    medians = []
    for _ in range(rounds):
        seconds = [[_seconds(function) for function in functions] for _ in range(repeats)]
        medians.append([statistics.median(column) for column in zip(*seconds, strict=True)])
    return [min(column) for column in zip(*medians, strict=True)]


def _seconds(function) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def write(directory: Path) -> None:
    """The models as Hugging Face directories, each with the prompt."""
    for name, hub in FAMILIES.items():
        tokens_BT = prompt(hub["vocab_size"])
        huggingface.save(make(hub), hub, directory / name, {"prompt.json": str(tokens_BT[0].tolist())})
        print(f"wrote {directory / name}")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
