"""The mixture of experts as a layer: every router with every dispatch, what experts are made of, what is reported."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.config import ConfigError, from_json, override, to_json
from research.layers.context import Context
from research.layers.moe import (
    Activation,
    BASERouter,
    Capacity,
    Dropless,
    ExpertChoiceRouter,
    GShardRouter,
    HashRouter,
    MoEConfig,
    NoisyTopKRouter,
    RandomRouter,
    ReinforceRouter,
    SinkhornRouter,
    TopKRouter,
)

B, T, D = 2, 8, 12
SMALL = MoEConfig(experts=4, per_token=2, hidden=6, shared_hidden=0)
ONE = dataclasses.replace(SMALL, per_token=1)
# Every router, each with its own balance: what stands in one line is compiled once.
CONFIGS = {
    "top_k, sigmoid, groups, bias, sequence loss": dataclasses.replace(
        SMALL, router=TopKRouter("sigmoid", top_groups=1, group_score="top2", scale=2.5), groups=2, bias_rate=1e-3,
        sequence_loss=1e-4, device_loss=0.05, communication_loss=0.02,
    ),
    "top_k, jitter, straight sum, quantile bias": dataclasses.replace(
        SMALL, router=TopKRouter(gated=False, jitter=0.01), quantile_bias=True
    ),
    "top_k on the input, mlp router with bias": dataclasses.replace(
        ONE, router=TopKRouter("sigmoid", renormalise=False, weight_on="input"), router_hidden=5, router_bias=True
    ),
    "noisy, importance and load": dataclasses.replace(
        SMALL, router=NoisyTopKRouter(), importance_loss=0.1, load_loss=0.1
    ),
    "noisy as in V-MoE": dataclasses.replace(
        SMALL, router=NoisyTopKRouter(0.25, "softmax"), importance_loss=0.1, importance_of="probabilities", load_loss=0.1
    ),
    "gshard": dataclasses.replace(SMALL, router=GShardRouter("sample")),
    "expert choice": dataclasses.replace(SMALL, router=ExpertChoiceRouter(scope="batch")),
    "hash": dataclasses.replace(SMALL, router=HashRouter(vocabulary=9)),
    "sinkhorn": dataclasses.replace(ONE, router=SinkhornRouter()),
    "base": dataclasses.replace(ONE, router=BASERouter(scope="batch")),
    "reinforce": dataclasses.replace(ONE, router=ReinforceRouter()),
    "random": dataclasses.replace(SMALL, router=RandomRouter()),
}  # fmt: skip


@functools.cache
def made(config):
    """The layer with every parameter random."""

    @jax.jit
    def make(key):
        layer = config.build(D, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.float32)
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        return nnx.merge(graphdef, jax.tree.unflatten(structure, noisy), rest)

    return make(jax.random.key(1))


def inputs():
    return jax.random.normal(jax.random.key(2), (B, T, D))


def context(key=None, **fields):
    token_ids_BT = jnp.arange(B * T).reshape(B, T) % 9
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    return Context(positions_BT, None, token_ids_BT, None, key, deterministic=key is None, **fields)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "V-MoE" in n else n for n in CONFIGS])
def test_every_router_with_every_dispatch(name):
    """Sorted rows equal the one-hot definition in outputs and gradients, without and with a capacity; in training."""
    layer = made(CONFIGS[name])
    graphdef, params, variables = nnx.split(layer, nnx.Param, ...)
    tight = functools.partial(Capacity, factor=0.5, by="probability")

    def loss(params, x_BTD, dispatch):
        layer = nnx.merge(graphdef, params, variables)
        layer.config = dataclasses.replace(layer.config, dispatch=dispatch)
        y_BTD, _, aux = layer(x_BTD, None, context(jax.random.key(3)))
        losses = layer.config.losses(aux)
        return jnp.sum(jnp.sin(y_BTD)) + sum(losses.values()), (y_BTD, aux, losses)

    @jax.jit
    def every(params, x_BTD):
        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        forms = [gradient(params, x_BTD, tight(form=form)) for form in ("sorted", "one_hot")]
        return *forms, loss(params, x_BTD, Dropless()), loss(params, x_BTD, Dropless("one_hot"))

    limited, limited_by_definition, dropless, dropless_by_definition = every(params, inputs())
    for ours, definition in ((dropless, dropless_by_definition), (limited, limited_by_definition)):
        chex.assert_trees_all_close(ours, definition, rtol=1e-4, atol=1e-5)
        chex.assert_tree_all_finite(ours)
    _, (_, statistics, losses) = dropless
    assert statistics.tokens == B * T and statistics.dropped == 0
    assert 0 < statistics.counts_E.sum() <= B * T * layer.config.per_token
    assert all(value >= 0 for name, value in losses.items() if name != "policy_loss")
    (_, (_, cut, _)), _ = limited
    assert cut.dropped >= statistics.counts_E.sum() // 2
    np.testing.assert_array_equal(cut.counts_E, statistics.counts_E)


def call(layer, x_BTD, key=None):
    return jax.jit(lambda x_BTD: layer(x_BTD, None, context(key))[0])(x_BTD)


def test_randomness_comes_from_the_key():
    layer, x_BTD = made(CONFIGS["random"]), inputs()
    seen = [np.asarray(call(layer, x_BTD, key)) for key in (jax.random.key(0), jax.random.key(0), jax.random.key(1))]
    np.testing.assert_array_equal(seen[0], seen[1])
    assert np.abs(seen[0] - seen[2]).max() > 1e-3
    np.testing.assert_array_equal(call(layer, x_BTD), call(layer, x_BTD))


def test_what_an_auction_leaves_over_is_dropped():
    """Of six equal tokens of a row, one round places an expert's share: two of them."""
    config = dataclasses.replace(ONE, router=BASERouter(max_rounds=1))
    layer = made(config)
    segment_ids_BT = jnp.broadcast_to(jnp.arange(T) < T - 2, (B, T)).astype(jnp.int32)
    here = dataclasses.replace(context(jax.random.key(0)), segment_ids_BT=segment_ids_BT, deterministic=False)
    _, _, aux = jax.jit(lambda layer, x: layer(x, None, here))(layer, jnp.ones((B, T, D)))
    assert aux.counts_E.sum() == B * 2 and aux.dropped == B * (T - 2 - 2)


