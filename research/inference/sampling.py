"""From logits to the next token: temperature, top-k, top-p and min-p, as pure functions of logits and keys."""

import dataclasses
import math
import operator
from typing import Any, SupportsFloat, SupportsIndex

import jax
import jax.numpy as jnp

from research.axes import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; a pytree, so that compiled functions see new numbers without being traced again.

    Which filters are on is part of its structure (``None`` is off). Filters apply in the order of the fields, each to
    the distribution that the one before leaves.

    Attributes:
      temperature: logits are divided by it; None takes the most likely token, the lowest id among equals.
      top_k: the so many most likely tokens stay.
      top_p: the fewest most likely tokens that together have at least this probability stay (nucleus sampling,
        Holtzman et al. 2020, arXiv 1904.09751).
      min_p: tokens of at least this share of the most likely one's probability stay (Nguyen et al. 2024, arXiv 2407.01082).
    """

    temperature: float | Array | None = 1.0
    top_k: int | Array | None = None
    top_p: float | Array | None = None
    min_p: float | Array | None = None


def make_sampling(
    temperature: SupportsFloat = 0.0,
    top_k: SupportsIndex | None = None,
    top_p: SupportsFloat | None = None,
    min_p: SupportsFloat | None = None,
) -> Sampling:
    """The ``Sampling`` of numbers as a person gives them; temperature 0 is greedy, and no filter changes that.

    Raises:
      ValueError: a number out of its range; names it.
    """
    temperature = float(temperature)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    if top_k is not None:
        top_k = check_whole("top_k", top_k, 1)
    if top_p is not None and not 0 < float(top_p) <= 1:
        raise ValueError(f"top_p must be None, or more than 0 and at most 1, got {top_p}")
    if min_p is not None and not 0 <= float(min_p) <= 1:
        raise ValueError(f"min_p must be None or from 0 to 1, got {min_p}")
    if temperature == 0:
        return Sampling(None)
    # What filters nothing costs nothing. Numbers stay within what 32 bits hold.
    return Sampling(
        min(temperature, 1e30),
        None if top_k is None else min(top_k, 2**31 - 1),
        None if top_p is None or float(top_p) == 1 else float(top_p),
        None if min_p is None or float(min_p) == 0 else float(min_p),
    )


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """``value`` as an int; raises ValueError naming the argument where it is none, or out of its range."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    number = operator.index(value)
    if number < least or (most is not None and number > most):
        raise ValueError(
            f"{name} must be at least {least}{'' if most is None else f' and at most {most}'}, got {number}"
        )
    return number


def sample(logits_BV: Float[Array, "B V"], key_B, sampling: Sampling) -> Int[Array, " B"]:
    """One token a row, int32: row b's depends on its own logits and on ``key_B[b]`` alone.

    Args:
      logits_BV: unnormalised log-probabilities; computed with in float32 or wider.
      key_B: typed keys, one a row; not read where ``sampling.temperature`` is None.
    """
    if sampling.temperature is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(key_B, filtered(logits_BV, sampling)).astype(jnp.int32)


def filtered(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits over temperature, the most likely at 0, and −inf where a filter of ``sampling`` removes the token.

    Exactly ``top_k`` tokens stay, the lowest ids among equals. The most likely token always stays.
    """
    logits_BV = logits_BV.astype(jnp.promote_types(logits_BV.dtype, jnp.float32))
    V, dtype = logits_BV.shape[-1], logits_BV.dtype
    # The maximum is subtracted first: a minute temperature then gives 0 and −inf, not inf − inf.
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    temperature = jnp.ones((), dtype) if sampling.temperature is None else jnp.asarray(sampling.temperature, dtype)
    logits_BV = logits_BV / jnp.maximum(temperature, jnp.finfo(dtype).tiny)
    if sampling.top_k is not None or sampling.top_p is not None:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        count_B1 = jnp.full_like(sorted_BV[:, :1], V, jnp.int32)
        if sampling.top_k is not None:
            count_B1 = jnp.minimum(count_B1, jnp.asarray(sampling.top_k, jnp.int32))
        if sampling.top_p is not None:
            chance_BV = jax.nn.softmax(jnp.where(jnp.arange(V) < count_B1, sorted_BV, -jnp.inf), axis=-1)
            before_BV = jnp.cumsum(chance_BV, axis=-1) - chance_BV
            nucleus_B1 = jnp.sum(before_BV < jnp.asarray(sampling.top_p, dtype), axis=-1, keepdims=True)
            count_B1 = jnp.minimum(count_B1, nucleus_B1.astype(jnp.int32))
        logits_BV = jnp.where(_largest(logits_BV, sorted_BV, count_B1), logits_BV, -jnp.inf)
    if sampling.min_p is not None:
        # The most likely token's logit is 0.
        logits_BV = jnp.where(logits_BV >= jnp.log(jnp.asarray(sampling.min_p, dtype)), logits_BV, -jnp.inf)
    return logits_BV


def _largest(x_BV, sorted_BV, count_B1):
    """Where the ``count_B1`` largest of each row are, the first among equals; ``sorted_BV`` is x in descending order."""
    least_B1 = jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1)
    above_BV, equal_BV = x_BV > least_B1, x_BV == least_B1
    room_B1 = count_B1 - jnp.sum(above_BV, axis=-1, keepdims=True, dtype=jnp.int32)
    return above_BV | (equal_BV & (jnp.cumsum(equal_BV, axis=-1, dtype=jnp.int32) <= room_B1))
