"""Thin Flax modules over the ops, one file a mechanism.

Modules are NNX in tree mode: stateless pytrees, transformed with ``jax.*`` only. Every mixer has a frozen configuration
with ``build(width, depth=…, rngs=…, param_dtype=…)`` and is called as ``(x_BTD, state, context) -> (y_BTD, state, aux)``:
state in is state out (``None`` stays ``None``), and ``init_state(batch, max_length, dtype)`` makes an empty one. The
configuration's ``flops(width, context)`` counts the multiplications and additions of its matrix products for one token
forward, padding, recomputation and inactive experts left out, where a token attends to ``context`` keys on average.

Layers with a recurrent state share ``recurrence``: they put zeros in the place of padding, whatever stands there, and their
state is a ``RecurrentState``. A configuration that is ``Placed`` is also told where in the model its layer stands.
"""

from flax import nnx

nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
