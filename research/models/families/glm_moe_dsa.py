"""GLM-5 (GLM-5 Team 2026, arXiv 2602.15763) and GLM-5.2, where a layer may read the tokens that an earlier one chose."""

import dataclasses

from research.layers.dsa import DSAConfig
from research.models.config import ModelConfig, Residual
from research.models.families import deepseek_v2, deepseek_v3, deepseek_v32
from research.models.hub import Family, Keys, parts


def config(keys: Keys) -> ModelConfig:
    keys.only("moe_router_dtype", "float32")
    # Of drafts of several tokens with one head ahead.
    keys.inert("index_share_for_mtp_iteration")
    norm, experts = parts.rms_norm(keys, eps=1e-5), deepseek_v3.experts(keys, 1, 1)
    layout = "pairs" if keys.get("indexer_rope_interleave", True) else "halves"
    own = DSAConfig(**deepseek_v32.sparse_attention(keys), index_layout=layout)
    kinds = {
        "own": Residual("attention", own, pre_norm=norm),
        "given": Residual("attention_given", dataclasses.replace(own, indices="given"), pre_norm=norm),
        "shared": Residual("attention_shared", dataclasses.replace(own, indices="shared"), pre_norm=norm),
    }
    types = indexer_types(keys)
    after = [*types[1:], "full"]
    attention = [
        kinds["shared" if kind == "shared" else "given" if following == "shared" else "own"]
        for kind, following in zip(types, after, strict=True)
    ]
    layers = list(zip(attention, deepseek_v2.feed_forward(keys, experts, norm), strict=True))
    model = parts.language_model(keys, layers, norm)
    return deepseek_v3.with_heads(keys, model, (kinds["own"], Residual("experts", experts, pre_norm=norm)))


def indexer_types(keys: Keys) -> list[str]:
    """Of each layer 'full' or 'shared': said outright, as letters, or by how many share one and from which layer on."""
    letters = keys.get("index_topk_pattern")
    frequency, offset = max(keys.get("index_topk_freq", 1), 1), keys.get("index_skip_topk_offset", 2)
    said = keys.get("indexer_types")
    count = keys["num_hidden_layers"]
    if said is None and letters is not None:
        names = {"F": "full", "S": "shared"}
        said = [str(names.get(letter, letter)) for letter in letters]
    if said is None:
        said = ["shared" if max(n - offset + 1, 0) % frequency else "full" for n in range(count)]
    if len(said) != count or set(said) - {"full", "shared"} or said[0] == "shared":
        keys.refuse(f"indexer_types must be {count} times 'full' or 'shared', 'full' first, got {said}")
        return ["full"] * count
    return said


FAMILY = Family(
    model_types=("glm_moe_dsa",),
    architectures=("GlmMoeDsaForCausalLM",),
    config=config,
    tensors=deepseek_v32.tensors,
    ignored=deepseek_v3.FAMILY.ignored,
)
