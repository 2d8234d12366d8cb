import math

import numpy as np
import pytest

from research.data.synthetic import associative_recall, group_table, needle_retrieval, selective_copying, state_tracking

TASKS = {
    "recall": lambda seed, batch=5: associative_recall(seed, batch=batch, length=64, pairs=8, overwrites=6, keys=16),
    "copying": lambda seed, batch=5: selective_copying(seed, batch=batch, length=50, copied=9),
    "parity": lambda seed, batch=5: state_tracking(seed, batch=batch, length=40),
    "S3": lambda seed, batch=5: state_tracking(seed, batch=batch, length=40, group="S3"),
    "needle": lambda seed, batch=5: needle_retrieval(seed, batch=batch, length=80, needles=4),
}


@pytest.mark.parametrize("name", TASKS)
def test_batches_are_like_those_of_text(name):
    task = TASKS[name]
    batch = task(3)
    types = {"inputs_BT": "int32", "targets_BT": "int32", "segment_ids_BT": "int32", "positions_BT": "int32"}
    assert {key: column.dtype.name for key, column in batch.items()} == types | {"loss_mask_BT": "bool"}
    assert len({column.shape for column in batch.values()}) == 1
    assert batch["loss_mask_BT"].any(axis=1).all()
    np.testing.assert_equal(task(3), batch)
    assert not np.array_equal(task((3, 1))["inputs_BT"], batch["inputs_BT"])
    assert len(np.unique(batch["inputs_BT"], axis=0)) == 5  # rows differ


@pytest.mark.parametrize("overwrites", [0, 1, 20])
def test_recall_is_of_the_last_value(overwrites):
    pairs, keys, values = 10, 12, 5
    batch = associative_recall(0, batch=40, length=90, pairs=pairs, overwrites=overwrites, keys=keys, values=values)
    written = 2 * (pairs + overwrites)
    for ids, targets, mask in zip(batch["inputs_BT"], batch["targets_BT"], batch["loss_mask_BT"], strict=True):
        memory = {}
        for key, value in ids[:written].reshape(-1, 2).tolist():
            assert 1 <= key <= keys < value <= keys + values
            assert memory.get(key) != value  # a write always changes something
            memory[key] = value
        assert len(memory) == pairs and len(set(ids[0 : 2 * pairs : 2])) == pairs
        asked = np.flatnonzero(mask)
        assert asked.min() >= written and sorted(ids[asked]) == sorted(memory)
        assert [memory[key] for key in ids[asked].tolist()] == targets[asked].tolist()
        assert not np.delete(ids[written:], asked - written).any()


def test_copying_is_of_the_symbols_in_order():
    batch = selective_copying(1, batch=30, length=40, copied=7, symbols=5)
    for ids, targets, mask in zip(batch["inputs_BT"], batch["targets_BT"], batch["loss_mask_BT"], strict=True):
        body = ids[:-7]
        assert (ids[-7:] == 1).all() and mask.tolist() == [False] * 33 + [True] * 7
        assert body[body != 0].tolist() == targets[mask].tolist()
        assert targets[mask].min() >= 2 and targets[mask].max() < 7
    places = np.nonzero(batch["inputs_BT"][:, :-7])[1]
    assert len(set(places)) > 25  # anywhere


def test_parity():
    batch = state_tracking(2, batch=20, length=33)
    np.testing.assert_array_equal(batch["targets_BT"], np.cumsum(batch["inputs_BT"], axis=1) % 2)
    assert batch["loss_mask_BT"].all()


@pytest.mark.parametrize(("group", "order"), [("Z2", 2), ("Z7", 7), ("S3", 6), ("S4", 24), ("S5", 120)])
def test_groups(group, order):
    table = group_table(group)
    assert table.shape == (order, order)
    np.testing.assert_array_equal(table[0], np.arange(order))
    np.testing.assert_array_equal(table[:, 0], np.arange(order))
    for line in (table, table.T):
        assert (np.sort(line, axis=1) == np.arange(order)).all()
    a, b, c = np.random.default_rng(0).integers(0, order, (3, 500))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert (table == table.T).all() == (group[0] == "Z")


