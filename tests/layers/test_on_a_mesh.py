"""Every recurrent mixer on an explicit mesh, rows spread over devices, equals itself on one device."""

import chex
import jax
import numpy as np
import pytest

from research.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from tests.layers.test_layers import PACKED, RECURRENT, inputs, mixer_of, train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", RECURRENT)
def test_on_a_mesh(name):
    ids_BT = np.concatenate([PACKED, PACKED])
    x_BTD = np.concatenate([inputs(PACKED), inputs(PACKED)])
    want = train(mixer_of(name), x_BTD, ids_BT)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, batch_sharding(mesh))  # noqa: E731
        got = train(mixer_of(name), place(x_BTD), place(ids_BT))
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(want), atol=2e-5, rtol=1e-4)
