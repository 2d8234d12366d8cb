import math
import shutil
import subprocess

import numpy as np
import pytest

from research.data.baselines import measure_baselines


def test_order_0_is_the_entropy():
    assert measure_baselines([b"ab" * 100, b"cd" * 100]).order_0 == 2
    assert measure_baselines([b"a" * 8]).order_0 == 0


def test_noise_costs_eight_bits_and_repetition_none():
    noise = np.random.default_rng(0).integers(0, 256, 50_000, np.uint8).tobytes()
    found = measure_baselines([noise])
    assert 7.99 < found.order_0 < 8 < found.xz_whole == found.xz_each < 8.1
    found = measure_baselines([noise, noise])
    assert math.isclose(found.xz_whole, 4, rel_tol=0.03) and found.xz_each > 8


@pytest.mark.skipif(shutil.which("xz") is None, reason="no xz on this machine")
def test_same_as_the_program():
    documents = [b"def f(x):\n    return x\n" * 40, b"class A:\n    pass\n" * 30]
    sizes = [
        len(subprocess.run(["xz", "-9", "-T1", "-c"], input=text, capture_output=True, check=True).stdout)
        for text in (b"".join(documents), *documents)
    ]
    total = sum(map(len, documents))
    found = measure_baselines(documents)
    assert (found.xz_whole, found.xz_each) == (8 * sizes[0] / total, 8 * (sizes[1] + sizes[2]) / total)


def test_nothing_to_compress():
    with pytest.raises(ValueError, match="hold no bytes"):
        measure_baselines([b"", b""])
