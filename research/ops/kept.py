"""What may be kept for the backward pass where all else is recomputed (``jax.checkpoint``): the results of the ops whose
forward passes are dear. Each op names its own, inside its forward rule, where a policy of ``jax.checkpoint`` sees them."""

import jax
from jax.ad_checkpoint import checkpoint_name

NAMES = ("attention", "causal_conv", "experts", "linear_attention")


def keepable(values, name: str):
    """The same values, under a name that ``keeping`` knows."""
    if name not in NAMES:
        raise ValueError(f"{name!r} is not among what may be kept: {', '.join(NAMES)}")
    return jax.tree.map(lambda x: checkpoint_name(x, name), values)


def keeping(names: tuple[str, ...]):
    """The policy of ``jax.checkpoint`` under which these ops run once: their results, and the states or sums their backward
    passes begin from, are stored; everything else is recomputed."""
    return jax.checkpoint_policies.save_only_these_names(*names)
