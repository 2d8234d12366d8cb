"""Routed attention against its definition, token by token and head by head; cached and packed."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.config import from_json, to_json
from research.layers.context import Context
from research.layers.moe import TopKRouter
from research.layers.routed_attention import RoutedAttentionConfig
from research.models.auxiliaries import Auxiliaries, auxiliary_losses
from research.models.config import ModelConfig, Residual
from research.models.language_model import LanguageModel
from research.sharding.mesh import MeshConfig, batch_sharding, make_mesh

B, T, D = 2, 7, 8
CONFIG = RoutedAttentionConfig(experts=4, per_token=2, heads=4, key_heads=2, head_width=6, rotary_fraction=0.0)
IDS_BT = np.array([[1, 1, 1, 2, 2, 2, 0], [0, 3, 3, 3, 0, 3, 3]], np.int32)


@functools.cache
def layer():
    shapes = jax.eval_shape(lambda: CONFIG.build(D, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.float32))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.6 * random.normal(size=leaf.shape), leaf.dtype), shapes)


@jax.jit
def call(layer, x_BTD, positions_BT, ids_BT=None, state=None, cached_B=None):
    return layer(x_BTD, state, Context(positions_BT, ids_BT, None, cached_B))


def inputs():
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    return jax.random.normal(jax.random.key(1), (B, T, D)), positions_BT


def test_equals_the_definition():
    x_BTD, positions_BT = inputs()
    y_BTD, _, statistics = call(layer(), x_BTD, positions_BT, jnp.asarray(IDS_BT))
    w = {name: np.asarray(value[...], np.float64) for name, value in vars(layer()).items() if name.startswith("w_")}
    x = np.asarray(x_BTD, np.float64)
    k, v = np.split(x @ w["w_kv_DN"], 2, axis=-1)
    k, v = (n.reshape(B, T, 2, 6) for n in (k, v))
    for b in range(B):
        for t in range(T):
            expected = np.zeros(D)
            if IDS_BT[b, t]:
                logits = x[b, t] @ w["w_router_DE"]
                chosen = np.argsort(-logits)[:2]
                seen = [s for s in range(t + 1) if IDS_BT[b, s] == IDS_BT[b, t]]
                for e in chosen:
                    heads = (x[b, t] @ w["w_q_EDN"][e]).reshape(4, 6)
                    out = []
                    for h, q in enumerate(heads):
                        scores = np.array([q @ k[b, s, h // 2] for s in seen]) * 6**-0.5
                        p = np.exp(scores - scores.max())
                        out.append((p / p.sum()) @ np.stack([v[b, s, h // 2] for s in seen]))
                    weight = np.exp(logits[e]) / np.exp(logits[chosen]).sum()
                    expected += weight * (np.concatenate(out) @ w["w_out_END"][e])
            np.testing.assert_allclose(y_BTD[b, t], expected, atol=2e-5)
    assert statistics.counts_E.sum() == 2 * (IDS_BT > 0).sum()


@pytest.mark.slow
def test_a_cached_call_goes_on():
    x_BTD, positions_BT = inputs()
    whole, none, _ = call(layer(), x_BTD, positions_BT)
    assert none is None
    state, parts = layer().init_state(B, T, jnp.float32), []
    for start, stop in ((0, 4), (4, 5), (5, T)):
        cut = slice(start, stop)
        y, state, _ = call(layer(), x_BTD[:, cut], positions_BT[:, cut], None, state, jnp.full(B, start))
        parts.append(y)
    chex.assert_trees_all_close(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


@pytest.mark.slow
def test_gradients_on_a_mesh():
    """Finite, and the same on four devices, experts and heads split over them at rest."""
    x_BTD, positions_BT = inputs()

    def gradients(layer, x_BTD, positions_BT):
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

        def loss(params, x_BTD):
            y_BTD, _, aux = nnx.merge(graphdef, params, rest)(x_BTD, None, Context(positions_BT))
            return jnp.mean(jnp.square(y_BTD)) + sum(CONFIG.losses(aux).values())

        return jax.grad(loss, argnums=(0, 1))(params, x_BTD)

    expected = jax.jit(gradients)(layer(), x_BTD, positions_BT)
    mesh = make_mesh(MeshConfig(1, expert=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        spread = jax.device_put((x_BTD, positions_BT), batch_sharding(mesh))
        split = jax.device_put(layer(), jax.NamedSharding(mesh, jax.P()))
        actual = jax.jit(gradients)(split, *spread)
    chex.assert_tree_all_finite(expected)
    for one, many in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)


def test_a_preset_may_ask_for_it():
    """As a token mixer of a model: its configuration as JSON and by override, its losses in the model's."""
    own = RoutedAttentionConfig(experts=2, per_token=1, heads=1, key_heads=1, head_width=4, rotary_fraction=0.0)
    config = ModelConfig(11, D, (Residual("heads", own),), ("heads",), repeats=2)
    assert from_json(ModelConfig, to_json(config)) == config
    tokens_BT = jnp.zeros((B, T), jnp.int32)

    def losses():
        model = LanguageModel(config, rngs=nnx.Rngs(params=0))
        return auxiliary_losses(model, Auxiliaries(model(tokens_BT).aux))

    assert set(jax.eval_shape(losses)) == {"balance_loss", "z_loss"}
    low = dataclasses.replace(config, dtype="bfloat16")
    with pytest.warns(UserWarning, match="routed attention computed in bfloat16 is known to diverge"):
        jax.eval_shape(lambda: LanguageModel(low, rngs=nnx.Rngs(params=0))(tokens_BT).logits_BTV)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="per_token must be from 1 to the 4 experts, got 5"):
        RoutedAttentionConfig(experts=4, per_token=5)
    with pytest.raises(ValueError, match="heads must be a multiple of key_heads, got 3 over 2"):
        RoutedAttentionConfig(heads=3)
    with pytest.raises(ValueError, match=r"router\.weight_on must be 'output' for heads, got 'input'"):
        RoutedAttentionConfig(router=TopKRouter(weight_on="input"))
    assert "Unstable" in str(RoutedAttentionConfig.__doc__)
