"""Qwen3.5, dense, its language model (Qwen Team 2026): Qwen3-Next's mixers with their projections stored apart.

The hub's directories are multimodal: config.json nests the language model in ``text_config``, its tensors lie under
``model.language_model``, and those of the vision tower are left out. Its head ahead is Qwen3-Next's too; config.json announces it as ``mtp_num_hidden_layers: 1``.
"""

from collections.abc import Iterator

from research.layers.gated_deltanet import GatedDeltaNetConfig
from research.layers.mlp import MLPConfig
from research.models.config import ModelConfig, Residual
from research.models.families import qwen3_next
from research.models.hub import BranchViews, Family, Keys, ModelViews, Tensor, parts


def config(keys: Keys) -> ModelConfig:
    return model(keys, Residual("mlp", MLPConfig(keys["intermediate_size"]), pre_norm=qwen3_next.norm(keys)))


def model(keys: Keys, feed_forward: Residual) -> ModelConfig:
    """Of Qwen3.5, dense or with experts."""
    keys.only("hidden_act", "silu")
    keys.only("attn_output_gate", True)
    # The gate on the recurrence's output: SiLU by another name.
    keys.only("output_gate_type", "swish", "silu")
    keys.only("mlp_only_layers", [])
    keys.inert("mamba_ssm_dtype", "full_attention_interval")
    mixers = qwen3_next.mixers(keys)
    layers = [(mixers[kind], feed_forward) for kind in qwen3_next.layer_types(keys)]
    model = parts.language_model(keys, layers, qwen3_next.norm(keys))
    if not keys.only("mtp_num_hidden_layers", 0, 1):
        keys.inert("mtp_use_dedicated_embeddings")
        return model
    keys.only("mtp_use_dedicated_embeddings", False)
    return qwen3_next.with_head(model, (mixers["full_attention"], feed_forward))


def gated_deltanet(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    c = branch.mixer(GatedDeltaNetConfig)
    yield parts.linear(f"{prefix}in_proj_qkv.weight", branch["mixer.w_qkv_DN"])
    yield parts.linear(f"{prefix}in_proj_z.weight", branch["mixer.w_gate_DN"])
    for name, view in zip("ba", branch["mixer.w_ba_DN"].cut(1, c.heads, c.heads), strict=True):
        yield parts.linear(f"{prefix}in_proj_{name}.weight", view)
    yield from qwen3_next.recurrence(prefix, branch)


def tensors(model: ModelViews) -> Iterator[Tensor]:
    return qwen3_next.tensors(model, gated_deltanet)


FAMILY = Family(
    model_types=("qwen3_5_text",),
    architectures=("Qwen3_5ForCausalLM",),
    config=config,
    tensors=tensors,
    ignored=(r"mtp\..*", r"model\.visual\..*"),
    multimodal=("Qwen3_5ForConditionalGeneration",),
    spellings=((r"^model\.language_model\.", "model."),),
)
