"""Llama 4 (Meta 2025), its language model: attention within chunks, and every few layers to all without positions; an expert's
input is weighted, not its output.

The hub's directories are multimodal: config.json nests the language model in ``text_config``, its tensors lie under
``language_model``, and those of the vision tower are left out."""

from collections.abc import Iterator

from research.layers.attention import AttentionConfig
from research.layers.mlp import MLPConfig
from research.layers.moe import MoEConfig, TopKRouter
from research.models.config import ModelConfig, Residual
from research.models.hub import BranchViews, Family, Keys, ModelViews, Tensor, joined, parts


def config(keys: Keys) -> ModelConfig:
    keys.only("hidden_act", "silu")
    keys.inert("for_llm_compressor")
    norm, depth = parts.rms_norm(keys, eps=1e-5), keys["num_hidden_layers"]
    turning = parts.rope(keys, theta=500_000.0)
    chunk, tuned = keys.get("attention_chunk_size", 8192), keys.get("attn_temperature_tuning", True)
    temperature, floor = keys.get("attn_scale", 0.1), keys.get("floor_scale", 8192)
    heads, bias, qk_norm = keys["num_attention_heads"], keys.get("attention_bias", False), keys.get("use_qk_norm", True)

    def attention(turns: bool, chunked: bool) -> AttentionConfig:
        return AttentionConfig(
            heads=heads,
            key_heads=keys.get("num_key_value_heads", heads),
            head_width=keys.get("head_dim", 128),
            rope_layout="pairs",
            gated=False,
            qk_norm=None,
            rms_after_rope=turns and qk_norm,
            rms_after_rope_eps=norm.eps,
            chunk=chunk if chunked else None,
            temperature=0.0 if turns or not tuned else temperature,
            temperature_floor=floor,
            bias=bias,
            out_bias=bias,
            **(turning if turns else {**turning, "rotary_fraction": 0.0}),
        )

    experts = MoEConfig(
        experts=keys["num_local_experts"],
        per_token=keys.get("num_experts_per_tok", 1),
        hidden=keys["intermediate_size"],
        shared_hidden=keys["intermediate_size"],
        router=TopKRouter(score="sigmoid", renormalise=False, weight_on="input"),
    )
    interval, step = keys.get("no_rope_layer_interval", 4), keys.get("interleave_moe_layer_step", 1)
    turns = keys.get("no_rope_layers") or [int((n + 1) % interval != 0) for n in range(depth)]
    kinds = keys.get("layer_types", ["chunked_attention" if turn else "full_attention" for turn in turns])
    sparse_layers = keys.get("moe_layers", list(range(step - 1, depth, step)))
    sparse = Residual("experts", experts, pre_norm=norm)
    dense = Residual("mlp", MLPConfig(keys["intermediate_size_mlp"]), pre_norm=norm)
    layers = []
    for n, (turn, kind) in enumerate(zip(turns, kinds, strict=True)):
        name = ("attention" if turn else "attention_placeless") + ("_chunked" if kind == "chunked_attention" else "")
        mixer = Residual(name, attention(bool(turn), kind == "chunked_attention"), pre_norm=norm)
        layers.append((mixer, sparse if n in sparse_layers else dense))
    return parts.language_model(keys, layers, norm)


def feed_forward(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    if isinstance(branch.residual.mixer, MLPConfig):
        yield from parts.gated_mlp(prefix, branch)
        return
    yield parts.linear(f"{prefix}router.weight", branch["mixer.w_router_DE"])
    yield joined(f"{prefix}experts.gate_up_proj", branch["mixer.w_in_EDF"])
    yield joined(f"{prefix}experts.down_proj", branch["mixer.w_out_EFD"])
    yield from parts.shared_expert(f"{prefix}shared_expert.", branch)


def tensors(model: ModelViews) -> Iterator[Tensor]:
    return parts.decoder(model, parts.attention, feed_forward, inner="feed_forward.")


FAMILY = Family(
    model_types=("llama4_text",),
    architectures=("Llama4ForCausalLM",),
    config=config,
    tensors=tensors,
    ignored=(r"vision_model\..*", r"multi_modal_projector\..*"),
    multimodal=("Llama4ForConditionalGeneration",),
    spellings=((r"^language_model\.", ""),),
)
