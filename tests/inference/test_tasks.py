"""Synthetic tasks: accuracy over the targets that count, and refusals. The model's part is ``scoring.read``, tested there."""

import numpy as np
import pytest

from research.config import ConfigError
from research.inference import tasks
from tests.inference.test_generation import random_model


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.mark.parametrize("name", tasks.TASKS)
def test_options_are_the_tasks_own(name):
    options = tasks.task_options(name, {"length": "80"})
    batch = tasks.TASKS[name].batch(0, batch=3, **options)
    assert batch["inputs_BT"].shape == (3, 80) and 0 < tasks.TASKS[name].chance(options) < 1
    largest = max(batch[key].max() for key in ("inputs_BT", "targets_BT"))
    assert largest < tasks.TASKS[name].vocabulary(options)


def test_accuracy_counts_what_the_mask_counts(model, monkeypatch):
    """Right wherever the target is even, at log-probability −2."""
    shapes = set()

    def read(model, inputs_BT, targets_BT, lengths_B, *, top):
        shapes.add(inputs_BT.shape)
        return np.full(inputs_BT.shape, -2.0), targets_BT % 2 == 0, None, None

    monkeypatch.setattr(tasks, "read", read)
    options = tasks.task_options("needle_retrieval", {"keys": "4", "symbols": "25", "depth": "0.5", "length": "20"})
    result = tasks.measure_task(model, "needle_retrieval", options, rows=21, batch_size=8, seed=3)
    drawn = tasks.synthetic.needle_retrieval(3, batch=21, **options)
    right_BN = drawn["targets_BT"][drawn["loss_mask_BT"]].reshape(21, 4) % 2 == 0
    assert shapes == {(8, 32)}
    assert result["accuracy"] == pytest.approx(right_BN.mean())
    assert result["rows_right"] == pytest.approx(right_BN.all(1).mean())
    assert (result["nats"], result["chance"]) == (2.0, 1 / 25)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("recall", {}, "there is no task 'recall': there are associative_recall, "),
        ("state_tracking", {"depth": "1"}, "state_tracking has no option 'depth': it has length, group"),
        ("state_tracking", {"length": "long"}, "state_tracking: length must be a whole number, got 'long'"),
        ("state_tracking", {"group": "Q8"}, "state_tracking: group is 'Q8': it must be Zn"),
        ("associative_recall", {}, "associative_recall has 129 ids, which must be at most the 31 that the model knows"),
        (
            "needle_retrieval",
            {"length": "4", "keys": "2", "symbols": "2"},
            "needle_retrieval: length is 4: it must be at",
        ),
    ],
)
def test_bad_options_are_named(model, name, words, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        tasks.measure_task(model, name, tasks.task_options(name, words), rows=2)
