"""The benchmark of experts: it runs, and what was committed says what the page says."""

import json
import pathlib

import pytest

from experiments.benchmarks import moe

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_products_under_every_load():
    """Both implementations, of few and small groups."""
    result = moe._products(64, 8, 16, True, (2,), moe.LOADS)
    entries = {f"G2_{load}{of}" for load in moe.LOADS for of in ("", "_ragged_dot")}
    assert entries < set(result) and all(result[name]["ratio"] > 0 for name in entries)


@pytest.mark.parametrize("load", moe.LOADS)
def test_loads(load):
    sizes_E = moe.group_sizes(load, 4096, 64)
    assert sizes_E.sum() == 4096 and sizes_E.shape == (64,)
    largest = {"uniform": (64, 64), "multinomial": (70, 100), "zipf": (700, 1000), "one_hot": (4096, 4096)}[load]
    assert largest[0] <= sizes_E.max() <= largest[1]


def test_what_was_measured():
    result = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "moe.json").read_text())
    products, layer = result["grouped_matmul"], result["layer"]
    assert (products["rows"], products["K"], products["N"]) == (4096, 128, 256)
    loads = [f"{groups}_{load}" for groups in (8, 64) for load in moe.LOADS]
    for prefix, of in (("G", products), ("E", layer)):
        assert {f"{prefix}{load}" for load in [*loads, "1_uniform", "64_uniform_ragged_dot"]} < set(of)
    assert {f"G16_{load}_ragged_dot" for load in moe.LOADS} < set(result["grouped_matmul_small"])
    assert products["G64_uniform"]["ratio"] <= 2.5 and max(products["G64_over_G8"].values()) <= 1.3
    one_hot, ragged = products["G64_one_hot"]["ratio"], products["G64_uniform_ragged_dot"]["ratio"]
    uniform, multinomial, zipf = (products[f"G64_{load}"]["ratio"] for load in moe.LOADS[:3])
    small = [result["grouped_matmul_small"][f"G16_{load}_ragged_dot"]["ratio"] for load in moe.LOADS]
    page = " ".join((ROOT / "docs" / "architecture.md").read_text().split())
    assert (
        f"64 even groups {uniform:.1f} times, multinomial {multinomial:.1f}, Zipf {zipf:.1f}, all rows in one group "
        f"{one_hot:.1f} (of 8 groups: {products['G8_one_hot']['ratio']:.1f}), `ragged_dot` {ragged:.0f}, and "
        f"{min(small):.0f} to {max(small):.0f} of 16 groups under any load" in page
    )
