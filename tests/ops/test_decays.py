"""Decays against the published formulas in float64."""

import jax.numpy as jnp
import numpy as np

from research.ops.decays import lightning_log_decay, retention_log_decay, step_size


def test_lightning_slopes():
    heads, layers = 8, 80
    for layer in (0, 17, 79):
        h = np.arange(1, heads + 1)
        want = -(2.0 ** (-8 * h / heads)) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)
        np.testing.assert_allclose(lightning_log_decay(heads, layer, layers), want, rtol=1e-6, atol=2e-7)
    assert (np.asarray(lightning_log_decay(heads, 79, 80)) < 0).all()
    assert np.isfinite(lightning_log_decay(3, 0, 1)).all()  # a model of one layer


def test_retention_decays():
    want = np.log(1 - 2.0 ** (-5 - np.arange(6)))
    np.testing.assert_allclose(retention_log_decay(6), want, rtol=1e-6)


def test_step_size_is_clipped():
    x, bias = jnp.asarray([-50.0, 0, 4]), jnp.asarray([0.0, 0, 1])
    np.testing.assert_allclose(step_size(x, bias, (0.1, 3.0)), [0.1, np.log(2), 3.0], rtol=1e-6)
    np.testing.assert_allclose(
        step_size(x, bias), np.logaddexp(0, np.asarray(x, np.float64) + np.asarray(bias)), rtol=1e-6
    )
