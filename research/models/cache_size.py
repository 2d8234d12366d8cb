"""How many bytes a model keeps of its rows while it decodes."""

import jax

from research.models.config import ModelConfig
from research.models.parameter_count import model_of_shapes


def cache_bytes(config: ModelConfig, length: int, dtype=None) -> int:
    """Bytes of the cache of one row of up to ``length`` tokens, recurrent states included; nothing is allocated.

    Args:
      dtype: keys, values and latents are stored in; the compute dtype by default.
    """
    return _cache_bytes(config, (length,), dtype)[0]


def cache_bytes_per_token(config: ModelConfig, dtype=None, *, length: int = 1 << 20) -> int:
    """By how many bytes the cache grows with one more token, about ``length``: 0 where states and windows are all it holds."""
    before, after = _cache_bytes(config, (length, length + 1), dtype)
    return after - before


def _cache_bytes(config: ModelConfig, lengths: tuple[int, ...], dtype) -> list[int]:
    def states(model):
        return [model.init_cache(1, length, dtype).stages for length in lengths]

    sizes = jax.eval_shape(states, model_of_shapes(config))
    return [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(s)) for s in sizes]
