"""Eight CPU devices in one process, so that sharding is tested without starting others."""

import os

# Tests compile far longer than they compute: leave out LLVM's optimisations. Results are IEEE either way.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
