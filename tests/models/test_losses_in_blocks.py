"""The loss of many logits is taken a block of tokens at a time: the same value and gradients, on a mesh too."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.models import language_model
from research.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from tests.models.small import CONFIG

B, T = 4, 6


@pytest.mark.parametrize("on_mesh", [False, True])
def test_in_blocks_is_at_once(on_mesh, monkeypatch):
    r = np.random.default_rng(0)
    x = r.standard_normal((B, T, CONFIG.width)).astype(np.float32)
    targets, mask = r.integers(0, CONFIG.vocab_size, (B, T)).astype(np.int32), r.random((B, T)) < 0.7
    mesh = make_mesh(MeshConfig(2, 2), jax.devices()[:4]) if on_mesh else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        model = language_model.LanguageModel(CONFIG, rngs=nnx.Rngs(0))
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        batch = jax.device_put((x, targets, mask), batch_sharding(mesh) if mesh else jax.devices()[0])

        def loss(params, x_BTD, targets_BT, mask_BT):
            nats, count = nnx.merge(graphdef, params, rest).cross_entropy(x_BTD, targets_BT, mask_BT)
            return nats / count, count

        at_once = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, *batch)
        monkeypatch.setattr(language_model, "_LOGITS", 0)
        in_blocks = jax.jit(jax.value_and_grad(lambda *a: loss(*a), (0, 1), has_aux=True))(params, *batch)
    close = lambda a, b: np.testing.assert_allclose(jnp.asarray(a), jnp.asarray(b), rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, at_once, in_blocks)
