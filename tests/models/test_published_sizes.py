"""Presets of published models have the sizes that were published."""

import importlib

import pytest

from research.models.parameter_count import parameter_count

# Billions: all, active, and what the second figure leaves out. To the digits that were published, or within 1 %.
PUBLISHED = {
    "llama3_8b": (8.03, None, ""),
    "llama3_70b": (70.6, None, ""),
    "olmoe_1b_7b": (6.9, 1.3, ""),
    # Published as 3.3.
    "qwen3_30b_a3b": (30.5, 3.35, ""),
    "qwen3_235b_a22b": (235, 22, ""),
    "qwen3_next_80b_a3b": (80, 3, "embedding head"),
    "mixtral_8x7b": (46.7, 12.9, ""),
    "mixtral_8x22b": (141, 39, ""),
    "qwen1_5_moe_a2_7b": (14.3, 2.7, ""),
    "qwen2_57b_a14b": (57.4, 14.2, ""),
    "deepseek_moe_16b": (16.4, 2.8, ""),
    "deepseek_v2_236b": (236, 21, ""),
    # Published as 2.4.
    "deepseek_v2_lite": (15.7, 2.45, "embedding"),
    "deepseek_v3_671b": (671, 37, "embedding"),
    "deepseek_v32_671b": (671, 37, "embedding"),
    "glm_5_744b": (744, 40, "embedding head"),
    "gpt_oss_20b": (20.9, 3.61, "embedding"),
    "gpt_oss_120b": (116.8, 5.13, "embedding"),
    "dbrx_132b": (132, 36, ""),
    # Without the vision tower, which the published 109 counts.
    "llama4_scout": (108, 17, ""),
    "llama4_maverick": (400, 17, ""),
    "grok_1_314b": (314, None, ""),
    # The published 13.6 leaves the embedding out.
    "minicpm_moe_8x2b": (13.9, 4, "embedding"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size(name):
    total, active, without = PUBLISHED[name]
    count = parameter_count(importlib.import_module(f"configs.{name}").CONFIG.model)
    assert agrees(count.total, total)
    assert active is None or agrees(count.active - sum(getattr(count, part) for part in without.split()), active)


def agrees(count: int, billions: float) -> bool:
    digits = 0 if isinstance(billions, int) else len(str(billions).split(".")[1])
    return abs(count / 1e9 / billions - 1) < 0.01 or round(count / 1e9, digits) == billions
