"""Upcycled models: the dense model's outputs at step 0, and what differs afterwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.layers.mlp import MLPConfig
from research.layers.moe import Capacity, GShardRouter, MoEConfig, TopKRouter
from research.models.config import ModelConfig, MTPConfig, Residual
from research.models.multi_token import multi_token_sums
from research.models.upcycling import upcycle
from tests.models.small import small_model

DENSE = ModelConfig(
    vocab_size=17,
    width=12,
    branches=(Residual("mlp", MLPConfig(8)), Residual("other", MLPConfig(6))),
    pattern=("mlp", "other"),
    repeats=2,
)
TOKENS_BT = jnp.arange(10).reshape(2, 5)


def logits(model):
    return np.asarray(jax.jit(lambda model: model(TOKENS_BT).logits_BTV)(model))


@pytest.mark.parametrize(("active", "granularity"), [(1, 1), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_an_upcycled_model_computes_what_the_dense_one_did(active, granularity):
    dense = small_model(DENSE)
    model = upcycle(dense, ["mlp"], copies=3, active=active, granularity=granularity)
    mixer = model.config.branches[0].mixer
    assert (mixer.experts, mixer.per_token, mixer.hidden) == (3 * granularity, active * granularity, 8 // granularity)
    assert model.config.branches[1] == DENSE.branches[1]
    np.testing.assert_allclose(logits(model), logits(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("active", "router"),
    [(2, TopKRouter("sigmoid", scale=2.5)), (1, TopKRouter("softmax_after", scale=0.5, weight_on="input"))],
)
def test_whatever_the_router_multiplies(active, router):
    dense = small_model(DENSE)
    model = upcycle(dense, ["mlp"], copies=3, active=active, granularity=2, like=MoEConfig(router=router))
    assert model.config.branches[0].mixer.router == dataclasses.replace(router, scale=2 * router.scale)
    np.testing.assert_allclose(logits(model), logits(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_heads_ahead_come_along():
    """With an MLP that is left as it is, and one that is made a mixture too."""
    dense = small_model(dataclasses.replace(DENSE, repeats=1, mtp=MTPConfig(("other", "mlp"), depth=2, shared=True)))

    @jax.jit
    def nats(model):
        hidden_BTD, _, _ = model.hidden(TOKENS_BT)
        everything_BT, positions_BT = jnp.ones_like(TOKENS_BT), jnp.broadcast_to(jnp.arange(5), (2, 5))
        ids = (TOKENS_BT, jnp.roll(TOKENS_BT, -1, 1), everything_BT > 0, everything_BT, positions_BT)
        return multi_token_sums(model, hidden_BTD, *ids)[0].nats_N

    model = upcycle(dense, ["mlp"], copies=2, granularity=2)
    assert model.mtp.heads[0].unit.branches[1].mixer.config.experts == 4
    np.testing.assert_allclose(nats(model), nats(dense), rtol=1e-5)


@pytest.mark.slow
def test_noise_sets_the_copies_apart():
    dense = small_model(DENSE)
    model = upcycle(dense, ["mlp"], copies=2, noise=0.5, like=MoEConfig(dispatch=Capacity(4.0)))
    w_LEFD = model.stages[0].branches[0].mixer.w_out_EFD[...]
    original_LFD = dense.stages[0].branches[0].mixer.w_out_FD[...]
    for copy in range(2):
        apart = jnp.std(w_LEFD[:, copy] - original_LFD) / jnp.sqrt(jnp.mean(jnp.square(original_LFD)))
        assert 0.3 < apart < 0.7
    assert np.abs(logits(model) - logits(dense)).max() > 1e-3


def test_what_cannot_be_upcycled():
    dense = small_model(DENSE)
    with pytest.raises(ValueError, match="names must name MLPs, got 'attention', which is no branch"):
        upcycle(dense, ["attention"], copies=2)
    with pytest.raises(ValueError, match="granularity must divide the hidden width 8 of 'mlp', got 3"):
        upcycle(dense, ["mlp"], copies=2, granularity=3)
    with pytest.raises(ValueError, match="active must be from 1 to the 2 copies, got 3"):
        upcycle(dense, ["mlp"], copies=2, active=3)
    like = MoEConfig(router=TopKRouter(weight_on="input"))
    with pytest.raises(ValueError, match=r"active must be 1 where like.router weights inputs, .*; got 2"):
        upcycle(dense, ["mlp"], copies=2, active=2, like=like)
    like = dataclasses.replace(MoEConfig(), router=GShardRouter())
    with pytest.raises(ValueError, match="must be a TopKRouter whose weights are renormalised"):
        upcycle(dense, ["mlp"], copies=2, like=like)
