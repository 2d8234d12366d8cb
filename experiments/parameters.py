"""How large the presets of published models are, by shapes alone, beside the figures that were published.

    python -m experiments.parameters [NAME ...] [--markdown]        docs/parameters.md is what --markdown prints

Nothing is built: half a minute on one core for all of them.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence

from experiments import cli
from research.config import ConfigError
from research.models.cache_size import cache_bytes_per_token
from research.models.config import ModelConfig
from research.models.parameter_count import ParameterCount, parameter_count

# Billions as published: all, active, what the second figure leaves out, and where what was published is not this model alone.
PUBLISHED = {
    "llama3_8b": (8.03, None, "", ""),
    "llama3_70b": (70.6, None, "", ""),
    "llama3_405b": (405, None, "", ""),
    "qwen3_0_6b": (0.6, None, "", ""),
    "qwen3_1_7b": (1.7, None, "", ""),
    "qwen3_4b": (4.0, None, "", ""),
    "qwen3_8b": (8.2, None, "", ""),
    "qwen3_14b": (14.8, None, "", ""),
    "qwen3_32b": (32.8, None, "", ""),
    "mamba_130m": (0.13, None, "", ""),
    "mamba_370m": (0.37, None, "", ""),
    "mamba_790m": (0.79, None, "", ""),
    "mamba_1_4b": (1.4, None, "", ""),
    "mamba_2_8b": (2.8, None, "", ""),
    "falcon_mamba_7b": (7.27, None, "", ""),
    "mamba2_130m": (0.13, None, "", ""),
    "mamba2_370m": (0.37, None, "", ""),
    "mamba2_780m": (0.78, None, "", ""),
    "mamba2_1_3b": (1.3, None, "", ""),
    "mamba2_2_7b": (2.7, None, "", ""),
    "nemotron_h_8b": (8.1, None, "", ""),
    "nemotron_h_47b": (47, None, "", ""),
    "nemotron_h_56b": (56, None, "", ""),
    "nemotron_3_nano_30b_a3b": (31.6, 3.2, "embedding", ""),
    "nemotron_3_super_120b_a12b": (120.6, 12.7, "", ""),
    "nemotron_3_ultra_550b_a55b": (550, 55, "embedding", ""),
    "minimax_text_01_456b": (456, 45.9, "embedding head", ""),
    "kimi_linear_48b_a3b": (49.1, 3, "embedding", "what its checkpoint holds; 48 in its name"),
    "olmoe_1b_7b": (6.9, 1.3, "", ""),
    "qwen3_30b_a3b": (30.5, 3.3, "", ""),
    "qwen3_235b_a22b": (235, 22, "", ""),
    "qwen3_next_80b_a3b": (80, 3, "embedding head", ""),
    "qwen3_5_0_8b": (0.8, None, "", ""),
    "qwen3_5_2b": (2, None, "", ""),
    "qwen3_5_4b": (4, None, "", ""),
    "qwen3_5_9b": (9, None, "", ""),
    "qwen3_5_27b": (27, None, "", ""),
    "qwen3_5_35b_a3b": (35, 3, "embedding", ""),
    "qwen3_5_122b_a10b": (122, 10, "", ""),
    "qwen3_5_397b_a17b": (397, 17, "", ""),
    "mixtral_8x7b": (46.7, 12.9, "", ""),
    "mixtral_8x22b": (141, 39, "", ""),
    "qwen1_5_moe_a2_7b": (14.3, 2.7, "", ""),
    "qwen2_57b_a14b": (57.4, 14.2, "", ""),
    "deepseek_moe_16b": (16.4, 2.8, "", ""),
    "deepseek_v2_236b": (236, 21, "", ""),
    "deepseek_v2_lite": (15.7, 2.4, "embedding", ""),
    "deepseek_v3_671b": (671, 37, "embedding", ""),
    "deepseek_v32_671b": (671, 37, "embedding", ""),
    "glm_5_744b": (744, 40, "embedding head", ""),
    "glm_5_2_744b": (744, 40, "embedding", ""),
    "gpt_oss_20b": (20.9, 3.61, "embedding", ""),
    "gpt_oss_120b": (116.8, 5.13, "embedding", ""),
    "dbrx_132b": (132, 36, "", ""),
    "llama4_scout": (None, 17, "", "109 with its vision tower"),
    "llama4_maverick": (400, 17, "", ""),
    "grok_1_314b": (314, None, "", ""),
    "minicpm_moe_8x2b": (None, 4, "embedding", "13.6 without the embedding"),
    "hnet_1stage_l": (0.68, None, "", ""),
    "hnet_1stage_xl": (1.3, None, "", ""),
    "hnet_2stage_l": (0.87, None, "", ""),
    "hnet_2stage_xl": (1.6, None, "", ""),
    "switch_base_128": (7.4, None, "", "with attention between encoder and decoder"),
    "switch_large_128": (26, None, "", "with attention between encoder and decoder"),
    "switch_xxl_128": (395, None, "", "with attention between encoder and decoder"),
    "switch_c_2048": (1571, None, "", "with attention between encoder and decoder"),
}
HEADER = (
    "preset",
    "parameters",
    "published",
    "active",
    "published",
    "active leaves out",
    "of all is published",
    "cache, bytes a token",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m experiments.parameters",
        description="Counts the parameters of published models' presets and says what was published, in billions.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="presets; all published ones if none is named")
    parser.add_argument("--markdown", action="store_true", help="print the page docs/parameters.md")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in PUBLISHED]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no preset of a published model: there are {', '.join(PUBLISHED)}")
    rows = list(table(options.names or list(PUBLISHED)))
    print(page(rows) if options.markdown else cli.table([HEADER, *rows]), end="\n" if not options.markdown else "")
    return 0


def model_of(name: str) -> ModelConfig:
    return importlib.import_module(f"configs.{name}").CONFIG.model


def counted(name: str) -> ParameterCount:
    return parameter_count(model_of(name))


def cached(name: str) -> int:
    """Bytes that decoding keeps of one more token, in bfloat16: nothing of it in layers with windows or states."""
    return cache_bytes_per_token(model_of(name), "bfloat16")


def active(name: str, count: ParameterCount) -> int:
    """Parameters at work on a token, without what the published figure leaves out."""
    return count.active - sum(getattr(count, part) for part in PUBLISHED[name][2].split())


def table(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for name in names:
        published, published_active, without, note = PUBLISHED[name]
        count = counted(name)
        ours = (f"{count.total / 1e9:.2f}", f"{active(name, count) / 1e9:.2f}")
        said = ["" if figure is None else f"{figure}" for figure in (published, published_active)]
        yield name, ours[0], said[0], ours[1], said[1], " and ".join(without.split()), note, f"{cached(name):,}"


def page(rows: Sequence[tuple[str, ...]]) -> str:
    lines = [
        "# Published models, at their dimensions",
        "",
        "Billions of parameters of the presets in [configs](../configs), counted from the shapes of their arrays, beside what was",
        "published. Heads that predict further ahead are left out, as published figures do. The last column is by how many bytes",
        "the cache of decoding grows with a token of a long row, keys and latents in bfloat16 (layers with a window and recurrent",
        "states add nothing). This page is what `python -m experiments.parameters --markdown` prints.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---|" + "---:|" * 4 + "---|---|---:|",
        *("| " + " | ".join((f"`{row[0]}`", *row[1:])) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(cli.call(main))