def test_running_products_apply_the_newest_last():
    batch = state_tracking(0, batch=3, length=10, group="S3")
    table = group_table("S3")
    for ids, targets in zip(batch["inputs_BT"], batch["targets_BT"], strict=True):
        state = 0
        for i, target in zip(ids, targets, strict=True):
            state = table[i, state]
            assert state == target


@pytest.mark.parametrize("depth", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("needles", [1, 3])
def test_needles(depth, needles):
    n, keys, symbols, length = 4, 6, 9, 70
    batch = needle_retrieval(
        0, batch=50, length=length, needles=needles, needle_length=n, depth=depth, keys=keys, symbols=symbols
    )
    found_at = []
    for ids, targets, mask in zip(batch["inputs_BT"], batch["targets_BT"], batch["loss_mask_BT"], strict=True):
        body, question = ids[: -n - 1], ids[-n - 1 :]
        marks = np.flatnonzero(body == 0)
        assert len(marks) == needles and (np.diff(marks) >= n + 2).all()
        held = {int(body[m + 1]): body[m + 2 : m + 2 + n].tolist() for m in marks}
        assert len(held) == needles and all(2 <= key < 2 + keys for key in held)
        assert question[0] == 1 and (ids == 1).sum() == 1
        assert targets[mask].tolist() == held[int(question[1])] == [*question[2:].tolist(), int(targets[-1])]
        assert mask.tolist() == [False] * (length - n) + [True] * n
        others = np.delete(body, [i for m in marks for i in (m, m + 1)])
        assert others.min() >= 2 + keys and others.max() < 2 + keys + symbols
        found_at += [m for m in marks if body[m + 1] == question[1]]
    if depth is None:
        assert len(set(found_at)) > 15
    elif needles == 1:
        assert set(found_at) == {round(depth * (length - n - 1 - n - 2))}
    elif depth != 0.5:
        assert set(found_at) == {0 if depth == 0 else length - n - 1 - n - 2}


def test_chance_is_as_stated():
    """Answers don't lean to any value: a model that guesses has 1 / values."""
    recall = associative_recall(0, batch=400, length=40, pairs=8, overwrites=8, values=4)
    needle = needle_retrieval(0, batch=800, length=40, symbols=4)
    copied = selective_copying(0, batch=400, length=40, copied=8, symbols=4)
    for batch in (recall, needle, copied):
        counts = np.unique(batch["targets_BT"][batch["loss_mask_BT"]], return_counts=True)[1]
        assert len(counts) == 4
        assert abs(counts / counts.sum() - 0.25).max() < 4 * math.sqrt(0.25 * 0.75 / counts.sum())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: associative_recall(0, batch=1, length=64, pairs=5, keys=4), "keys is 4: it must be at least 5"),
        (lambda: associative_recall(0, batch=1, length=14, pairs=5), "length is 14: it must be at least 15"),
        (lambda: associative_recall(0, batch=1, length=64, pairs=5, overwrites=1, values=1), "values is 1"),
        (lambda: selective_copying(0, batch=1, length=31), "length is 31: it must be at least 32"),
        (lambda: state_tracking(0, batch=1, length=4, group="S6"), "group is 'S6': it must be"),
        (lambda: state_tracking(0, batch=1, length=4, group="parity"), "group is 'parity': it must be"),
        (lambda: needle_retrieval(0, batch=1, length=10), "length is 10: it must be at least 11"),
        (lambda: needle_retrieval(0, batch=1, length=90, needles=40), "keys is 32: it must be at least 40"),
        (lambda: needle_retrieval(0, batch=1, length=90, depth=1.5), "depth is 1.5: it must be"),
    ],
)
def test_what_cannot_be_drawn(make, words):
    with pytest.raises(ValueError, match=words):
        make()
