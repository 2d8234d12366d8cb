"""Small tasks that tell mechanisms apart: each needs one ability, and chance and perfection are known.

Every function draws one batch from a seed and returns the dict that training reads (``inputs_BT``, ``targets_BT``,
``segment_ids_BT``, ``positions_BT`` int32, ``loss_mask_BT`` bool): the target of position t is what the model must say
having read inputs 0 … t, and only positions under the mask count. The vocabulary of a task is stated with it. A seed is
an int or a tuple such as ``(run_seed, step)``; the same seed gives the same batch.
"""

import functools
import itertools

import numpy as np

Batch = dict[str, np.ndarray]
Seed = int | tuple[int, ...]


def associative_recall(
    seed: Seed, *, batch: int, length: int, pairs: int, overwrites: int = 0, keys: int = 64, values: int = 64
) -> Batch:
    """Multi-query associative recall (Arora et al., 2023, "Zoology", section 4), with overwrites.

    First come ``pairs`` writes "key value" with different keys, then ``overwrites`` writes that give one of these keys a
    value other than it has; then each key is asked for once, at a random place among filler. The target at a question is
    the key's **last** value. Additive memories (plain linear attention) blend old and new values; the delta rule
    replaces (Schlag et al., 2021; Yang et al., 2024). Chance is 1 / values.

    Ids: 0 filler; 1 … keys; then the values: ``1 + keys + values`` in all.

    Raises:
      ValueError: keys or places that don't suffice.
    """
    writes = pairs + overwrites
    _at_least("keys", keys, pairs, "pairs")
    _at_least("values", values, 2 if overwrites else 1, "the values an overwrite needs")
    _at_least("length", length, 2 * writes + pairs, "2 · (pairs + overwrites) + pairs")
    rng = np.random.default_rng(seed)
    rows_B1 = np.arange(batch)[:, None]
    key_BP = 1 + _choose(rng, batch, keys, pairs)
    value_BP = rng.integers(0, values, (batch, pairs))
    inputs_BT, targets_BT, mask_BT = _blank(batch, length)
    inputs_BT[:, 0 : 2 * pairs : 2] = key_BP
    inputs_BT[:, 1 : 2 * pairs : 2] = 1 + keys + value_BP
    for write in range(pairs, writes):
        pair_B1 = rng.integers(0, pairs, (batch, 1))
        value_BP[rows_B1, pair_B1] += rng.integers(1, values, (batch, 1))
        value_BP %= values
        inputs_BT[:, [2 * write]] = key_BP[rows_B1, pair_B1]
        inputs_BT[:, [2 * write + 1]] = 1 + keys + value_BP[rows_B1, pair_B1]
    place_BP = 2 * writes + _choose(rng, batch, length - 2 * writes, pairs)
    inputs_BT[rows_B1, place_BP] = key_BP
    targets_BT[rows_B1, place_BP] = 1 + keys + value_BP
    mask_BT[rows_B1, place_BP] = True
    return _batch(inputs_BT, targets_BT, mask_BT)


def selective_copying(seed: Seed, *, batch: int, length: int, copied: int = 16, symbols: int = 14) -> Batch:
    """Selective copying (Gu and Dao, 2023, "Mamba", section 4.1.1; after Jing et al., 2019).

    ``copied`` symbols lie at random places in noise; the last ``copied`` positions hold a marker and ask for them in
    order. The spacing is random, so the time-invariant (a convolution, a decay that doesn't look) fails, and what
    selects by content solves it. Chance is 1 / symbols.

    Ids: 0 noise; 1 marker; then the symbols: ``2 + symbols`` in all.

    Raises:
      ValueError: places that don't suffice.
    """
    _at_least("length", length, 2 * copied, "2 · copied")
    rng = np.random.default_rng(seed)
    inputs_BT, targets_BT, mask_BT = _blank(batch, length)
    symbol_BN = rng.integers(2, 2 + symbols, (batch, copied))
    place_BN = np.sort(_choose(rng, batch, length - copied, copied), axis=1)
    inputs_BT[np.arange(batch)[:, None], place_BN] = symbol_BN
    inputs_BT[:, length - copied :] = 1
    targets_BT[:, length - copied :] = symbol_BN
    mask_BT[:, length - copied :] = True
    return _batch(inputs_BT, targets_BT, mask_BT)


def state_tracking(seed: Seed, *, batch: int, length: int, group: str = "Z2") -> Batch:
    """Running products in a finite group; ``Z2`` is parity.

    Input t is a group element x_t, the target is x_t · … · x_1, and every position counts. Diagonal transitions with
    eigenvalues in [0, 1] can't do parity at any length; eigenvalues down to −1 (β up to 2 in the delta rule) can
    (Grazzi et al., 2024, "Unlocking state-tracking in linear RNNs through negative eigenvalues"), and products of a few
    such steps reach the permutations. ``S5`` is complete for NC1: no diagonal state-space model and no transformer of
    fixed depth tracks it (Merrill, Petty and Sabharwal, 2024, "The illusion of state in state-space models"). Chance is
    1 / order.

    Ids: the elements, 0 the identity: n of ``Zn`` (addition modulo n), n! of ``Sn`` (permutations in lexicographic order).

    Raises:
      ValueError: a group that is not Zn (n ≥ 2) or Sn (2 ≤ n ≤ 5).
    """
    product_NN = group_table(group)
    rng = np.random.default_rng(seed)
    inputs_BT = rng.integers(0, len(product_NN), (batch, length)).astype(np.int32)
    targets_BT = np.empty_like(inputs_BT)
    state_B = np.zeros(batch, np.int32)
    for t in range(length):
        state_B = product_NN[inputs_BT[:, t], state_B]
        targets_BT[:, t] = state_B
    return _batch(inputs_BT, targets_BT, np.ones((batch, length), np.bool_))


