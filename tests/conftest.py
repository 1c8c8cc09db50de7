"""Strict numerics, four host devices, and a compilation cache that makes repeated runs fast."""

import os

# All of this has to stand before anything touches a device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little. Claims, which compute much, run with FEDJAX_MTL_OPTIMISE=1.
if not os.environ.get("FEDJAX_MTL_OPTIMISE"):
    # Without fusion emitters, and with one part a program, compiling takes a third of the time.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        + " --xla_cpu_parallel_codegen_split_count=1"
    )

import jax
import pytest

# Four devices, on whatever cores there are, exercise the sharded paths.
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_CACHE", ".jax_cache"))
# Most of the time goes into small programs, so the cache keeps them too.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Drops a module's programs when the module is done.

    Thousands of programs in one process exhaust the memory maps that a process may have.
    """
    yield
    jax.clear_caches()
