"""Eight CPU devices in one process, so that sharding is tested without starting others."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
