"""Kimi Linear (Kimi Team 2025, arXiv 2510.26692): three layers of Kimi Delta Attention to one of latent attention without
positions, and experts balanced by a bias on their sigmoid scores."""

from collections.abc import Iterator

from research.layers.kda import KDAConfig
from research.layers.mla import MLAConfig
from research.layers.mlp import MLPConfig
from research.layers.moe import MoEConfig, TopKRouter
from research.models.config import ModelConfig, Residual
from research.models.hub import BranchViews, Family, Keys, ModelViews, Tensor, joined, parts


def config(keys: Keys) -> ModelConfig:
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("mla_use_nope", True)
    keys.only("moe_router_activation_func", "sigmoid")
    keys.only("moe_layer_freq", 1)
    keys.only("num_nextn_predict_layers", 0)
    # Nothing turns with the position, and keys have as many heads as queries.
    keys.inert("rope_theta", "rope_scaling", "rope_parameters", "head_dim", "qk_head_dim", "num_key_value_heads")
    keys.inert("model_max_length", "use_grouped_topk")
    norm, kda = parts.rms_norm(keys, eps=1e-5), keys.inside("linear_attn_config")
    heads = keys["num_attention_heads"]
    attention = MLAConfig(
        heads=heads,
        nope_width=keys["qk_nope_head_dim"],
        rope_width=keys["qk_rope_head_dim"],
        value_width=keys["v_head_dim"],
        latent=keys["kv_lora_rank"],
        query_latent=keys.get("q_lora_rank"),
        rope_theta=None,
    )
    width = kda.get("head_dim", keys.get("linear_head_dim", 128))
    delta = KDAConfig(
        heads=kda.get("num_heads", keys.get("linear_num_heads", 32)),
        key_width=width,
        value_width=width,
        taps=kda.get("short_conv_kernel_size", keys.get("linear_conv_kernel_dim", 4)),
        norm_eps=norm.eps,
    )
    groups, hidden = keys.either("num_expert_group", "n_group", default=1), keys["moe_intermediate_size"]
    experts = MoEConfig(
        experts=keys.either("num_experts", "num_local_experts"),
        per_token=keys.either("num_experts_per_token", "num_experts_per_tok"),
        hidden=hidden,
        shared_hidden=keys.either("num_shared_experts", "n_shared_experts") * hidden,
        groups=groups,
        router=TopKRouter(
            score="sigmoid",
            renormalise=keys.get("moe_renormalize", keys.get("norm_topk_prob", True)),
            scale=float(keys.get("routed_scaling_factor", 2.446)),
            top_groups=keys.get("topk_group", 1),
            group_score="top2",
        ),
        bias_rate=1e-3,
    )
    mixers = {
        "linear_attention": Residual("kda", delta, pre_norm=norm),
        "full_attention": Residual("attention", attention, pre_norm=norm),
    }
    mlps = {
        "dense": Residual("mlp", MLPConfig(keys["intermediate_size"]), pre_norm=norm),
        "sparse": Residual("experts", experts, pre_norm=norm),
    }
    kinds = zip(layer_types(keys, kda), mlp_layer_types(keys), strict=True)
    return parts.language_model(keys, [(mixers[kind], mlps[mlp]) for kind, mlp in kinds], norm)


def layer_types(keys: Keys, kda: Keys) -> list[str]:
    """Said for each layer, or by lists of layers counted from 1."""
    full = kda.get("full_attn_layers", [])
    kda.inert("kda_layers")
    published = ["full_attention" if i in full else "linear_attention" for i in range(1, keys["num_hidden_layers"] + 1)]
    return keys.get("layer_types", published)


def mlp_layer_types(keys: Keys) -> list[str]:
    dense = keys.get("first_k_dense_replace", 1)
    published = ["dense" if i < dense else "sparse" for i in range(keys["num_hidden_layers"])]
    return keys.get("mlp_layer_types", published)


def delta_attention(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    c = branch.mixer(KDAConfig)
    sizes = (c.heads * c.key_width, c.heads * c.key_width, c.heads * c.value_width)
    for name, w, taps in zip(
        "qkv", branch["mixer.w_qkv_DN"].cut(1, *sizes), branch["mixer.w_conv_WN"].cut(1, *sizes), strict=True
    ):
        yield parts.linear(f"{prefix}{name}_proj.weight", w)
        yield joined(f"{prefix}{name}_conv1d.weight", taps.T.split(0, -1, 1))
    decay, gate = branch["mixer.w_low_DR"].cut(1, c.low_rank, c.low_rank)
    yield parts.linear(f"{prefix}f_a_proj.weight", decay)
    yield parts.linear(f"{prefix}f_b_proj.weight", branch["mixer.w_decay_RN"])
    yield parts.linear(f"{prefix}g_a_proj.weight", gate)
    yield parts.linear(f"{prefix}g_b_proj.weight", branch["mixer.w_gate_RN"])
    yield parts.linear(f"{prefix}b_proj.weight", branch["mixer.w_beta_DH"])
    yield joined(f"{prefix}A_log", branch["mixer.log_rate_H"].split(0, 1, 1, -1, 1))
    yield joined(f"{prefix}dt_bias", branch["mixer.dt_bias_HK"], shape=(-1,))
    yield joined(f"{prefix}o_norm.weight", branch["mixer.norm.scale_D"])
    yield parts.linear(f"{prefix}o_proj.weight", branch["mixer.w_out_ND"])


def tensors(model: ModelViews) -> Iterator[Tensor]:
    yield from parts.ends(model)
    for n in range(len(model.branches) // 2):
        mixer, mlp = model.branches[2 * n : 2 * n + 2]
        prefix = f"model.layers.{n}."
        yield joined(f"{prefix}input_layernorm.weight", mixer["pre_norm.scale_D"])
        attend = delta_attention if isinstance(mixer.residual.mixer, KDAConfig) else parts.latent_attention
        yield from attend(f"{prefix}self_attn.", mixer)
        yield joined(f"{prefix}post_attention_layernorm.weight", mlp["pre_norm.scale_D"])
        if isinstance(mlp.residual.mixer, MLPConfig):
            yield from parts.gated_mlp(f"{prefix}mlp.", mlp)
        else:
            moe = f"{prefix}block_sparse_moe."
            yield from parts.experts(moe, mlp, ("w1", "w3", "w2"))
            yield joined(f"{moe}gate.e_score_correction_bias", mlp["mixer.bias_E"])
            yield from parts.shared_expert(f"{moe}shared_experts.", mlp)


FAMILY = Family(model_types=("kimi_linear",), architectures=("KimiLinearForCausalLM",), config=config, tensors=tensors)