@functools.cache
def group_table(group: str) -> np.ndarray:
    """int32 ``table[a, b]`` = a · b: for permutations, first b, then a.

    Raises:
      ValueError: a group that is not Zn (n ≥ 2) or Sn (2 ≤ n ≤ 5).
    """
    kind, number = group[:1], group[1:]
    n = int(number) if number.isdecimal() else 0
    if kind == "Z" and n >= 2:
        table = np.add.outer(np.arange(n), np.arange(n)) % n
    elif kind == "S" and 2 <= n <= 5:
        permutations = list(itertools.permutations(range(n)))
        rank = {permutation: i for i, permutation in enumerate(permutations)}
        table = np.array([[rank[tuple(a[j] for j in b)] for b in permutations] for a in permutations])
    else:
        raise ValueError(f"group is {group!r}: it must be Zn with n of at least 2, or Sn with n from 2 to 5")
    table = table.astype(np.int32)
    table.flags.writeable = False
    return table


def needle_retrieval(
    seed: Seed,
    *,
    batch: int,
    length: int,
    needles: int = 1,
    needle_length: int = 4,
    depth: float | None = None,
    keys: int = 32,
    symbols: int = 64,
) -> Batch:
    """A needle in a haystack (Kamradt, 2023; passkeys: Mohtashami and Jaggi, 2023), with decoys as in RULER's multi-key
    task (Hsieh et al., 2024).

    A haystack of random symbols holds ``needles`` of the form "mark key s₁ … sₙ" with different keys and n =
    ``needle_length``. The row ends with "question key s₁ … sₙ₋₁", and the targets from that key on are s₁ … sₙ of the
    needle with that key. ``depth`` places it: 0 at the start, 1 right before the question, None at random. What forgets
    fails by distance, a state of fixed size by the number of symbols. Chance is 1 / symbols for each symbol.

    Ids: 0 mark; 1 question; then the keys, then the symbols: ``2 + keys + symbols`` in all.

    Raises:
      ValueError: keys or places that don't suffice, or a depth outside [0, 1].
    """
    size, asked = 2 + needle_length, 1 + needle_length
    _at_least("needles", needles, 1, "one")
    _at_least("needle_length", needle_length, 1, "one")
    _at_least("keys", keys, needles, "needles")
    _at_least("length", length, needles * size + asked, "needles · (2 + needle_length) + 1 + needle_length")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}: it must be from 0 to 1, or None")
    rng = np.random.default_rng(seed)
    hay = length - asked - needles * size
    # A needle counts as one place among hay + needles; those before it push it on by the rest of their size.
    places = hay + needles
    asked_for_B = rng.integers(0, places, batch) if depth is None else np.full(batch, round(depth * (places - 1)))
    decoy_BN = _choose(rng, batch, places - 1, needles - 1)
    decoy_BN += decoy_BN >= asked_for_B[:, None]
    place_BN = np.sort(np.concatenate([asked_for_B[:, None], decoy_BN], axis=1), axis=1)
    asked_B = np.argmax(place_BN == asked_for_B[:, None], axis=1)
    start_BN = place_BN + np.arange(needles) * (size - 1)
    key_BN = 2 + _choose(rng, batch, keys, needles)
    symbol_BNn = rng.integers(2 + keys, 2 + keys + symbols, (batch, needles, needle_length))
    inputs_BT = rng.integers(2 + keys, 2 + keys + symbols, (batch, length)).astype(np.int32)
    rows_B1 = np.arange(batch)[:, None]
    inputs_BT[rows_B1, start_BN] = 0
    inputs_BT[rows_B1, start_BN + 1] = key_BN
    for i in range(needle_length):
        inputs_BT[rows_B1, start_BN + 2 + i] = symbol_BNn[:, :, i]
    answer_Bn = symbol_BNn[np.arange(batch), asked_B]
    _, targets_BT, mask_BT = _blank(batch, length)
    inputs_BT[:, length - asked] = 1
    inputs_BT[:, length - needle_length] = key_BN[np.arange(batch), asked_B]
    inputs_BT[:, length - needle_length + 1 :] = answer_Bn[:, :-1]
    targets_BT[:, length - needle_length :] = answer_Bn
    mask_BT[:, length - needle_length :] = True
    return _batch(inputs_BT, targets_BT, mask_BT)


def _choose(rng: np.random.Generator, batch: int, total: int, count: int) -> np.ndarray:
    """``count`` different numbers below ``total`` in random order, for each row."""
    return np.argsort(rng.random((batch, total)), axis=1)[:, :count]


def _blank(batch: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    inputs_BT = np.zeros((batch, length), np.int32)
    return inputs_BT, np.zeros_like(inputs_BT), np.zeros((batch, length), np.bool_)


def _batch(inputs_BT: np.ndarray, targets_BT: np.ndarray, loss_mask_BT: np.ndarray) -> Batch:
    return {
        "inputs_BT": inputs_BT,
        "targets_BT": targets_BT,
        "segment_ids_BT": np.ones_like(inputs_BT),
        "positions_BT": np.broadcast_to(np.arange(inputs_BT.shape[1], dtype=np.int32), inputs_BT.shape).copy(),
        "loss_mask_BT": loss_mask_BT,
    }


def _at_least(name: str, value: int, least: int, reason: str) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}: it must be at least {least} ({reason})")
