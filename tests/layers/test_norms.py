"""Normalisation with a scale, against its definition."""

import jax.numpy as jnp
import numpy as np

from research.layers.norms import RMSNormConfig


def test_without_the_mean_it_is_layer_norm():
    """(Ba et al. 2016), without a bias: DBRX's."""
    x_BD = np.random.default_rng(0).normal(3, 2, (4, 16)).astype(np.float32)
    norm = RMSNormConfig(eps=1e-5, centred=False, mean=True).build(16, param_dtype=jnp.float32)
    wanted_BD = (x_BD - x_BD.mean(1, keepdims=True)) / np.sqrt(x_BD.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(x_BD), wanted_BD, atol=1e-6)
