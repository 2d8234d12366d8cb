"""H-Net (Hwang, Wang & Gu 2025, arXiv 2507.07955) as github.com/goombalab/hnet has it: bytes, Mamba-2 round a model over chunks
that it learns to cut.

Its config.json is the authors' (``configs/hnet_2stage_XL.json``), its tensors those of their .pt file. ``arch_layout`` is
[encoder, what runs over chunks, decoder], the middle again such a list or, innermost, one of its own; in ``T22m4`` a letter is a
mixer (t attention, m Mamba-2), capital with an MLP behind it. The other lists have an entry a stage, outermost first.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from research.layers.attention import AttentionConfig
from research.layers.mamba2 import Mamba2Config
from research.layers.mlp import MLPConfig
from research.layers.norms import RMSNormConfig
from research.models.config import HNetConfig, ModelConfig, Residual
from research.models.families import mamba2
from research.models.hub import BranchViews, Family, Keys, ModelViews, Tensor, View, joined, parts

NORM = RMSNormConfig(eps=1e-5, centred=False)
HEAD_WIDTH = 64  # of Mamba-2
BLOCK = 128  # of which the width of an MLP is a multiple


def matches(hub: Mapping[str, Any]) -> bool:
    return "arch_layout" in hub


def config(keys: Keys) -> ModelConfig:
    layout, ssm, attention = keys["arch_layout"], keys.inside("ssm_cfg"), keys.inside("attn_cfg")
    ssm.inert("chunk_size")
    if not well_formed(layout):
        keys.refuse(f"arch_layout must be [LAYERS] or [LAYERS, arch_layout, LAYERS], got {layout}")
        keys.check()
    stages = depth(layout)
    for where, name in ((keys, "d_model"), (keys, "d_intermediate"), *((attention, name) for name in PER_STAGE)):
        if not isinstance(where[name], list) or len(where[name]) != stages:
            keys.refuse(f"{name} must be a list with an entry for each of the {stages} stages, got {where[name]}")
            keys.check()

    def layers(letters: str, stage: int) -> list[Residual]:
        found = []
        for kind, count in re.findall(r"([mMtT])(\d+)", letters):
            mixer = mamba(ssm, keys, stage) if kind in "mM" else attend(attention, keys, stage)
            layer = [Residual("mamba2" if kind in "mM" else "attention", mixer, pre_norm=NORM)]
            if kind.isupper():
                hidden = -(-keys["d_intermediate"][stage] // BLOCK) * BLOCK
                layer.append(Residual("mlp", MLPConfig(hidden), pre_norm=NORM))
            found += layer * int(count)
        if "".join(f"{kind}{count}" for kind, count in re.findall(r"([mMtT])(\d+)", letters)) != letters or not found:
            keys.refuse(f"arch_layout must hold m, M, t or T with a number behind each, got {letters!r}")
            keys.check()
        return found

    def all_of(layout: list, stage: int) -> list[Residual]:
        if len(layout) == 1:
            return layers(layout[0], stage)
        inner = all_of(layout[1], stage + 1)
        chunks = HNetConfig(
            branches=tuple(dict.fromkeys(inner)),
            pattern=tuple(branch.name for branch in inner),
            width=keys["d_model"][stage + 1],
            # Chunks of six bytes, or of three and again of three (§3.1).
            ratio=6.0 if stages == 2 else 3.0,
            residual_bias=True,
            final_norm=NORM,
        )
        here = Residual("chunks", chunks, pre_norm=NORM, skip_scale=0.0)
        return [*layers(layout[0], stage), here, *layers(layout[2], stage)]

    outer = all_of(layout, 0)
    return ModelConfig(
        vocab_size=keys["vocab_size"],
        width=keys["d_model"][0],
        branches=tuple(dict.fromkeys(outer)),
        pattern=tuple(branch.name for branch in outer),
        final_norm=NORM,
        tie_embeddings=keys.get("tie_embeddings", False),
    )


PER_STAGE = ("num_heads", "rotary_emb_dim", "window_size")


def well_formed(layout: Any) -> bool:
    if not isinstance(layout, list) or not all(isinstance(letters, str) for letters in layout[::2]):
        return False
    return len(layout) == 1 or (len(layout) == 3 and well_formed(layout[1]))


def depth(layout: list) -> int:
    """Stages, the innermost counted."""
    return 1 if len(layout) == 1 else 1 + depth(layout[1])


def mamba(ssm: Keys, keys: Keys, stage: int) -> Mamba2Config:
    inner = ssm.get("expand", 2) * keys["d_model"][stage]
    if inner % HEAD_WIDTH:
        keys.refuse(f"expand times d_model must be a multiple of {HEAD_WIDTH} where there is Mamba-2, got {inner}")
        keys.check()
    return Mamba2Config(
        heads=inner // HEAD_WIDTH,
        head_width=HEAD_WIDTH,
        state_width=ssm.get("d_state", 128),
        taps=ssm.get("d_conv", 4),
        norm_eps=NORM.eps,
    )


def attend(attention: Keys, keys: Keys, stage: int) -> AttentionConfig:
    heads, turning, window = (attention[name][stage] for name in PER_STAGE)
    width = keys["d_model"][stage] // heads
    return AttentionConfig(
        heads=heads,
        key_heads=heads,
        head_width=width,
        rotary_fraction=turning / width,
        gated=False,
        qk_norm=None,
        # Of tokens before a token there, itself not included.
        window=None if window < 0 else window + 1,
    )


def block(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    """A mixer and its norm."""
    yield joined(f"{prefix}norm1.weight", branch["pre_norm.scale_D"])
    if isinstance(branch.residual.mixer, Mamba2Config):
        yield from mamba2.mixer(f"{prefix}mixer.", branch)
        return
    yield parts.linear(f"{prefix}mixer.Wqkv.weight", branch["mixer.w_in_DN"])
    yield parts.linear(f"{prefix}mixer.out_proj.weight", branch["mixer.w_out_ND"])


def mlp(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    """Up before gate."""
    yield joined(f"{prefix}norm2.weight", branch["pre_norm.scale_D"])
    w_in_DF = branch["mixer.w_in_DF"]
    gate, up = w_in_DF.cut(1, *[w_in_DF.shape[1] // 2] * 2)
    yield joined(f"{prefix}mlp.fc1.weight", up.T, gate.T)
    yield parts.linear(f"{prefix}mlp.fc2.weight", branch["mixer.w_out_FD"])


def stack(prefix: str, branches: list[BranchViews], norm: View) -> Iterator[Tensor]:
    """Layers of one stage and the norm after them."""
    number = -1
    for branch in branches:
        if isinstance(branch.residual.mixer, MLPConfig):
            yield from mlp(f"{prefix}layers.{number}.", branch)
        else:
            number += 1
            yield from block(f"{prefix}layers.{number}.", branch)
    yield joined(f"{prefix}rmsnorm.weight", norm)


def network(prefix: str, branches: list[BranchViews], norm: View) -> Iterator[Tensor]:
    """``norm`` is the one after all of its layers."""
    middle = [i for i, branch in enumerate(branches) if isinstance(branch.residual.mixer, HNetConfig)]
    if not middle:
        yield from stack(f"{prefix}main_network.", branches, norm)
        return
    chunks = branches[middle[0]]
    yield from stack(f"{prefix}encoder.", branches[: middle[0]], chunks["pre_norm.scale_D"])
    yield parts.linear(f"{prefix}routing_module.q_proj_layer.weight", chunks["mixer.w_query_DK"])
    yield parts.linear(f"{prefix}routing_module.k_proj_layer.weight", chunks["mixer.w_key_DK"])
    yield parts.linear(f"{prefix}residual_proj.weight", chunks["mixer.w_residual_DD"])
    yield joined(f"{prefix}residual_proj.bias", chunks["mixer.residual_bias_D"])
    if "mixer.pad_D" in chunks:
        yield joined(f"{prefix}main_network.pad_dimension", chunks["mixer.pad_D"])
    yield from network(f"{prefix}main_network.", chunks.over_chunks, chunks["mixer.norm.scale_D"])
    yield from stack(f"{prefix}decoder.", branches[middle[0] + 1 :], norm)


def tensors(model: ModelViews) -> Iterator[Tensor]:
    yield joined("embeddings.weight", model["embedding_VD"])
    yield from network("backbone.", model.branches, model["final_norm.scale_D"])
    if "head_DV" in model:
        yield parts.linear("lm_head.weight", model["head_DV"])


FAMILY = Family(
    model_types=("hnet",),
    architectures=("HNetForCausalLM",),
    config=config,
    tensors=tensors,
    # Tied, the .pt file holds the embedding twice.
    ignored=(r"lm_head\.weight",),
    matches=matches,
)
