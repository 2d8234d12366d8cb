"""Experts over eight devices: what one device computes, whatever the mesh, the way tokens travel and the load."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.layers.context import Context
from research.layers.moe import (
    BASERouter,
    Capacity,
    ExpertChoiceRouter,
    GShardRouter,
    HashRouter,
    MoE,
    MoEConfig,
    NoisyTopKRouter,
    RandomRouter,
    ReinforceRouter,
    SinkhornRouter,
    TopKRouter,
)
from research.ops.routing import reinforce
from research.sharding import expert_parallel
from research.sharding.expert_parallel import exchange_plan
from research.sharding.mesh import BATCH, MeshConfig, P, batch_sharding, make_mesh

B, T, D = 8, 32, 16
CONFIG = MoEConfig(
    experts=8, per_token=3, hidden=4, shared_hidden=4, shared_gate=True, slack=8.0, exchange="all_to_all",
    router=TopKRouter("sigmoid", top_groups=2), groups=4, bias_rate=1e-3, sequence_loss=0.1, device_loss=0.1,
    communication_loss=0.1,
)  # fmt: skip
CROWDED = dataclasses.replace(CONFIG, slack=1.0)
GLOBAL = MoEConfig(
    experts=8, per_token=2, hidden=4, shared_hidden=0, latent=8, biases=True, exchange="ring", chunks=2,
    router=ExpertChoiceRouter(scope="batch"), dispatch=Capacity(1.0, by="probability", scope="batch"),
)  # fmt: skip
NOISY = MoEConfig(
    experts=8, per_token=2, hidden=4, shared_hidden=0, router=NoisyTopKRouter(), load_loss=0.1, importance_loss=0.1,
    dispatch=Capacity(0.8, scope="batch"), exchange="padded", chunks=4,
)  # fmt: skip
_SMALL = functools.partial(
    MoEConfig, experts=8, per_token=2, hidden=4, shared_hidden=0, importance_loss=0.1, exchange="ring"
)
# The other routers: those of `scope` 'batch' gather the logits of the whole batch, the others look at a token or a row.
ROUTERS = {
    "top-k of an MLP's logits, jitter, quantile bias": _SMALL(
        router=TopKRouter(jitter=0.01), router_hidden=5, quantile_bias=True
    ),
    "GShard": _SMALL(router=GShardRouter()),
    "expert choice in a row": _SMALL(router=ExpertChoiceRouter()),
    "hash": _SMALL(router=HashRouter(vocabulary=9)),
    "Sinkhorn": _SMALL(router=SinkhornRouter(scope="batch")),
    "BASE": _SMALL(per_token=1, router=BASERouter(scope="batch")),
    "REINFORCE": _SMALL(per_token=1, router=ReinforceRouter()),
    "random": _SMALL(router=RandomRouter()),
}
MESHES = {
    "1x8": MeshConfig(1, expert=8),
    "2x4": MeshConfig(2, expert=4),
    "4x2": MeshConfig(4, expert=2),
    "8x1": MeshConfig(8),
    "1x4, tensor 2": MeshConfig(1, expert=4, tensor=2),
    "2x2, tensor 2": MeshConfig(2, expert=2, tensor=2),
    "4x1, tensor 2": MeshConfig(4, tensor=2),
    "fsdp 2 x2, tensor 2": MeshConfig(1, fsdp=2, expert=2, tensor=2),
}
QUICK = ("1x8", "1x4, tensor 2")


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """The ways that functions built during a test were made of, and whether what is sent fitted when they ran."""
    found = collections.Counter()
    fits = expert_parallel._fits

    def watched(*arguments):
        answer = fits(*arguments)
        jax.debug.callback(lambda answer: found.update(["fits" if answer else "does not fit"]), answer)
        return answer

    def traced(name, way):
        return lambda *arguments, **options: (found.update([name]), way(*arguments, **options))[1]

    for name in ("_padded", "_ring", "_in_pieces"):
        monkeypatch.setattr(expert_parallel, name, traced(name, getattr(expert_parallel, name)))
    monkeypatch.setattr(expert_parallel, "_fits", watched)
    return found


@functools.cache
def built(config, mesh_config=None):
    """A layer on a mesh, and its losses, outputs, statistics and gradients as one compiled function."""
    mesh = mesh_config and make_mesh(mesh_config)

    def on_mesh(function):
        def run(*arguments):
            with jax.set_mesh(mesh) if mesh else jax.set_mesh(jax.make_mesh((), ())):
                return function(*arguments)

        return run if mesh else function

    def make(key):
        layer = config.build(D, depth=1, rngs=nnx.Rngs(params=key), param_dtype=jnp.float32)
        return nnx.split(layer, nnx.Param, ...)

    graphdef, params, rest = on_mesh(jax.jit(make))(jax.random.key(0))

    @jax.jit
    def both(params, x_BTD, key):
        def loss(params, x_BTD):
            segment_ids_BT = jnp.broadcast_to(jnp.arange(T) < T - 5, (B, T)).astype(jnp.int32)
            token_ids_BT = jnp.arange(B * T).reshape(B, T) % 9
            if mesh:
                segment_ids_BT, token_ids_BT = jax.reshard((segment_ids_BT, token_ids_BT), P(BATCH))
            context = Context(
                jnp.zeros((B, T), jnp.int32), segment_ids_BT, token_ids_BT, None, key, deterministic=False
            )
            y_BTD, _, aux = nnx.merge(graphdef, params, rest)(x_BTD, None, context)
            if aux.policy is not None:
                reward_BT = -jnp.square(y_BTD).sum(-1)
                aux = dataclasses.replace(aux, policy=reinforce(aux.policy, reward_BT, axis=(-2, -1)))
            losses = config.losses(aux)
            return jnp.sum(jnp.square(y_BTD)) / (B * T) + sum(losses.values()), (y_BTD, aux, losses)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x_BTD)

    def call(params, x_BTD):
        x_BTD = jax.device_put(x_BTD, batch_sharding(mesh)) if mesh else x_BTD
        return both(params, x_BTD, jax.random.key(2))

    return on_mesh(call), params


def inputs():
    return jax.random.normal(jax.random.key(1), (B, T, D))


def skewed(params):
    """The router prefers experts 0, 1, 2 for every token: the first device's, where it holds as many."""
    params = jax.tree.map(lambda leaf: leaf, params)
    params["w_router_DE"].set_value(jnp.zeros_like(params["w_router_DE"][...]))
    return params


