"""The two compiled functions of inference: read prompts in the parallel form, decode blocks in the recurrent form."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from research.axes import Array, Bool, Int
from research.inference.sampling import Sampling, sample
from research.models.language_model import Cache, LanguageModel
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


@functools.partial(jax.jit, static_argnames="max_length")
def prefill(model: LanguageModel, prompts_BT, lengths_B, is_stop_V, seed, sampling: Sampling, *, max_length: int):
    """Reads the prompts and draws the first new token of each.

    Args:
      prompts_BT: right-padded, ``lengths_B`` tokens of each row are real; a row of none is done from the start.
      is_stop_V: which tokens end a row.
      seed: of all randomness.
      max_length: slots of the cache: at least the longest prompt and all but the last of its new tokens.

    Returns:
      The first new tokens [B] whole on every device, and a ``Decoding``.
    """
    prompts_BT, lengths_B = _spread((prompts_BT, lengths_B))
    B, T = prompts_BT.shape
    real_BT = (jnp.arange(T) < lengths_B[:, None]).astype(jnp.int32)
    x_BTD, cache, _ = model.hidden(prompts_BT, real_BT, cache=_empty_cache(model, B, max_length))
    last_B1D: Any = per_shard(_last, (x_BTD, lengths_B))
    key_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(B))
    key_B, new_B = _spread((key_B, jnp.zeros(B, jnp.int32)))
    token_B = _draw(model.logits(last_B1D)[:, 0], key_B, new_B, sampling)
    done_B = _stops(is_stop_V, token_B) | (lengths_B == 0)
    state = Decoding(cache, token_B, new_B + 1, done_B, key_B)
    return gathered(token_B), state


@functools.partial(jax.jit, donate_argnames="state")
def decode(model: LanguageModel, state: Decoding, is_stop_V, sampling: Sampling, count):
    """Draws up to ``count`` (at most ``BLOCK``) more tokens of every row; fewer once all rows are done.

    Returns:
      tokens [B, BLOCK] whole on every device, of which the first ``count`` are new up to each row's stop token, and the
      next ``Decoding``, which takes the place of the one given.
    """
    tokens_BN = jnp.zeros((state.token_B.shape[0], BLOCK), jnp.int32)

    def going(carry):
        state, _, n = carry
        return (n < count) & ~jnp.all(state.done_B)

    def step(carry):
        state, tokens_BN, n = carry
        # Segment ids are left out: one token of each row, all real, is the recurrent form.
        out = model(state.token_B[:, None], cache=state.cache)
        token_B = _draw(out.logits_BTV[:, 0], state.key_B, state.new_B, sampling)
        done_B = state.done_B | _stops(is_stop_V, token_B)
        tokens_BN = tokens_BN.at[:, n].set(gathered(token_B))
        return Decoding(cast(Cache, out.cache), token_B, state.new_B + 1, done_B, state.key_B), tokens_BN, n + 1

    state, tokens_BN, _ = jax.lax.while_loop(going, step, (state, tokens_BN, jnp.zeros((), jnp.int32)))
    return tokens_BN, state


def _spread(tree, rows_axis: int = 0):
    """Arrays with their rows where the rows of a batch lie."""
    return jax.reshard(tree, P(*[None] * rows_axis, BATCH)) if on_mesh() else tree


def _empty_cache(model: LanguageModel, batch: int, max_length: int) -> Cache:
    cache = model.init_cache(batch, max_length)
    # A stage's states are stacked over its repeats.
    return Cache(_spread(cache.length_B), _spread(cache.stages, rows_axis=1))


def _last(batched, _):
    x_BTD, lengths_B = batched
    return jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)


def _draw(logits_BV, key_B, new_B, sampling: Sampling) -> Any:
    def draw(batched, sampling):
        logits_BV, key_B, new_B = batched
        return sample(logits_BV, jax.vmap(jax.random.fold_in)(key_B, new_B), sampling)

    return per_shard(draw, (logits_BV, key_B, new_B), sampling)


def _stops(is_stop_V, token_B) -> Any:
    return per_shard(lambda token_B, is_stop_V: is_stop_V[token_B], token_B, is_stop_V)
