"""The picture of chunks: cuts read from decoding states are those of the routing, and bytes are told apart by kind."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lecture import hnet
from research.config import ConfigError
from tests.models.small import small_model
from tests.models.test_hnet import TWO, config_of


@pytest.mark.slow
def test_cuts_are_the_routers():
    """Both levels: what a whole row's routing says, which the state of decoding counts."""
    model, ids_T = small_model(config_of(TWO)), np.random.default_rng(0).integers(0, 31, 13)
    cuts_LT = hnet.boundaries(model, ids_T)
    assert cuts_LT.shape == (2, 13) and cuts_LT[:, 0].all()
    whole = model(jnp.asarray(ids_T)[None]).aux[0][1]
    outer, inner = whole.own.boundaries[0], whole.stages[0][1].own.boundaries[0, 0]
    assert cuts_LT.sum(1).tolist() == [outer, inner]
    assert (cuts_LT[0] | ~cuts_LT[1]).all()  # a chunk of chunks begins where a chunk does


def test_a_model_without_chunks_is_refused():
    with pytest.raises(ConfigError, match="must have a branch of kind HNetConfig"):
        hnet.boundaries(small_model(), [1, 2])


def test_a_run_says_how_far_it_was_trained(tmp_path):
    with pytest.raises(ConfigError, match=r"must hold a finished run, it has no result.json"):
        hnet.trained_to(tmp_path)
    (tmp_path / "result.json").write_text('{"step": 12, "held_out": {"bits_per_byte": 2.5}}')
    lines = [f'{{"step": {n}, "tokens_per_chunk": {n}}}\n' for n in range(1, 13)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert hnet.trained_to(tmp_path) == {"steps": 12, "held_out_bits_per_byte": 2.5, "tokens_per_chunk": 7.5}


def test_bytes_have_kinds(tmp_path):
    text = b"ab  c=="
    assert hnet.kinds_of(text) == [hnet.KINDS[i] for i in (0, 1, 2, 3, 0, 4, 5)]
    cuts_LT = np.asarray([[1, 0, 1, 0, 0, 1, 0]], bool)
    summary = hnet.summary(text, cuts_LT)
    assert summary["bytes_per_chunk"] == [2.333] and summary["begins"]["first letter of a word"] == [0.5, 2]
    hnet.draw(text, cuts_LT[0], tmp_path / "chunks.png")
    assert (tmp_path / "chunks.png").read_bytes().startswith(b"\x89PNG")
