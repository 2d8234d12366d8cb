"""MiniMax-Text-01 and M1 (MiniMax 2025, arXiv 2501.08313 and 2506.13585): seven layers of lightning attention to one of
softmax, experts, and skips that are normalised and scaled.

RoPE turns the share of a head that ``rotary_dim`` says, half in the published models; transformers' own class (5.23) turns all
of it whatever the key says.
"""

from collections.abc import Iterator

from research.layers.attention import AttentionConfig
from research.layers.lightning import LightningConfig
from research.layers.moe import MoEConfig, TopKRouter
from research.models.config import Mixer, ModelConfig, Residual
from research.models.hub import BranchViews, Family, Keys, ModelViews, Tensor, joined, parts


def config(keys: Keys) -> ModelConfig:
    keys.only("hidden_act", "silu")
    keys.only("sliding_window", None)
    keys.only("postnorm", True)
    keys.only("shared_intermediate_size", 0)
    keys.inert("block_size", "shared_moe_mode")
    norm, heads = parts.rms_norm(keys, eps=1e-5), keys["num_attention_heads"]
    width = keys.get("head_dim", keys["hidden_size"] // heads)
    attention = AttentionConfig(
        heads=heads,
        key_heads=keys.get("num_key_value_heads", heads),
        head_width=width,
        gated=False,
        qk_norm=None,
        **parts.rope(keys, theta=1_000_000.0, fraction=keys.get("rotary_dim", width) / width),
    )
    experts = MoEConfig(
        experts=keys["num_local_experts"],
        per_token=keys.get("num_experts_per_tok", 2),
        hidden=keys["intermediate_size"],
        shared_hidden=0,
        router=TopKRouter(renormalise=True),
    )

    def branch(name: str, mixer: Mixer, ours: str, theirs: str) -> Residual:
        skip, scale = (
            float(keys.either(f"{ours}_{x}_factor", f"layernorm_{theirs}_{x}", default=1.0)) for x in ("alpha", "beta")
        )
        return Residual(name, mixer, pre_norm=norm, skip="normed", skip_scale=skip, branch_scale=scale)

    mixers = {
        "linear_attention": branch("lightning", LightningConfig(heads, width), "linear_attn", "linear_attention"),
        "full_attention": branch("attention", attention, "full_attn", "full_attention"),
    }
    sparse = branch("experts", experts, "mlp", "mlp")
    return parts.language_model(keys, [(mixers[kind], sparse) for kind in layer_types(keys)], norm)


def layer_types(keys: Keys) -> list[str]:
    """Said for each layer, or 0 and 1."""
    published = [("linear_attention", "full_attention")[kind] for kind in keys.get("attn_type_list", [])]
    return keys.get("layer_types", published) or keys["layer_types"]


def lightning(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    """Queries, keys and values are stored a head after the other."""
    c = branch.mixer(LightningConfig)
    N, D = c.heads * c.head_width, branch["mixer.w_out_ND"].shape[1]
    heads = [view.T.split(0, c.heads, -1) for view in branch["mixer.w_qkv_DN"].cut(1, N, N, N)]
    yield joined(f"{prefix}qkv_proj.weight", *heads, axis=1, shape=(-1, D))
    yield parts.linear(f"{prefix}output_gate.weight", branch["mixer.w_gate_DN"])
    yield joined(f"{prefix}norm.weight", branch["mixer.norm.scale_D"])
    yield parts.linear(f"{prefix}out_proj.weight", branch["mixer.w_out_ND"])


def tensors(model: ModelViews) -> Iterator[Tensor]:
    yield from parts.ends(model)
    for n in range(len(model.branches) // 2):
        mixer, experts = model.branches[2 * n : 2 * n + 2]
        prefix = f"model.layers.{n}."
        yield joined(f"{prefix}input_layernorm.weight", mixer["pre_norm.scale_D"])
        attend = lightning if isinstance(mixer.residual.mixer, LightningConfig) else parts.attention
        yield from attend(f"{prefix}self_attn.", mixer)
        yield joined(f"{prefix}post_attention_layernorm.weight", experts["pre_norm.scale_D"])
        yield from parts.experts(f"{prefix}block_sparse_moe.", experts, ("w1", "w3", "w2"))


FAMILY = Family(
    model_types=("minimax", "minimax_text_01", "minimax_m1", "MiniMaxText01", "MiniMaxM1"),
    architectures=("MiniMaxForCausalLM", "MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM"),
    config=config,
    tensors=tensors,
    # Decays, which are a function of the layer.
    ignored=(r".*\.self_attn\.(slope_rate|(query|key|diagonal)_decay)", r".*\.rotary_emb\.inv_freq"),
)
