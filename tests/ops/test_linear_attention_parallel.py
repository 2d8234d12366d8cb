"""The sequence sharded over 8 devices equals the sequence on one: every mechanism, every gradient, segments across edges."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from research.ops.linear_attention.context_parallel import context_parallel
from tests.ops.test_linear_attention import MECHANISMS, NAMES, check, expected, make

pytestmark = pytest.mark.slow
T = 48
ROWS = np.stack(
    [
        np.repeat([1, 2, 0, 3], [17, 14, 6, 11]),  # crosses edges, a whole shard of padding
        np.repeat([0, 4, 0, 4, 5], [7, 3, 15, 16, 7]),
    ]
).astype(np.int32)


@pytest.mark.parametrize(
    ("name", "packed"), [*((name, True) for name in MECHANISMS), ("gated_deltanet", False), ("linear", False)]
)
def test_sharded_over_eight_devices_is_whole(name, packed):
    mesh = jax.make_mesh((8,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    x, cotangents = make(0, 2, T, 1, 2, 4, 6, *MECHANISMS[name])
    ids = ROWS if packed else None
    spec = {n: P() if n == "initial_state" or v is None or v.ndim == 1 else P(None, "context") for n, v in x.items()}

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(x, cotangents, ids):
        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(spec, P(None, "context")), out_specs=(P(None, "context"), P())
        )
        def op(x, ids):
            return context_parallel(
                *(x[n] for n in "qkv"), **{n: x[n] for n in NAMES[3:]}, axis_name="context", scale=0.5, segment_ids=ids
            )

        (o, state), pull = jax.vjp(lambda x: op(x, ids), x)
        return o, state, pull(cotangents)[0]

    check(run(x, cotangents, ids), expected(x, cotangents, ids))
