"""Eight CPU devices in one process, so that sharding is tested without starting others."""

import gc
import os

# Tests compile far longer than they compute: leave out LLVM's optimisations. Results are IEEE either way.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
# A program called within a test asks for JAX's cache on disk: tests neither need it nor fill it.
jax.config.update("jax_enable_compilation_cache", False)


def _mappings():
    try:
        with open("/proc/self/maps") as maps:
            return sum(1 for _ in maps)
    except FileNotFoundError:
        return 0


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Every compiled program keeps some memory mappings, and Linux gives a process 65,530: LLVM crashes when it gets no more."""
    yield
    if _mappings() > 15_000:
        jax.clear_caches()
        gc.collect()
