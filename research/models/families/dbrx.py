"""DBRX (Databricks 2024): sixteen experts, four a token; LayerNorm without biases; queries, keys and values clipped."""

from collections.abc import Iterator

from research.layers.attention import AttentionConfig
from research.layers.moe import MoEConfig, TopKRouter
from research.layers.norms import RMSNormConfig
from research.models.config import ModelConfig, Residual
from research.models.hub import Family, Keys, ModelViews, Tensor, joined, parts
from research.models.hub.keys import INERT


def config(keys: Keys) -> ModelConfig:
    attending, feeding = keys.inside("attn_config"), keys.inside("ffn_config")
    heads, width = keys["n_heads"], keys["d_model"]
    feeding.inert("moe_jitter_eps", "moe_loss_weight", "hidden_size")
    attending.inert("attn_pdrop")
    keys.inert("emb_pdrop", "max_seq_len", "num_key_value_heads")
    for inner in (attending, feeding):
        # transformers writes into a part's configuration what it writes into any.
        inner.inert(*INERT)
    activation = feeding.inside("ffn_act_fn")
    activation.only("name", "silu")
    # Written for transformers' own sake: the attention reads its rope_theta.
    turning = keys.inside("rope_parameters")
    turning.only("rope_type", "default")
    clip = attending.get("clip_qkv")
    attention = AttentionConfig(
        heads=heads,
        key_heads=attending.get("kv_n_heads", 1),
        head_width=width // heads,
        rotary_fraction=1.0,
        rope_theta=float(turning.get("rope_theta", attending.get("rope_theta", 10_000.0))),
        gated=False,
        qk_norm=None,
        clip_qkv=None if clip is None else float(clip),
    )
    normalised = not feeding.is_null("moe_normalize_expert_weights") and feeding.only("moe_normalize_expert_weights", 1)
    experts = MoEConfig(
        experts=feeding["moe_num_experts"],
        per_token=feeding["moe_top_k"],
        hidden=feeding["ffn_hidden_size"],
        shared_hidden=0,
        router=TopKRouter(renormalise=bool(normalised)),
    )
    norm = RMSNormConfig(eps=1e-5, centred=False, mean=True)
    layer = (Residual("attention", attention, pre_norm=norm), Residual("experts", experts, pre_norm=norm))
    return parts.language_model(keys, [layer] * keys["n_layers"], norm, depth="n_layers", width="d_model")


def tensors(model: ModelViews) -> Iterator[Tensor]:
    yield joined("transformer.wte.weight", model["embedding_VD"])
    yield joined("transformer.norm_f.weight", model["final_norm.scale_D"])
    if "head_DV" in model:
        yield parts.linear("lm_head.weight", model["head_DV"])
    for n in range(len(model.branches) // 2):
        attention, mlp = model.branches[2 * n : 2 * n + 2]
        prefix = f"transformer.blocks.{n}.norm_attn_norm."
        yield joined(f"{prefix}norm_1.weight", attention["pre_norm.scale_D"])
        yield parts.linear(f"{prefix}attn.Wqkv.weight", attention["mixer.w_in_DN"])
        yield parts.linear(f"{prefix}attn.out_proj.weight", attention["mixer.w_out_ND"])
        yield joined(f"{prefix}norm_2.weight", mlp["pre_norm.scale_D"])
        prefix = f"transformer.blocks.{n}.ffn."
        yield parts.linear(f"{prefix}router.layer.weight", mlp["mixer.w_router_DE"])
        hidden, D = mlp.mixer(MoEConfig).hidden, model.config.width
        gate, up = mlp["mixer.w_in_EDF"].cut(-1, hidden, hidden)
        yield joined(f"{prefix}experts.mlp.w1", gate.T, shape=(-1, D))
        yield joined(f"{prefix}experts.mlp.v1", up.T, shape=(-1, D))
        yield joined(f"{prefix}experts.mlp.w2", mlp["mixer.w_out_EFD"], shape=(-1, D))


FAMILY = Family(model_types=("dbrx",), architectures=("DbrxForCausalLM",), config=config, tensors=tensors)
