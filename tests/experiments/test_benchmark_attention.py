"""The attention benchmark, quickly: it runs, says what the page says, and draws it."""

import json

import pytest

from experiments import benchmark, cli
from experiments.benchmarks.attention import LAYERS


@pytest.mark.slow
def test_it_measures_and_draws(capsys, tmp_path):
    picture = tmp_path / "attention.png"
    assert cli.call(benchmark.main, ["attention", "--quick", "--json", "--picture", str(picture)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["T"], row["layer"]) for row in result["rows"]] == [(T, layer) for T in (512, 1024) for layer in LAYERS]
    assert all(row["prefill_ms"] > 0 and row["decode_ms"] > 0 for row in result["rows"])
    # Keys and values of 2 heads of 64; a latent of 128 and 32 that turn; those and 32 of the indexer: all float32.
    grown = {name: [row["cache_bytes"] for row in result["rows"] if row["layer"] == name] for name in LAYERS}
    assert {name: (after - before) // 512 for name, (before, after) in grown.items()} == {
        "full": 1024, "sliding": 0, "mla": 640, "dsa": 768, "gated_deltanet": 0
    }  # fmt: skip
    assert result["deepseek_v3_decode"]["dense_over_sparse"] > 0
    assert 0.9 < result["selection_kept"]["bfloat16"] <= 1
    assert picture.read_bytes().startswith(b"\x89PNG")
