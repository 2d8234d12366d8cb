"""The two compiled functions of inference: read prompts in the parallel form, decode blocks in the recurrent form."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from research.axes import Array, Bool, Float, Int
from research.inference.sampling import Sampling, sample
from research.models.language_model import Cache, LanguageModel
from research.ops.losses import token_logprobs
from research.sharding.mesh import BATCH, P, gathered, on_mesh, per_shard

# Tokens of the longest block. The array is this long whatever is asked for, so that every block is one program.
BLOCK = 32


class Decoding(NamedTuple):
    """Rows that are being continued.

    Attributes:
      cache: of everything before ``token_B``; its size never changes.
      token_B: the newest token, not yet read by the model.
      new_B: new tokens so far, ``token_B`` included.
      done_B: whether the row has met a stop token; what it decodes after that is nobody's.
      key_B: one key a row; token number n is drawn with ``fold_in(key, n)``, whatever the rows beside it.
    """

    cache: Cache
    token_B: Int[Array, " B"]
    new_B: Int[Array, " B"]
    done_B: Bool[Array, " B"]
    key_B: Array


class Drawn(NamedTuple):
    """Tokens as they were drawn, whole on every device. Where log-probabilities are asked for: those that the model gives,
    before temperature and filters, to each token and to the ``top`` most likely ones in its place, else None."""

    ids_BN: Int[Array, "B N"]
    logprobs_BN: Float[Array, "B N"] | None = None
    top_ids_BNK: Int[Array, "B N K"] | None = None
    top_logprobs_BNK: Float[Array, "B N K"] | None = None


@functools.partial(jax.jit, static_argnames=("max_length", "top"))
def prefill(
    model: LanguageModel,
    prompts_BT,
    lengths_B,
    is_stop_V,
    seed,
    sampling: Sampling,
    *,
    max_length: int,
    top: int | None = None,
) -> tuple[Drawn, Decoding]:
    """Reads the prompts and draws the first new token of each.

    Args:
      prompts_BT: right-padded, ``lengths_B`` tokens of each row are real; a row of none is done from the start.
      is_stop_V: which tokens end a row.
      seed: of all randomness.
      max_length: slots of the cache: at least the longest prompt and all but the last of its new tokens.
      top: how many alternatives come with log-probabilities; None is no log-probabilities at all.

    Returns:
      The first new tokens [B, 1], and a ``Decoding``.
    """
    prompts_BT, lengths_B = spread((prompts_BT, lengths_B))
    B, T = prompts_BT.shape
    real_BT = (jnp.arange(T) < lengths_B[:, None]).astype(jnp.int32)
    x_BTD, cache, _ = model.hidden(prompts_BT, real_BT, cache=_empty_cache(model, B, max_length))
    last_B1D: Any = per_shard(_last, (x_BTD, lengths_B))
    key_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(B))
    key_B, new_B = spread((key_B, jnp.zeros(B, jnp.int32)))
    logits_BV = model.logits(last_B1D)[:, 0]
    token_B = _draw(logits_BV, key_B, new_B, sampling)
    done_B = _stops(is_stop_V, token_B) | (lengths_B == 0)
    state = Decoding(cache, token_B, new_B + 1, done_B, key_B)
    return jax.tree.map(lambda x: x[:, None], _drawn(logits_BV, token_B, top)), state


@functools.partial(jax.jit, donate_argnames="state", static_argnames="top")
def decode(
    model: LanguageModel, state: Decoding, is_stop_V, sampling: Sampling, count, *, top: int | None = None
) -> tuple[Drawn, Decoding]:
    """Draws up to ``count`` (at most ``BLOCK``) more tokens of every row; fewer once all rows are done.

    Returns:
      Tokens [B, BLOCK], of which the first ``count`` are new up to each row's stop token, and the next ``Decoding``, which
      takes the place of the one given.
    """
    B, wide = state.token_B.shape[0], jnp.promote_types(model.config.compute_dtype, jnp.float32)
    drawn = Drawn(jnp.zeros((B, BLOCK), jnp.int32))
    if top is not None:
        top_ids_BNK = jnp.zeros((B, BLOCK, top), jnp.int32)
        drawn = Drawn(drawn.ids_BN, jnp.zeros((B, BLOCK), wide), top_ids_BNK, top_ids_BNK.astype(wide))

    def going(carry):
        state, _, n = carry
        return (n < count) & ~jnp.all(state.done_B)

    def step(carry):
        state, drawn, n = carry
        # Segment ids are left out: one token of each row, all real, is the recurrent form.
        out = model(state.token_B[:, None], cache=state.cache)
        logits_BV = out.logits_BTV[:, 0]
        token_B = _draw(logits_BV, state.key_B, state.new_B, sampling)
        done_B = state.done_B | _stops(is_stop_V, token_B)
        drawn = jax.tree.map(lambda all, new: all.at[:, n].set(new), drawn, _drawn(logits_BV, token_B, top))
        return Decoding(cast(Cache, out.cache), token_B, state.new_B + 1, done_B, state.key_B), drawn, n + 1

    state, drawn, _ = jax.lax.while_loop(going, step, (state, drawn, jnp.zeros((), jnp.int32)))
    return drawn, state


def spread(tree, rows_axis: int = 0):
    """Arrays with their rows where the rows of a batch lie."""
    return jax.reshard(tree, P(*[None] * rows_axis, BATCH)) if on_mesh() else tree


def _empty_cache(model: LanguageModel, batch: int, max_length: int) -> Cache:
    cache = model.init_cache(batch, max_length)
    # A stage's states are stacked over its repeats.
    return Cache(spread(cache.length_B), spread(cache.stages, rows_axis=1))


def _last(batched, _):
    x_BTD, lengths_B = batched
    return jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)


def _draw(logits_BV, key_B, new_B, sampling: Sampling) -> Any:
    def draw(batched, sampling):
        logits_BV, key_B, new_B = batched
        return sample(logits_BV, jax.vmap(jax.random.fold_in)(key_B, new_B), sampling)

    return per_shard(draw, (logits_BV, key_B, new_B), sampling)


def _drawn(logits_BV, token_B, top: int | None) -> Drawn:
    """One token a row, without the axis N."""
    if top is None:
        return Drawn(gathered(token_B))

    def look(batched, _):
        logits_BV, token_B = batched
        return token_logprobs(logits_BV, token_B), *top_logprobs(logits_BV, top)

    told: Any = per_shard(look, (logits_BV, token_B))
    return Drawn(gathered(token_B), *map(gathered, told))


def top_logprobs(logits_BV: Float[Array, "B V"], top: int) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
    """Ids of the ``top`` most likely tokens of each row, likeliest first, and their log-probabilities."""
    top_ids_BK = jax.lax.top_k(logits_BV, top)[1]
    return top_ids_BK, token_logprobs(logits_BV[:, None], top_ids_BK)


def _stops(is_stop_V, token_B) -> Any:
    return per_shard(lambda token_B, is_stop_V: is_stop_V[token_B], token_B, is_stop_V)