def compare(config, mesh_config, spoil=lambda params: params, on_mesh=None):
    call, params = built(config)
    expected = call(spoil(params), inputs())
    call, params = built(on_mesh or config, mesh_config)
    actual = call(spoil(params), inputs())
    pairs = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True)
    for (path, one), many in pairs:
        one, many = (np.asarray(leaf, np.float64) for leaf in (one, many))
        size, error = (np.sqrt(np.mean(np.square(leaf))) for leaf in (one, many - one))
        assert error <= 1e-5 * size, f"{jax.tree_util.keystr(path)}: {error} of {size}"
    jax.effects_barrier()
    return actual


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MESHES])
def test_every_mesh_equals_one_device(name, taken):
    (_, (y_BTD, _, _)), (gradients, dx_BTD) = compare(CONFIG, MESHES[name])
    assert jax.typeof(y_BTD).sharding.spec[0] == BATCH and jax.typeof(dx_BTD).sharding.spec[0] == BATCH
    _, params = built(CONFIG, MESHES[name])
    assert set(taken) == ({"_padded"} if MESHES[name].expert > 1 else set())
    specs = {
        "w_in_EDF": P("expert", ("fsdp", "tensor"), None),
        "w_out_EFD": P("expert", "tensor", "fsdp"),
        "w_shared_in_DF": P(("fsdp", "tensor"), None),
        "w_shared_out_FD": P("tensor", "fsdp"),
        "w_router_DE": P("fsdp", None),
    }
    for name_, spec in specs.items():
        assert jax.typeof(params[name_][...]).sharding.spec == spec
        assert jax.typeof(gradients[name_][...]).sharding.spec == spec
    shape = dict(
        zip(("expert", "fsdp", "tensor"), (MESHES[name].expert, MESHES[name].fsdp, MESHES[name].tensor), strict=True)
    )
    own = params["w_out_EFD"][...].addressable_shards[0].data.shape
    assert own == (8 // shape["expert"], 4 // shape["tensor"], D // shape["fsdp"])


@pytest.mark.parametrize("name", ["1x8", *(pytest.param(n, marks=pytest.mark.slow) for n in ("2x4", "1x4, tensor 2"))])
def test_nothing_is_dropped_when_every_token_wants_one_device(name, taken):
    (_, (y_BTD, statistics, _)), _ = compare(CONFIG, MESHES[name], skewed, on_mesh=CROWDED)
    assert taken["does not fit"] and not taken["fits"] and taken["_in_pieces"]
    assert statistics.dropped == 0 and (statistics.counts_E[:3] == B * (T - 5)).all()
    assert (jnp.abs(y_BTD[:, : T - 5]).max(-1) > 0).all()


def test_what_looks_at_the_whole_batch_sees_it_on_a_mesh():
    """Expert choice and capacity over the whole batch, by the ring, in chunks, from a latent space, with biases."""
    compare(GLOBAL, MESHES["fsdp 2 x2, tensor 2"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_on_a_mesh_equals_one_device(name):
    (_, (_, statistics, _)), _ = compare(ROUTERS[name], MESHES["2x4"])
    assert statistics.tokens == B * (T - 5) and statistics.dropped == 0


FOLLOWS = dataclasses.replace(CONFIG, groups=0, group_devices=2)


@pytest.mark.slow
def test_groups_follow_the_mesh():
    """Each pair of eight devices is one of the four groups that CONFIG names on one device."""
    compare(CONFIG, MESHES["1x8"], on_mesh=FOLLOWS)


def test_groups_are_of_a_device_a_host_or_a_rack():
    """Of 144 devices in hosts of four and racks of 72; and of fewer than a host has."""
    wide = functools.partial(MoEConfig, experts=288, groups=0, router=TopKRouter(top_groups=1))
    groups = {size: wide(group_devices=size).groups_over(144) for size in (1, 4, 72)}
    assert groups == {1: 144, 4: 36, 72: 2}
    reached = [wide(group_devices=size).exchange_plan(D, T, 144).devices_reached for size in (1, 4, 72)]
    assert reached[0] == 1 and 1 < reached[1] < reached[2] < 2  # two experts a token
    assert wide(group_devices=4).groups_over(2) == 1
    with pytest.raises(ValueError, match="group_devices must divide the 6 devices of the mesh's expert axis, got 4"):
        wide(group_devices=4).groups_over(6)


def test_groups_that_follow_the_mesh_are_one_on_one_device():
    """Trained on groups of its own, a model that is run on one device is limited to none; one that names them still is."""
    free = dataclasses.replace(CONFIG, router=TopKRouter("sigmoid"), communication_loss=0.0)
    layer = CONFIG.build(D, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.float32)

    @jax.jit
    def outputs(layer, x_BTD):
        found = []
        for config in (CONFIG, FOLLOWS, free):
            layer.config = config
            y_BTD, _, aux = layer(x_BTD, None, Context(jnp.zeros((B, T), jnp.int32)))
            found.append((y_BTD, aux.visits_G))
        return found

    (limited, visits_G), (followed, all_G), (unlimited, _) = outputs(layer, inputs())
    np.testing.assert_array_equal(followed, unlimited)
    assert np.abs(limited - followed).max() > 1e-3
    assert all_G.tolist() == [B * T] and len(visits_G) == 4 and visits_G.sum() <= 2 * B * T


@pytest.mark.slow
def test_noise_does_not_depend_on_the_mesh():
    _, (_, statistics, _) = compare(NOISY, MESHES["2x4"])[0]
    assert statistics.dropped > 0


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """``jax.lax.ragged_all_to_all`` by its definition, which XLA has no CPU code for."""
    me = jax.lax.axis_index(axis_name)
    everything = [jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)]
    row = jnp.arange(output.shape[0])
    for sender in range(input_offsets.shape[0]):
        rows, starts, sizes, places = (a[sender] for a in everything)
        index = row - places[me]
        mine = (index >= 0) & (index < sizes[me])
        output = jnp.where(mine[:, None], rows[jnp.clip(index + starts[me], 0, rows.shape[0] - 1)], output)
    return output


@pytest.mark.slow
def test_the_ragged_way(monkeypatch):
    monkeypatch.setattr(expert_parallel.jax.lax, "ragged_all_to_all", emulated)
    ragged = dataclasses.replace(CONFIG, exchange="ragged", slack=1.25, shared_hidden=0, shared_gate=False)
    compare(ragged, MESHES["2x4"])


def collective_bytes(config: MoEConfig):
    """Bytes of each kind of collective in a compiled forward pass on eight devices."""
    mesh = make_mesh(MESHES["1x8"])
    with jax.set_mesh(mesh):
        layer: MoE = jax.jit(lambda: config.build(D, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.float32))()
        x_BTD = jax.device_put(inputs(), batch_sharding(mesh))
        context = Context(jnp.zeros((B, T), jnp.int32))
        text = jax.jit(lambda layer, x: layer(x, None, context)[0]).lower(layer, x_BTD).compile().as_text()
    counted = collections.Counter()
    for shape, kind in re.findall(r"= (.*?) (all-to-all|all-gather|reduce-scatter)\(", text):
        for dims in re.findall(r"f32\[([\d,]+)\]", shape):
            counted[kind] += 4 * int(np.prod([int(n) for n in dims.split(",")]))
    return counted


@pytest.mark.slow
def test_device_limits_and_latents_save_bytes():
    wide = MoEConfig(experts=64, per_token=8, hidden=4, shared_hidden=0, groups=8, slack=1.0, exchange="padded")
    limited = dataclasses.replace(wide, router=TopKRouter(top_groups=2))
    latent = dataclasses.replace(wide, latent=D // 4)
    full, fewer, smaller = (collective_bytes(config)["all-to-all"] for config in (wide, limited, latent))
    plans = [config.exchange_plan(D, T, 8, itemsize=4) for config in (wide, limited, latent)]
    assert fewer < 0.5 * full
    np.testing.assert_allclose(fewer / full, plans[1].bytes["padded"] / plans[0].bytes["padded"], rtol=0.01)
    np.testing.assert_allclose(smaller / full, plans[2].bytes["padded"] / plans[0].bytes["padded"], rtol=0.01)
    # What a device sends to the seven others is seven eighths of the operands.
    np.testing.assert_allclose(full * 7 / 8, plans[0].bytes["padded"], rtol=0.01)


@pytest.mark.parametrize(("experts", "groups", "devices"), [(16, 8, 2), (16, 8, 4), (16, 4, 4), (16, 2, 8), (6, 3, 2)])
def test_the_byte_model_has_room_for_device_limited_routing(experts, groups, devices):
    """What it reckons with is at least what tokens reach whose two experts are anywhere in their best groups."""
    random = np.random.default_rng(0)
    router = TopKRouter(top_groups=2 if groups > 2 else 1)
    config = MoEConfig(experts=experts, per_token=2, groups=groups, router=router)
    wide, own = experts // groups, experts // devices
    reached = []
    for _ in range(2000):
        chosen_M = random.choice(groups, router.top_groups, replace=False)
        allowed = (chosen_M[:, None] * wide + np.arange(wide)).ravel()
        reached.append(len(set(random.choice(allowed, 2, replace=False) // own)))
    most = config.devices_reached(devices, groups)
    assert max(reached) <= most <= devices
    expected = config.exchange_plan(D, T, devices).devices_reached
    assert 0.98 * np.mean(reached) <= expected <= most
    if (experts, groups) == (16, 8):
        assert most == 2 and expert_parallel.devices_within_reach(16, devices, 8, 1) == 1


def test_the_byte_model_chooses():
    plan = functools.partial(exchange_plan, 4096, 7168, experts=256, itemsize=2)
    assert plan(per_token=8, devices=64).choice == "ragged"
    assert plan(per_token=8, devices=4).choice == "ragged" and plan(per_token=8, devices=4).padded_choice == "ring"
    assert plan(per_token=64, devices=2).choice == "ring"
    assert plan(per_token=8, devices=64, method="ring").choice == "ring"
    eight = plan(per_token=8, devices=64)
    four = plan(per_token=8, devices=64, devices_reached=4)
    assert four.devices_reached < 4 < 7 < eight.devices_reached < 8
    assert four.bytes["ragged"] < 0.55 * eight.bytes["ragged"] < eight.bytes["ring"] * 0.1
    assert "by ragged (padded where" in str(eight) and "MiB a device" in str(eight)
    with pytest.raises(ValueError, match="experts must divide over the 3 devices of the mesh's expert axis, got 256"):
        plan(per_token=8, devices=3)
    with pytest.raises(ValueError, match=r"method must be one of auto, .*, got 'fastest'"):
        plan(per_token=8, devices=4, method="fastest")