def test_only_capacity_makes_a_token_depend_on_its_row():
    """The last token's output, with the tokens before it alike to it (they want its experts) and not."""
    x_BTD = inputs()
    crowd_BTD = jnp.broadcast_to(x_BTD[:, -1:], x_BTD.shape)
    dropless = made(dataclasses.replace(SMALL, activation=Activation("relu2")))
    limited = nnx.merge(*nnx.split(dropless))
    limited.config = dataclasses.replace(dropless.config, dispatch=Capacity(0.5))
    chex.assert_trees_all_close(call(dropless, crowd_BTD)[:, -1], call(dropless, x_BTD)[:, -1], atol=1e-5)
    assert not call(limited, crowd_BTD)[:, -1].any()
    assert call(limited, x_BTD)[:, 0].any()


def test_latent_experts_biases_and_clamps_by_hand():
    """One token at a time in NumPy: a GPT-OSS expert in a latent space beside a gated shared expert."""
    config = MoEConfig(
        experts=4, per_token=2, hidden=6, shared_hidden=5, shared_gate=True, latent=7, biases=True,
        activation=Activation(limit=0.5, alpha=1.702, shift=1.0), router=TopKRouter("softmax_after"), router_bias=True,
    )  # fmt: skip
    layer, x_BTD = made(config), inputs()
    w = {
        name: np.asarray(value[...], np.float64) for name, value in vars(layer).items() if isinstance(value, nnx.Param)
    }

    def expert(x, w_in, b_in, w_out, b_out):
        gate, up = np.split(x @ w_in + b_in, 2)
        gate, up = np.minimum(gate, 0.5), np.clip(up, -0.5, 0.5)
        return (gate / (1 + np.exp(-1.702 * gate)) * (up + 1)) @ w_out + b_out

    expected = np.zeros((B, T, D))
    for b in range(B):
        for t in range(T):
            x = np.asarray(x_BTD[b, t], np.float64)
            logits = x @ w["w_router_DE"] + w["b_router_E"]
            chosen = np.argsort(-logits)[:2]
            weights = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
            latent = x @ w["w_down_DL"]
            parts = [
                expert(latent, *(w[n][e] for n in ("w_in_EDF", "b_in_EF", "w_out_EFD", "b_out_ED"))) for e in chosen
            ]
            shared = expert(
                x, *(w[n] for n in ("w_shared_in_DF", "b_shared_in_F", "w_shared_out_FD", "b_shared_out_D"))
            )
            opened = 1 / (1 + np.exp(-x @ w["w_shared_gate_D1"]))
            expected[b, t] = (weights @ parts) @ w["w_up_LD"] + opened * shared
    np.testing.assert_allclose(call(layer, x_BTD), expected, rtol=1e-4, atol=1e-5)
    assert config.flops(D, 1.0) == 2 * (3 * 7 * 2 * 6 + 2 * D * 7 + 3 * D * 5 + D + D * 4)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_survive_json_and_overrides(name):
    config = CONFIGS[name]
    assert from_json(MoEConfig, to_json(config)) == config
    bare = override(dataclasses.replace(SMALL, per_token=config.per_token), f"router={type(config.router).__name__}")
    assert bare.router == type(config.router)()


def test_overrides_reach_into_routers():
    config = override(override(SMALL, "router.score=sigmoid"), "dispatch=Capacity")
    assert config.router == TopKRouter("sigmoid") and config.dispatch == Capacity()
    assert override(config, "dispatch.factor=2").dispatch == Capacity(2.0)
    with pytest.raises(ConfigError, match="per_token must be 1 for a ReinforceRouter, got 2"):
        override(SMALL, "router=ReinforceRouter")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"per_token": 3, "router": GShardRouter()}, "per_token must be 2 for a GShardRouter, got 3"),
        ({"per_token": 1, "router": HashRouter(0)}, "router.vocabulary must be at least 1, got 0"),
        ({"groups": 3}, "groups must divide the 4 experts"),
        ({"groups": 2, "per_token": 3, "router": TopKRouter(top_groups=1)}, "per_token must fit router.top_groups=1 of 2"),
        ({"groups": 2, "router": TopKRouter(top_groups=3)}, "router.top_groups must be at most groups, 2, got 3"),
        ({"router": GShardRouter(), "bias_rate": 0.1}, "need a TopKRouter, got a GShardRouter"),
        ({"quantile_bias": True, "bias_rate": 0.1}, "bias_rate must be 0 with quantile_bias, got 0.1"),
        ({"communication_loss": 0.1}, "router.top_groups must be at least 1, got 0"),
        ({"device_loss": 0.1}, "groups must be 0 or at least 2, got 1"),
        ({"load_loss": 0.1}, "load_loss needs a NoisyTopKRouter, got a TopKRouter"),
        ({"slack": 0.5}, "slack must be at least 1, got 0.5"),
        ({"latent": -1}, "latent must be at least 0, got -1"),
        ({"chunks": 0}, "chunks must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_what_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **fields)
    with pytest.raises(ValueError, match="factor must be positive, got 0"):
        Capacity(0.0)
    with pytest.raises(ValueError, match="'relu2' has no gate"):
        Activation("relu2", limit=7.0)
