"""Configurations of routers: each names a function of ``research.ops.routing`` and its options."""

import dataclasses
from typing import Literal, NamedTuple

import jax

from research.axes import Array
from research.ops import routing
from research.ops.routing import Assignment, GroupLimit


class RouterInputs(NamedTuple):
    """What routers read, of some tokens: the batch's, or one row's.

    Attributes:
      logits_TE: float32.
      mask_T: False at padding; None where there is none.
      noise_logits_TE: of a router that learns its noise; else None.
      token_ids_T: of a router that hashes them; else None.
      key: for routers that draw at random; None where the call is deterministic.
    """

    logits_TE: Array
    mask_T: Array | None = None
    noise_logits_TE: Array | None = None
    token_ids_T: Array | None = None
    key: Array | None = None


class RouterConstants(NamedTuple):
    """What routers read that is the same for all tokens: the selection bias, the hash table, groups of experts."""

    per_token: int
    groups: int = 1
    bias_E: Array | None = None
    table_VK: Array | None = None


class Routed(NamedTuple):
    assignment: Assignment
    smooth_load_TE: Array | None = None


Scope = Literal["row", "batch"]


@dataclasses.dataclass(frozen=True)
class TopKRouter:
    """Token choice (``routing.top_k``, which explains score, renormalise, gated, scale and weight_on).

    Attributes:
      top_groups: how many of the layer's ``groups`` of experts a token may visit (device-limited routing); 0 for all.
      group_score: by which a token ranks them: DeepSeek-V2's 'max' or V3's 'top2'.
      jitter: router inputs times U(1 ± jitter) in training (Switch: 0.01).
    """

    score: Literal["softmax", "softmax_after", "sigmoid"] = "softmax"
    renormalise: bool = True
    gated: bool = True
    scale: float = 1.0
    weight_on: Literal["output", "input"] = "output"
    top_groups: int = 0
    group_score: Literal["max", "top2"] = "max"
    jitter: float = 0.0

    def check(self, experts: int, per_token: int, groups: int) -> None:
        if self.top_groups > groups > 0:
            raise ValueError(f"router.top_groups must be at most groups, {groups}, got {self.top_groups}")
        if self.top_groups and groups and per_token > self.top_groups * (experts // groups):
            raise ValueError(
                f"per_token must fit router.top_groups={self.top_groups} of {groups} groups of the {experts} experts, "
                f"got {per_token}"
            )

    def per_row(self, drawing: bool) -> bool:
        return False

    def route(self, inputs: RouterInputs, constants: RouterConstants) -> Routed:
        limited = 0 < self.top_groups < constants.groups
        limit = GroupLimit(constants.groups, self.top_groups, self.group_score) if limited else None
        return Routed(self.choose(inputs.logits_TE, constants.per_token, constants.bias_E, inputs.mask_T, limit))

    def choose(self, logits_TE, per_token: int, bias_E, mask_T, group_limit: GroupLimit | None = None) -> Assignment:
        return routing.top_k(
            logits_TE,
            per_token,
            score=self.score,
            renormalise=self.renormalise,
            gated=self.gated,
            scale=self.scale,
            bias_E=bias_E,
            group_limit=group_limit,
            mask_T=mask_T,
            weight_on=self.weight_on,
        )


@dataclasses.dataclass(frozen=True)
class NoisyTopKRouter:
    """Noisy top-k gating (``routing.noisy_top_k``). Training draws noise and evaluation does not, so that experts only
    noise reached go unused then.

    Attributes:
      sigma: standard deviation of the noise (V-MoE: 1/experts); 0 learns it for each token and expert (Shazeer).
      score: weights are a softmax over what is chosen ('softmax_after', Shazeer) or over all experts ('softmax', V-MoE).
    """

    sigma: float = 0.0
    score: Literal["softmax_after", "softmax"] = "softmax_after"
    weight_on: Literal["output", "input"] = "output"

    def check(self, experts: int, per_token: int, groups: int) -> None:
        if self.sigma < 0:
            raise ValueError(f"router.sigma must be at least 0, got {self.sigma}")

    def per_row(self, drawing: bool) -> bool:
        return drawing

    def route(self, inputs: RouterInputs, constants: RouterConstants) -> Routed:
        assignment, smooth_load_TE = routing.noisy_top_k(
            inputs.logits_TE,
            constants.per_token,
            inputs.key,
            noise_logits_TE=None if self.sigma else inputs.noise_logits_TE,
            sigma=self.sigma or None,
            score=self.score,
            mask_T=inputs.mask_T,
            weight_on=self.weight_on,
        )
        return Routed(assignment, smooth_load_TE)


@dataclasses.dataclass(frozen=True)
class GShardRouter:
    """Two experts, the second by chance (``routing.gshard_top2``); its balance loss takes f from first choices."""

    second: Literal["threshold", "sample"] = "threshold"

    def check(self, experts: int, per_token: int, groups: int) -> None:
        if per_token != 2:
            raise ValueError(f"per_token must be 2 for a GShardRouter, got {per_token}")

    def per_row(self, drawing: bool) -> bool:
        return drawing

    def route(self, inputs: RouterInputs, constants: RouterConstants) -> Routed:
        return Routed(routing.gshard_top2(inputs.logits_TE, inputs.key, second=self.second, mask_T=inputs.mask_T))


@dataclasses.dataclass(frozen=True)
class ExpertChoiceRouter:
    """Each expert takes its best tokens (``routing.expert_choice``), tokens·per_token/experts of them, among those of a
    row or of the whole batch. A token's experts depend on later tokens: don't expect of a causal model trained so that
    it decodes as it was trained.
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    scope: Scope = "row"

    def check(self, experts: int, per_token: int, groups: int) -> None:
        pass

    def per_row(self, drawing: bool) -> bool:
        return self.scope == "row"

    def route(self, inputs: RouterInputs, constants: RouterConstants) -> Routed:
        tokens, experts = inputs.logits_TE.shape
        capacity = min(tokens, max(1, round(tokens * constants.per_token / experts)))
        return Routed(routing.expert_choice(inputs.logits_TE, capacity, score=self.score, mask_T=inputs.mask_T))


@dataclasses.dataclass(frozen=True)
class HashRouter:
    """The token's id decides (``routing.by_token_id``), by a random table drawn at initialisation; write a
    ``routing.balanced_table`` over the layer's ``table_VK`` to balance by frequency. ``vocabulary`` is the model's."""

    vocabulary: int = 256

    def check(self, experts: int, per_token: int, groups: int) -> None:
        if self.vocabulary < 1:
            raise ValueError(f"router.vocabulary must be at least 1, got {self.vocabulary}")

    def per_row(self, drawing: bool) -> bool:
        return False

    def route(self, inputs: RouterInputs, constants: RouterConstants) -> Routed:
        if inputs.token_ids_T is None or constants.table_VK is None:
            raise ValueError("context.token_ids_BT is None, a HashRouter needs the tokens themselves")
        experts = inputs.logits_TE.shape[1]
        return Routed(routing.by_token_id(inputs.token_ids_T, constants.table_VK, experts, mask_T=inputs.mask_T))


@dataclasses.dataclass(frozen=True)
class SinkhornRouter:
    """Top-k of Sinkhorn-normalised logits in training (``routing.sinkhorn``; S-BASE for one expert), among the tokens of
    a row or of the whole batch; plain top-k at evaluation."""

    gate: Literal["softmax", "sigmoid"] = "softmax"
    iterations: int = 32
    scope: Scope = "row"

    def check(self, experts: int, per_token: int, groups: int) -> None:
        pass

    def per_row(self, drawing: bool) -> bool:
        return drawing and self.scope == "row"

    def route(self, inputs: RouterInputs, constants: RouterConstants) -> Routed:
        return Routed(
            routing.sinkhorn(
                inputs.logits_TE,
                constants.per_token,
                gate=self.gate,
                balance=inputs.key is not None,
                iterations=self.iterations,
                mask_T=inputs.mask_T,
            )
        )


@dataclasses.dataclass(frozen=True)
class BASERouter:
    """The balanced assignment that maximises Σ logits in training (``routing.base``, an auction), among the tokens of a
    row or of the whole batch; greedy at evaluation. Tokens that ``max_rounds`` of it leave over are dropped."""

    epsilon: float = 1e-3
    scope: Scope = "row"
    max_rounds: int = 10_000

    def check(self, experts: int, per_token: int, groups: int) -> None:
        _one(self, per_token)
        if self.max_rounds < 1:
            raise ValueError(f"router.max_rounds must be at least 1, got {self.max_rounds}")

    def per_row(self, drawing: bool) -> bool:
        return drawing and self.scope == "row"

    def route(self, inputs: RouterInputs, constants: RouterConstants) -> Routed:
        options = {"balance": inputs.key is not None, "epsilon": self.epsilon, "max_rounds": self.max_rounds}
        return Routed(routing.base(inputs.logits_TE, mask_T=inputs.mask_T, **options))


@dataclasses.dataclass(frozen=True)
class ReinforceRouter:
    """A policy over experts, rewarded with minus the token's next-token loss (``routing.policy``; RL-R of Clark et al.
    2022); sampled in training, the likeliest at evaluation.

    Attributes:
      gated: weight by the choice's probability, which gives the router a second, differentiable signal.
      policy_loss, baseline_loss, entropy_bonus: coefficients, per token.
    """

    gated: bool = False
    policy_loss: float = 0.01
    baseline_loss: float = 0.01
    entropy_bonus: float = 0.001

    def check(self, experts: int, per_token: int, groups: int) -> None:
        _one(self, per_token)

    def per_row(self, drawing: bool) -> bool:
        return drawing

    def route(self, inputs: RouterInputs, constants: RouterConstants) -> Routed:
        return Routed(routing.policy(inputs.logits_TE, inputs.key, gated=self.gated, mask_T=inputs.mask_T))


@dataclasses.dataclass(frozen=True)
class RandomRouter:
    """Experts drawn at random, nothing learned: a control (``routing.uniform``). Evaluation draws from ``seed``."""

    seed: int = 0

    def check(self, experts: int, per_token: int, groups: int) -> None:
        pass

    def per_row(self, drawing: bool) -> bool:
        return True

    def route(self, inputs: RouterInputs, constants: RouterConstants) -> Routed:
        tokens, experts = inputs.logits_TE.shape
        key = jax.random.key(self.seed) if inputs.key is None else inputs.key
        return Routed(routing.uniform(key, tokens, experts, constants.per_token, mask_T=inputs.mask_T))


Router = (
    TopKRouter
    | NoisyTopKRouter
    | GShardRouter
    | ExpertChoiceRouter
    | HashRouter
    | SinkhornRouter
    | BASERouter
    | ReinforceRouter
    | RandomRouter
)


def _one(router, per_token: int) -> None:
    if per_token != 1:
        raise ValueError(f"per_token must be 1 for a {type(router).__name__}, got {per_token}")


def route_rows(router: Router, inputs: RouterInputs, constants: RouterConstants, rows: int) -> Routed:
    """Routes each of ``rows`` rows on its own, with ``inputs.key`` a key a row: the same on any mesh."""

    without_key = inputs._replace(key=None)
    by_row = jax.tree.map(lambda leaf: leaf.reshape(rows, -1, *leaf.shape[1:]), without_key)
    routed = jax.vmap(lambda row: router.route(row, constants))(by_row._replace(key=inputs.key))
    smooth_load = routed.smooth_load_TE
    return Routed(
        routing.flatten_rows(routed.assignment),
        None if smooth_load is None else smooth_load.reshape(-1, smooth_load.shape[-1]),
    )


def jittered(router: Router, x_TD: Array, keys_B: Array | None) -> Array:
    """What the router reads, disturbed if it asks for it."""
    amount = getattr(router, "jitter", 0.0)
    if not amount or keys_B is None:
        return x_TD
    x_BTD = x_TD.reshape(keys_B.shape[0], -1, x_TD.shape[1])
    return jax.vmap(lambda x, key: routing.jitter(x, key, amount))(x_BTD, keys_B).reshape(x_TD.shape)
