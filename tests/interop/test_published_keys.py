"""What the hub's config.json files say beside what a preset repeats of them: every key is read or known to change nothing."""

import importlib

import pytest

from research.models.families import model_config

LAYERS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
COMMON = {
    "attention_bias": False, "attention_dropout": 0.0, "auto_map": {"AutoConfig": "x"}, "bos_token_id": 1,
    "eos_token_id": [2, 3], "hidden_act": "silu", "initializer_range": 0.02, "pad_token_id": 0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.57.0", "use_cache": True,
}  # fmt: skip
QWEN = COMMON | {
    "attn_output_gate": True, "dtype": "bfloat16", "mamba_ssm_dtype": "float32", "mtp_use_dedicated_embeddings": False,
    "partial_rotary_factor": 0.25, "mlp_only_layers": [], "output_gate_type": "swish",
    "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
        "rope_theta": 10000000, "rope_type": "default",
    },
}  # fmt: skip
BESIDE = {
    "minimax_text_01_456b": {name: value for name, value in COMMON.items() if name != "attention_bias"} | {
        "output_router_logits": False, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
        "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "sliding_window": None,
    },
    "kimi_linear_48b_a3b": {name: value for name, value in COMMON.items() if name != "attention_bias"} | {
        "head_dim": 72, "model_max_length": 1048576, "moe_layer_freq": 1, "num_expert_group": 1, "topk_group": 1,
        "num_key_value_heads": 32, "num_nextn_predict_layers": 0, "q_lora_rank": None, "rope_scaling": None,
        "rope_theta": 10000.0, "use_grouped_topk": True,
    },
    "glm_5_2_744b": COMMON | {
        "ep_size": 1, "head_dim": 192, "index_share_for_mtp_iteration": True, "index_topk_pattern": None,
        "moe_layer_freq": 1, "num_key_value_heads": 64, "pretraining_tp": 1, "qk_head_dim": 256,
        "rope_interleave": True, "moe_router_dtype": "float32",
        "indexer_types": ["shared" if max(n - 2, 0) % 4 else "full" for n in range(78)],
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    },
    "nemotron_3_nano_30b_a3b": {name: value for name, value in COMMON.items() if name != "hidden_act"} | {
        "chunk_size": 128, "expand": 2, "hidden_dropout": 0.0, "intermediate_size": 1856, "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32", "mlp_bias": False, "norm_eps": 1e-05, "num_logits_to_keep": 1,
        "partial_rotary_factor": 1.0, "rescale_prenorm_residual": True, "residual_in_fp32": False, "rope_theta": 10000,
        "sliding_window": None, "time_step_floor": 0.0001, "time_step_max": 0.1, "time_step_min": 0.001,
        "use_mamba_kernels": True,
    },
    "falcon_mamba_7b": {
        "_name_or_path": "./", "bos_token_id": 0, "eos_token_id": 11, "hidden_act": "silu", "initializer_range": 0.1,
        "pad_token_id": 11, "rescale_prenorm_residual": False, "residual_in_fp32": True, "time_step_floor": 0.0001,
        "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256,
        "time_step_scale": 1.0, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True,
    },
    "qwen3_5_27b": QWEN | {"layer_types": LAYERS * 16},
    "qwen3_5_35b_a3b": QWEN | {"layer_types": LAYERS * 10, "output_router_logits": False, "router_aux_loss_coef": 0.001},
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_keys_of_the_hub(name):
    preset = importlib.import_module(f"configs.{name}")
    assert model_config(preset.HUB | BESIDE[name]) == model_config(preset.HUB)


def test_keys_of_a_multimodal_directory():
    from configs.qwen3_5_27b import HUB

    text = {key: value for key, value in (HUB | BESIDE["qwen3_5_27b"]).items() if key != "architectures"}
    hub = {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text,
        "vision_config": {"depth": 27}, "image_token_id": 248056, "video_token_id": 248057,
        "vision_start_token_id": 248053, "vision_end_token_id": 248054, "language_model_only": False,
        "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0",
    }  # fmt: skip
    assert model_config(hub) == model_config(HUB)
