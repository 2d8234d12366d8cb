"""The layer: router logits, assignment, dispatch to the experts, what is shared, and what is reported."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from research.layers.context import Context, without_padding
from research.layers.moe.config import Dropless, MoEConfig
from research.layers.moe.experts import batch_shards, kept_experts, own_rows, run_experts, visits, whole_batch
from research.layers.moe.routers import (
    BASERouter,
    ExpertChoiceRouter,
    HashRouter,
    NoisyTopKRouter,
    RandomRouter,
    ReinforceRouter,
    Routed,
    RouterConstants,
    RouterInputs,
    TopKRouter,
    jittered,
    route_rows,
)
from research.layers.parameters import constant, normal, project, read
from research.ops import balancing, routing
from research.ops.dispatch import expert_capacity
from research.sharding.mesh import P, axis_size, batch_axes, declare, on_mesh, per_shard, placed


class RouterBias(nnx.Variable):
    """Added to the scores for the selection only; no gradient reaches it and only the training step writes it."""


class HashTable(nnx.Variable):
    """Experts of each token id (a HashRouter's); fixed."""


class NoiseSeed(nnx.Variable):
    """Tells the layers of a model apart when they draw at random; fixed."""


class MoE(nnx.Module):
    """Auxiliary: ``RouterStatistics``, sums over the whole batch."""

    def __init__(self, config: MoEConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        c, D, E, F, S = config, width, config.experts, config.hidden, config.shared_hidden
        gain, inner, gates = depth**-0.5, config.latent or width, config.activation.matrices
        self.config = config
        noisy = isinstance(c.router, NoisyTopKRouter) and not c.router.sigma
        # Routers compute in float32 whatever the rest does.
        if c.router_hidden:
            self.w_router_DF = normal(rngs, (D, c.router_hidden), jnp.float32, P("fsdp", None), fan_in=D)
            self.w_router_FE = normal(rngs, (c.router_hidden, E), jnp.float32, P("fsdp", None), fan_in=c.router_hidden)
        elif self._reads_logits:
            # Learned noise starts with noise alone, so that every expert is in use (Shazeer et al. 2017, appendix A).
            gain_in = 0.0 if noisy else 1.0
            self.w_router_DE = normal(rngs, (D, E), jnp.float32, P("fsdp", None), fan_in=D, gain=gain_in)
        self.b_router_E = constant(jnp.zeros(E), jnp.float32, P(None)) if c.router_bias else None
        self.w_noise_DE = constant(jnp.zeros((D, E)), jnp.float32, P("fsdp", None)) if noisy else None
        policy = isinstance(c.router, ReinforceRouter)
        self.w_baseline_D1 = constant(jnp.zeros((D, 1)), jnp.float32, P("fsdp", None)) if policy else None
        self.bias_E = RouterBias(jnp.zeros(E, jnp.float32), out_sharding=declare(P(None)))
        table_VK, seed = None, None
        if isinstance(c.router, HashRouter):
            draws_VE = jax.random.uniform(rngs.params(), (c.router.vocabulary, E))
            table_VK = jax.lax.top_k(draws_VE, c.per_token)[1].astype(jnp.int32)
            table_VK = HashTable(table_VK, out_sharding=declare(P(None, None)))
        if not isinstance(c.router, HashRouter) and (not isinstance(c.router, TopKRouter) or c.router.jitter):
            seed = NoiseSeed(jax.random.bits(rngs.params(), (), jnp.uint32), out_sharding=declare(P()))
        self.table_VK, self.seed = table_VK, seed
        # The expert's own axis may be split over the mesh, and so may its hidden width: gate and up side by side are
        # split along D where they rest and along F where they are used.
        self.w_in_EDF = normal(
            rngs, (E, inner, gates * F), param_dtype, P("expert", ("fsdp", "tensor"), None), fan_in=inner
        )
        self.w_out_EFD = normal(rngs, (E, F, inner), param_dtype, P("expert", "tensor", "fsdp"), fan_in=F, gain=gain)
        self.b_in_EF = constant(jnp.zeros((E, gates * F)), param_dtype, P("expert", None)) if c.biases else None
        self.b_out_ED = constant(jnp.zeros((E, inner)), param_dtype, P("expert", "fsdp")) if c.biases else None
        self.w_down_DL = normal(rngs, (D, c.latent), param_dtype, P("fsdp", None), fan_in=D) if c.latent else None
        self.w_up_LD = normal(rngs, (c.latent, D), param_dtype, P(None, "fsdp"), fan_in=c.latent) if c.latent else None
        w_in, w_out, b_in, b_out = None, None, None, None
        if S:
            w_in = normal(rngs, (D, gates * S), param_dtype, P(("fsdp", "tensor"), None), fan_in=D)
            w_out = normal(rngs, (S, D), param_dtype, P("tensor", "fsdp"), fan_in=S, gain=gain)
        if S and c.biases:
            b_in, b_out = (constant(jnp.zeros(n), param_dtype, P(None)) for n in (gates * S, D))
        self.w_shared_in_DF, self.w_shared_out_FD, self.b_shared_in_F, self.b_shared_out_D = w_in, w_out, b_in, b_out
        self.w_shared_gate_D1 = normal(rngs, (D, 1), param_dtype, P("fsdp", None), fan_in=D) if c.shared_gate else None

    @property
    def _reads_logits(self) -> bool:
        return not isinstance(self.config.router, HashRouter | RandomRouter)

    def __call__(self, x_BTD, state, context: Context):
        dtype = x_BTD.dtype
        x_BTD = without_padding(x_BTD, context)
        latent_BTD = None if self.w_down_DL is None else project(x_BTD, read(self.w_down_DL, dtype))
        batched = (x_BTD, latent_BTD, context.segment_ids_BT, self._token_ids(context), self._row_keys(x_BTD, context))
        weights, specs = self._expert_weights(dtype)
        (y_BTD, shared_BTD, terms), statistics = per_shard(
            self._local, batched, self._router_weights(), split=weights, split_specs=specs, summed=True
        )
        if self.w_up_LD is not None:
            y_BTD = project(y_BTD, read(self.w_up_LD, dtype))
        if shared_BTD is not None:
            if self.w_shared_gate_D1 is not None:
                shared_BTD = shared_BTD * jax.nn.sigmoid(project(x_BTD, read(self.w_shared_gate_D1, dtype)))
            y_BTD = y_BTD + shared_BTD
        return y_BTD, state, dataclasses.replace(statistics, policy=terms)

    def init_state(self, batch: int, max_length: int, dtype):
        return None

    def _token_ids(self, context):
        return context.token_ids_BT if isinstance(self.config.router, HashRouter) else None

    def _row_keys(self, x_BTD, context):
        """The bits of a key a row, so that what is drawn doesn't depend on how rows lie over devices."""
        if context.key is None or context.deterministic or self.seed is None:
            return None
        keys_B = jax.random.split(jax.random.fold_in(context.key, read(self.seed)), x_BTD.shape[0])
        return placed(jax.random.key_data(keys_B), P(batch_axes()))

    def _router_weights(self):
        names = (
            "w_router_DE",
            "w_router_DF",
            "w_router_FE",
            "b_router_E",
            "w_noise_DE",
            "w_baseline_D1",
            "bias_E",
            "table_VK",
        )
        held = {name: getattr(self, name, None) for name in names}
        return {name: None if variable is None else read(variable) for name, variable in held.items()}

    def _expert_weights(self, dtype):
        """Weights of the experts and the shared expert, and where each part belongs: the hidden width over 'tensor'."""
        gates = self.config.activation.matrices
        table = {
            "w_in": (self.w_in_EDF, P("expert", None, None, "tensor"), True),
            "w_out": (self.w_out_EFD, P("expert", "tensor", None), False),
            "b_in": (self.b_in_EF, P("expert", None, "tensor"), True),
            "b_out": (self.b_out_ED, P("expert", None), False),
            "shared_in": (self.w_shared_in_DF, P(None, None, "tensor"), True),
            "shared_out": (self.w_shared_out_FD, P("tensor", None), False),
            "shared_b_in": (self.b_shared_in_F, P(None, "tensor"), True),
            "shared_b_out": (self.b_shared_out_D, P(None), False),
        }
        values, specs = {}, {}
        for name, (variable, spec, hidden_last) in table.items():
            if variable is None:
                continue
            value = variable[...].astype(dtype)
            # Gate and up apart, so that a device holds the same part of both. Alone it reads the matrices as they are: of
            # others the backward pass would keep a copy.
            values[name] = value.reshape(*value.shape[:-1], gates, -1) if hidden_last and on_mesh() else value
            specs[name] = spec
        return values, specs

    def _local(self, batched, router, weights):
        """One device's rows: ((y, shared expert's output, policy terms), statistics)."""
        x_BTD, latent_BTD, segment_ids_BT, token_ids_BT, key_bits = batched
        c, B = self.config, x_BTD.shape[0]
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        mask_T = None if segment_ids_BT is None else segment_ids_BT.reshape(-1) > 0
        keys_B = None if key_bits is None else jax.random.wrap_key_data(key_bits)
        groups = c.groups_over(axis_size("expert"))
        read_TD = jittered(c.router, x_TD, keys_B).astype(jnp.float32)
        logits_TE = self._logits(read_TD, router)
        noise_TE = None if router["w_noise_DE"] is None else read_TD @ router["w_noise_DE"]
        token_ids_T = None if token_ids_BT is None else token_ids_BT.reshape(-1)
        routed = self._assign(
            RouterInputs(logits_TE, mask_T, noise_TE, token_ids_T, keys_B),
            RouterConstants(c.per_token, groups, router["bias_E"] if c.selection_bias else None, router["table_VK"]),
            B,
        )
        assignment = routed.assignment
        limited, live = self._limit(assignment, B)
        statistics = balancing.router_statistics(
            assignment,
            mask_T,
            dropped=self._wanted(assignment, mask_T) - visits(limited),
            smooth_load_TE=routed.smooth_load_TE,
            groups=groups,
            sequences=B if c.sequence_loss else None,
        )
        if isinstance(c.router, ExpertChoiceRouter):  # no token has a first choice
            statistics = dataclasses.replace(statistics, first_counts_E=statistics.counts_E)
        if c.quantile_bias:
            margins_EQ = balancing.quantile_margins(assignment.scores_TE, router["bias_E"], c.per_token, mask_T=mask_T)
            statistics = dataclasses.replace(statistics, margins_EQ=margins_EQ)
        terms = None
        if router["w_baseline_D1"] is not None:
            # The baseline watches the tokens without shaping them.
            baseline_T = (jax.lax.stop_gradient(read_TD) @ router["w_baseline_D1"])[:, 0]
            terms = routing.policy_terms(assignment, baseline_T, mask_T)
            terms = jax.tree.map(lambda leaf: leaf.reshape(B, -1), terms)
        inner_TD = x_TD if latent_BTD is None else latent_BTD.reshape(-1, latent_BTD.shape[-1])
        y_TD, shared_TD = run_experts(c, inner_TD, x_TD, limited, live, weights, groups)
        shared_BTD = None if shared_TD is None else shared_TD.reshape(x_BTD.shape)
        return (y_TD.reshape(*x_BTD.shape[:2], -1), shared_BTD, terms), statistics

    def _logits(self, x_TD, router):
        if not self._reads_logits:
            return jnp.zeros((x_TD.shape[0], self.config.experts), jnp.float32)
        if router["w_router_DF"] is not None:
            logits_TE = jax.nn.silu(x_TD @ router["w_router_DF"]) @ router["w_router_FE"]
        else:
            logits_TE = x_TD @ router["w_router_DE"]
        return logits_TE if router["b_router_E"] is None else logits_TE + router["b_router_E"]

    def _assign(self, inputs: RouterInputs, constants: RouterConstants, rows: int) -> Routed:
        router, drawing = self.config.router, inputs.key is not None
        if router.per_row(drawing):
            return route_rows(router, inputs, constants, rows)
        whole = getattr(router, "scope", "row") == "batch" and (drawing or isinstance(router, ExpertChoiceRouter))
        if not whole or batch_shards() == 1:
            return router.route(inputs, constants)
        # What one device would see: every device routes the whole batch and keeps its own rows.
        tokens = inputs.logits_TE.shape[0]
        everywhere = inputs._replace(logits_TE=whole_batch(inputs.logits_TE), mask_T=whole_batch(inputs.mask_T))
        assignment = router.route(everywhere, constants).assignment
        return Routed(routing.slice_tokens(assignment, jax.lax.axis_index(batch_axes()) * tokens, tokens))

    def _wanted(self, assignment, mask_T):
        """Visits before any is dropped: BASE's auction may leave tokens over, which other routers' choices don't."""
        if not isinstance(self.config.router, BASERouter):
            return visits(assignment)
        return jnp.asarray(assignment.tokens, jnp.int32) if mask_T is None else mask_T.sum(dtype=jnp.int32)

    def _limit(self, assignment, rows: int):
        """The assignment after capacity, and how many visits may be left of it."""
        c, d = self.config, self.config.dispatch
        if isinstance(d, Dropless):
            return assignment, None
        assignment = routing.as_token_choice(assignment)
        tokens, experts = assignment.tokens, assignment.experts
        expert_TK, weight_TK = (a.reshape(tokens, -1) for a in (assignment.expert_A, assignment.weight_A))
        weight_TK = jax.lax.stop_gradient(weight_TK)
        if d.scope == "row":
            capacity = expert_capacity(tokens // rows * c.per_token, experts, d.factor)
            by_row = [a.reshape(rows, tokens // rows, -1) for a in (expert_TK, weight_TK)]
            kept_A = jax.vmap(lambda e, w: kept_experts(e, w, experts, capacity, d.by))(*by_row).reshape(-1)
            live = rows * experts * capacity
        else:
            every_TK = whole_batch(expert_TK)
            capacity = expert_capacity(every_TK.shape[0] * c.per_token, experts, d.factor)
            kept_A = kept_experts(every_TK, whole_batch(weight_TK), experts, capacity, d.by)
            kept_A = own_rows(kept_A, expert_TK.size)
            live = experts * capacity
        weight_A = jnp.where(kept_A < experts, assignment.weight_A, 0)
        return dataclasses.replace(assignment, expert_A=kept_A, weight_A=weight_A), live
