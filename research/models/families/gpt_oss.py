"""gpt-oss (OpenAI 2025, arXiv 2508.10925): attention with sinks, every other layer in a window; experts with biases."""

from collections.abc import Iterator

from research.layers.attention import AttentionConfig
from research.layers.moe import Activation, MoEConfig, TopKRouter
from research.models.config import ModelConfig, Residual
from research.models.hub import BranchViews, Family, Keys, ModelViews, Tensor, joined, parts


def config(keys: Keys) -> ModelConfig:
    keys.only("hidden_act", "silu")
    # The length that YaRN starts from, which rope_scaling says too.
    keys.inert("initial_context_length")
    norm, heads, bias = parts.rms_norm(keys, eps=1e-5), keys["num_attention_heads"], keys.get("attention_bias", True)
    turning, window = parts.rope(keys, theta=150_000.0), keys.get("sliding_window", 128)

    def attention(window: int | None) -> AttentionConfig:
        return AttentionConfig(
            heads=heads,
            key_heads=keys.get("num_key_value_heads", heads),
            head_width=keys.get("head_dim", keys["hidden_size"] // heads),
            gated=False,
            qk_norm=None,
            window=window,
            sinks=True,
            bias=bias,
            out_bias=bias,
            **turning,
        )

    experts = MoEConfig(
        experts=keys.either("num_local_experts", "num_experts"),
        per_token=keys.either("num_experts_per_tok", "experts_per_token", default=4),
        hidden=keys["intermediate_size"],
        shared_hidden=0,
        activation=Activation(
            "swiglu",
            limit=float(keys.get("swiglu_limit", 7.0)),
            alpha=float(keys.get("swiglu_alpha", 1.702)),
            shift=1.0,
        ),
        biases=True,
        router=TopKRouter(score="softmax_after"),
        router_bias=True,
    )
    mixers = {
        "sliding_attention": Residual("attention_window", attention(window), pre_norm=norm),
        "full_attention": Residual("attention", attention(None), pre_norm=norm),
    }
    sparse = Residual("experts", experts, pre_norm=norm)
    ours = ["full_attention" if n % 2 else "sliding_attention" for n in range(keys["num_hidden_layers"])]
    layers = [(mixers[kind], sparse) for kind in keys.get("layer_types", ours)]
    return parts.language_model(keys, layers, norm)


def experts(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    """All experts in one tensor, input first, gate and up by turns."""
    yield parts.linear(f"{prefix}router.weight", branch["mixer.w_router_DE"])
    yield joined(f"{prefix}router.bias", branch["mixer.b_router_E"])
    E, D, N = branch["mixer.w_in_EDF"].shape
    by_turns = branch["mixer.w_in_EDF"].split(2, 2, -1).order(0, 1, 3, 2)
    yield joined(f"{prefix}experts.gate_up_proj", by_turns, shape=(E, D, N))
    biases = branch["mixer.b_in_EF"].split(1, 2, -1).order(0, 2, 1)
    yield joined(f"{prefix}experts.gate_up_proj_bias", biases, shape=(E, N))
    yield joined(f"{prefix}experts.down_proj", branch["mixer.w_out_EFD"])
    yield joined(f"{prefix}experts.down_proj_bias", branch["mixer.b_out_ED"])


def attention(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    yield from parts.attention(prefix, branch)
    yield joined(f"{prefix}sinks", branch["mixer.sinks_H"])


def tensors(model: ModelViews) -> Iterator[Tensor]:
    return parts.decoder(model, attention, experts)


FAMILY = Family(model_types=("gpt_oss",), architectures=("GptOssForCausalLM",), config=config, tensors=tensors)
