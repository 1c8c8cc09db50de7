"""Strict numerics, four host devices, and a compilation cache that makes repeated runs fast."""

import os

# Before anything touches a device. Four devices on whatever cores there are, so that sharded paths are exercised.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little; claims (FEDJAX_MTL_OPTIMISE=1) the other way round.
if not os.environ.get("FEDJAX_MTL_OPTIMISE"):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    )

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_CACHE", ".jax_cache"))
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", 0.0
)  # small programs are most of the time


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Drops a module's programs when it is done: thousands of them in one process exhaust the memory maps that a process may have."""
    yield
    jax.clear_caches()
