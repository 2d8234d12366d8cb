"""The two-stage recipe through its presets: starting from a dense run, a warm-up that moves indexers alone, a sparse stage."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import dsa_sparse, dsa_warm_up, mla
from experiments.lecture import sparse_attention
from research.config import ConfigError
from research.data.tokenization import ByteTokenizer
from research.training import runs
from research.training.optimizers import parameter_path


def test_the_stages_are_one_model():
    dense, warm_up, sparse = (module.CONFIG for module in (mla, dsa_warm_up, dsa_sparse))
    mixers = [config.model.branches[0].mixer for config in (warm_up, sparse)]
    assert [mixer.stage for mixer in mixers] == ["warm_up", "sparse"]
    assert dataclasses.replace(mixers[0], stage="sparse") == mixers[1]
    assert all(getattr(mixers[0], name) == value for name, value in vars(dense.model.branches[0].mixer).items())
    assert warm_up.train.start_from == "runs/mla" and sparse.train.start_from == "runs/dsa_warm_up"


@pytest.mark.slow
def test_the_recipe_from_run_to_run(tmp_path, monkeypatch):
    words = [
        "model.width=32",
        "model.repeats=2",
        "model.branches.attention.mixer.heads=2",
        "model.branches.mlp.mixer.hidden=32",
    ]
    words += ["data.source=TextFiles", f"data.source.paths={Path(runs.__file__).parents[1]}/*/*.py"]
    words += ["data.sequence_length=64", "data.batch_size=8", "data.held_out_bytes=3000", "train.steps=4"]
    results = sparse_attention.run(tmp_path, words, say=lambda line: None)
    # The warm-up leaves what the model says as it was.
    assert results["warm_up"]["held_out_bits_per_byte"] == results["dense"]["held_out_bits_per_byte"]
    assert 0 < results["warm_up"]["captured"][0] <= 1 and "captured" not in results["sparse"]

    def variables(name):
        trained = runs.load_for_inference(tmp_path / name)
        return {parameter_path(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(nnx.state(trained.model))}

    dense, warm_up, sparse = map(variables, ("dense", "warm_up", "sparse"))
    indexers = {name for name in warm_up if "indexer" in name}
    assert warm_up.keys() - dense.keys() == indexers
    assert all((warm_up[name] == old).all() for name, old in dense.items())
    assert all((sparse[name] != old).any() for name, old in warm_up.items())
    # Done runs are read, not trained again; another model is refused.
    monkeypatch.setattr("research.training.loop.make_train_step", lambda *_, **__: None)
    assert sparse_attention.run(tmp_path, words, say=lambda line: None) == results
    graphdef, *parts = runs.abstract_model(mla.CONFIG)
    state = runs.TrainState(jnp.zeros(()), *parts, None, jnp.zeros(()))
    with pytest.raises(ConfigError, match=r"train.start_from is .*: the sparse model must have .* in shape"):
        runs.take_over(tmp_path / "dense", graphdef, state, ByteTokenizer(), say=lambda line: None)
