"""Speculative decoding with a model's own multi-token heads: several tokens a call, the model's distribution exactly.

The heads draft N tokens, one call of the model checks them all (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023,
arXiv 2302.01318). What a rejected token left in a recurrent state cannot be taken out: the cache from before the call is
kept, and where a row rejects, the call runs again with its rejected tokens as padding (id 0). Caches that hold every token
by its place need no second call: their length is set back.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from research.axes import Array, Bool, Float, Int
from research.inference.generation import Ids, check_ids, size_class
from research.inference.sampling import Sampling, check_whole, filtered, make_sampling
from research.layers.attention import Attention
from research.layers.context import Context
from research.layers.mla import MLA
from research.models.language_model import Cache, LanguageModel
from research.models.multi_token import MultiToken
from research.sharding.mesh import on_mesh


class HeadState(NamedTuple):
    """What one head remembers: its layers' states of ``length_B`` tokens, and of the head before it (or the model) the last
    hidden state that it has not read yet, where there is one (head 1 never keeps one)."""

    states: tuple[Any, ...]
    length_B: Int[Array, " B"]
    waiting_B1D: Float[Array, "B 1 D"]
    waits_B: Bool[Array, " B"]


class Rows(NamedTuple):
    """Rows between two rounds: ``token_B`` is drawn and not yet read, ``draft_BN`` was drawn from ``draft_BNV``, the logits of
    the heads after filters."""

    cache: Cache
    heads: tuple[HeadState, ...]
    token_B: Int[Array, " B"]
    draft_BN: Int[Array, "B N"]
    draft_BNV: Float[Array, "B N V"]
    new_B: Int[Array, " B"]
    key_B: Array


class Speculation(NamedTuple):
    """New ids for each prompt; tokens drafted, and how many of them the model kept; rounds, each one call of the model
    (and a second where a recurrent state had to be rolled back)."""

    new: list[list[int]]
    drafted: int
    accepted: int
    rounds: int


def speculate(
    model: LanguageModel,
    prompts: Iterable[Ids],
    max_new_tokens: SupportsIndex = 32,
    temperature: SupportsFloat = 0.0,
    top_k: SupportsIndex | None = None,
    top_p: SupportsFloat | None = None,
    min_p: SupportsFloat | None = None,
    stop: Ids = (),
    seed: SupportsIndex = 0,
) -> Speculation:
    """Continues prompts as ``generate`` does, with the model's multi-token heads as drafters.

    Greedy output is that of ``generate``. Samples have its distribution, but are others: the draws differ.

    Raises:
      ValueError: as ``generate``; and where the model has no such heads.
      NotImplementedError: on a mesh.
    """
    if model.mtp is None:
        raise ValueError("model must have multi-token heads (ModelConfig.mtp), got a model without")
    if on_mesh():
        raise NotImplementedError("speculate runs on one device, without a mesh")
    rows = [check_ids(ids, f"prompts[{i}]", model.config.vocab_size) for i, ids in enumerate(prompts)]
    for i, ids in enumerate(rows):
        if not ids:
            raise ValueError(f"prompts[{i}] is empty: it must hold at least one token id (that of a start token, say)")
    most = check_whole("max_new_tokens", max_new_tokens, 1)
    seed = check_whole("seed", seed, 0, 2**32 - 1)
    stops = set(check_ids(stop, "stop", model.config.vocab_size))
    sampling = make_sampling(temperature, top_k, top_p, min_p)
    if not rows:
        return Speculation([], 0, 0, 0)
    depth, longest = model.mtp.config.depth, max(map(len, rows))
    prompts_BT, lengths_B = (
        np.zeros((len(rows), size_class(longest)), np.int32),
        np.asarray([*map(len, rows)], np.int32),
    )
    for b, ids in enumerate(rows):
        prompts_BT[b, : len(ids)] = ids
    slots = size_class(longest + most + depth + 1)
    state = start(model, prompts_BT, lengths_B, np.uint32(seed), sampling, max_length=slots)
    new, drafted, accepted, rounds = [[token] for token in np.asarray(state.token_B).tolist()], 0, 0, 0
    while True:
        active_B = np.asarray([len(ids) < most and ids[-1] not in stops for ids in new])
        if not active_B.any():
            return Speculation(new, drafted, accepted, rounds)
        tokens_BN, count_B, state = advance(model, state, active_B, sampling)
        rounds += 1
        for b, (tokens, count) in enumerate(zip(np.asarray(tokens_BN).tolist(), np.asarray(count_B), strict=True)):
            if active_B[b]:
                drafted, accepted = drafted + depth, accepted + int(count) - 1
            for token in tokens[:count]:
                if len(new[b]) < most and new[b][-1] not in stops:
                    new[b].append(token)


@functools.partial(jax.jit, static_argnames="max_length")
def start(model: LanguageModel, prompts_BT, lengths_B, seed, sampling: Sampling, *, max_length: int) -> Rows:
    """Reads the prompts, draws the first new token of each and drafts the next."""
    B, T = prompts_BT.shape
    real_BT = (jnp.arange(T) < lengths_B[:, None]).astype(jnp.int32)
    x_BTD, cache, _ = model.hidden(prompts_BT, real_BT, cache=model.init_cache(B, max_length))
    key_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(B))
    new_B = jnp.zeros(B, jnp.int32)
    token_B = _draw(_logits_at(model, x_BTD, lengths_B - 1, sampling), _keys(key_B, new_B, 0), sampling)
    next_BT = jnp.pad(prompts_BT[:, 1:], [(0, 0), (0, 1)]).at[jnp.arange(B), lengths_B - 1].set(token_B)
    heads = []
    ahead = _heads_of(model)
    for depth in range(1, ahead.config.depth + 1):
        states = ahead.head(depth).init_states(B, max_length, model.config.compute_dtype)
        heads.append(HeadState(states, jnp.zeros(B, jnp.int32), jnp.zeros_like(x_BTD[:, :1]), jnp.zeros(B, bool)))
    return _draft(model, cache, tuple(heads), x_BTD, next_BT, lengths_B, token_B, new_B + 1, key_B, sampling)


@functools.partial(jax.jit, donate_argnames="rows")
def advance(model: LanguageModel, rows: Rows, active_B, sampling: Sampling):
    """One round: the model reads the waiting token and the drafts, keeps some of them and draws one more.

    Returns:
      tokens [B, N+1], of which the first ``count_B`` (1 to N+1; 0 for a row that is not active) are new, the counts, and the
      next ``Rows``.
    """
    N = rows.draft_BN.shape[1]
    read_BN = jnp.concatenate([rows.token_B[:, None], rows.draft_BN], axis=1)
    ids_BN = jnp.broadcast_to(active_B[:, None], read_BN.shape).astype(jnp.int32)
    x_BND, cache, _ = model.hidden(read_BN, ids_BN, cache=rows.cache)
    logits_BNV = _filtered(model.logits(x_BND), sampling)
    kept_B, token_B = _verify(logits_BNV, rows, sampling)
    count_B = jnp.where(active_B, kept_B + 1, 0)
    valid_BN = jnp.arange(N + 1) < count_B[:, None]
    if _rewinds(model):
        cache = cache._replace(length_B=rows.cache.length_B + count_B)
    else:
        cache = jax.lax.cond(
            jnp.all(count_B == jnp.where(active_B, N + 1, 0)),
            lambda: cache,
            lambda: model.hidden(read_BN, valid_BN.astype(jnp.int32), cache=rows.cache)[1],
        )
    token_B = jnp.where(active_B, token_B, rows.token_B)
    # The new tokens: drafts that were kept, and after them the one just drawn.
    next_BN = jnp.pad(rows.draft_BN, [(0, 0), (0, 1)])
    next_BN = jnp.where(jnp.arange(N + 1) == kept_B[:, None], token_B[:, None], next_BN)
    new_B = rows.new_B + count_B
    after = _draft(model, cache, rows.heads, x_BND, next_BN, count_B, token_B, new_B, rows.key_B, sampling)
    return next_BN, count_B, after


def _verify(logits_BNV, rows: Rows, sampling: Sampling):
    """How many drafts are kept, and the token after them (Leviathan et al., algorithm 1)."""
    N = rows.draft_BN.shape[1]
    if sampling.temperature is None:
        choice_BN = jnp.argmax(logits_BNV, axis=-1).astype(jnp.int32)
        kept_B = jnp.sum(jnp.cumprod(choice_BN[:, :N] == rows.draft_BN, axis=1), axis=1, dtype=jnp.int32)
        return kept_B, _at(choice_BN, kept_B)
    p_BNV, q_BNV = jax.nn.softmax(logits_BNV, axis=-1), jax.nn.softmax(rows.draft_BNV, axis=-1)
    p_BN, q_BN = (jnp.take_along_axis(x[:, :N], rows.draft_BN[..., None], axis=-1)[..., 0] for x in (p_BNV, q_BNV))
    uniform_BN = jax.vmap(lambda key: jax.random.uniform(key, (N,), p_BN.dtype))(_keys(rows.key_B, rows.new_B, 1))
    kept_B = jnp.sum(jnp.cumprod(uniform_BN * q_BN < p_BN, axis=1), axis=1, dtype=jnp.int32)
    # After a rejection, what p has more than q; after all drafts, p itself.
    q_BNV = jnp.pad(q_BNV, [(0, 0), (0, 1), (0, 0)])
    rest_BV = jnp.maximum(_at(p_BNV, kept_B) - _at(q_BNV, kept_B), 0)
    # Where p and q agree to the last bit nothing is left, and nothing is rejected but by rounding: p itself again.
    rest_BV = jnp.where(jnp.sum(rest_BV, axis=-1, keepdims=True) > 0, rest_BV, _at(p_BNV, kept_B))
    return kept_B, _draw(jnp.log(rest_BV), _keys(rows.key_B, rows.new_B, 2), sampling)


def _draft(model: LanguageModel, cache, heads, x_BTD, next_BT, count_B, token_B, new_B, key_B, sampling) -> Rows:
    """Every head reads what is new and drafts a token.

    Head k's entry at place i needs token i+k. Its last k−1 entries read drafts: they are read in a call whose state is not
    kept, and read again once the tokens are known, which is why a head's input waits between rounds.

    Args:
      x_BTD: the model's hidden states of the ``count_B`` new places of each row (0: nothing changes).
      next_BT: the token after each of them.
    """
    N, T = len(heads), x_BTD.shape[1]
    after, drafts, logits = [], [], []
    waiting = [(head.waiting_B1D, head.waits_B) for head in heads]
    rows_B, active_B = jnp.arange(len(count_B)), count_B > 0
    hidden_BTD, total_B, behind_B = x_BTD, count_B, jnp.zeros_like(count_B)
    token_BT = jnp.pad(next_BT, [(0, 0), (0, 2 * N)])
    for depth, head in enumerate(heads, 1):
        if depth > 1:
            # What waits comes first; rows where nothing does are moved up.
            waits_B = head.waits_B & active_B
            hidden_BTD = jnp.concatenate([head.waiting_B1D, hidden_BTD], axis=1)
            hidden_BTD = _gather(hidden_BTD, jnp.arange(T + depth - 1) + jnp.where(waits_B, 0, 1)[:, None])
            total_B, behind_B = total_B + waits_B, behind_B + waits_B
        length = hidden_BTD.shape[1]
        known_B = jnp.maximum(total_B - (depth - 1), 0)
        tokens_BT = _gather(token_BT, jnp.arange(length) + (depth - 1 - behind_B)[:, None])
        module = _heads_of(model).head(depth)

        def read(valid_B, module=module, hidden_BTD=hidden_BTD, tokens_BT=tokens_BT, head=head):
            place_BT = jnp.broadcast_to(jnp.arange(hidden_BTD.shape[1], dtype=jnp.int32), tokens_BT.shape)
            ids_BT = (place_BT < valid_B[:, None]).astype(jnp.int32)
            context = Context(place_BT + head.length_B[:, None], ids_BT, tokens_BT, head.length_B)
            return module(hidden_BTD, model.embed(tokens_BT), head.states, context)[:2]

        out_BTD, states = read(total_B)
        if depth > 1:
            _, states = read(known_B)
        logits_BV = _logits_at(model, out_BTD, jnp.maximum(total_B - 1, 0), sampling)
        draft_B = _draw(logits_BV, _keys(key_B, new_B, 2 + depth), sampling)
        token_BT = token_BT.at[rows_B, count_B + depth - 1].set(draft_B)
        after.append(head._replace(states=states, length_B=head.length_B + known_B))
        drafts.append(draft_B)
        logits.append(logits_BV)
        if depth < N:
            # This head's last known output is the next one's first that it has not read.
            last_B1D, waits_B = waiting[depth]
            new_B1D = _at(out_BTD, jnp.maximum(known_B - 1, 0))[:, None]
            waiting[depth] = jnp.where((known_B > 0)[:, None, None], new_B1D, last_B1D), waits_B | (known_B > 0)
        hidden_BTD = out_BTD
    heads = tuple(h._replace(waiting_B1D=x, waits_B=w) for h, (x, w) in zip(after, waiting, strict=True))
    return Rows(cache, heads, token_B, jnp.stack(drafts, 1), jnp.stack(logits, 1), new_B, key_B)


def _rewinds(model: LanguageModel) -> bool:
    """Whether every state of the model holds all tokens by their place, so that a shorter length undoes the last."""
    mixers = [branch.mixer for stage in model.stages for branch in stage.branches]
    states = [
        mixer for mixer in mixers if jax.tree.leaves(jax.eval_shape(lambda m=mixer: m.init_state(1, 8, jnp.float32)))
    ]
    return all(isinstance(m, MLA) or (isinstance(m, Attention) and m.config.reach is None) for m in states)


def _heads_of(model: LanguageModel) -> MultiToken:
    assert model.mtp is not None
    return model.mtp


def _logits_at(model: LanguageModel, x_BTD, index_B, sampling: Sampling):
    return _filtered(model.logits(_at(x_BTD, index_B)[:, None]), sampling)[:, 0]


def _filtered(logits, sampling: Sampling):
    """Logits [..., V] after temperature and filters; as they are where the most likely token is taken."""
    if sampling.temperature is None:
        return logits
    return filtered(logits.reshape(-1, logits.shape[-1]), sampling).reshape(logits.shape)


def _draw(logits_BV, key_B, sampling: Sampling):
    if sampling.temperature is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


def _keys(key_B, new_B, purpose: int):
    """A key a row for the round after ``new_B`` tokens, another for every purpose."""
    return jax.vmap(lambda key, new: jax.random.fold_in(jax.random.fold_in(key, new), purpose))(key_B, new_B)


def _at(x_BT, index_B):
    """Each row's entry [B, T, …] → [B, …]."""
    return x_BT[jnp.arange(x_BT.shape[0]), index_B]


def _gather(x_BT, index_BS):
    """Each row's entries, past the end the last."""
    return x_BT[jnp.arange(x_BT.shape[0])[:, None], jnp.minimum(index_BS, x_BT.shape[1] - 1)]
