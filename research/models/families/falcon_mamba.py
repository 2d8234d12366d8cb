"""Falcon Mamba (Zuo et al. 2024, arXiv 2410.05355): Mamba with B, C and step sizes normalised, without learned scales."""

from research.models.config import ModelConfig
from research.models.families import mamba
from research.models.hub import Family, Keys


def config(keys: Keys) -> ModelConfig:
    keys.inert("use_falcon_mambapy")
    return mamba.model(keys, select_norm_eps=keys.get("mixer_rms_eps", 1e-6))


FAMILY = Family(
    model_types=("falcon_mamba",),
    architectures=("FalconMambaForCausalLM",),
    config=config,
    tensors=mamba.tensors,
    ignored=(r"lm_head\.weight",),
)
