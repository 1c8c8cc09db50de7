"""Client maps: all strategies give the same numbers; an averaging server's memory does not grow with the cohort."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TASK

from fedjax_mtl import (
    algorithms,
    default_execution,
    make_execution,
    make_federation,
    map_clients,
    models,
)
from fedjax_mtl.core import batching, sampling
from fedjax_mtl.execution import sum_and_map_clients

MODES = {
    "vmap": make_execution("vmap"),
    "map": make_execution("map"),
    "chunk-1": make_execution("chunk", 1),
    "chunk-3": make_execution("chunk", 3),
    "chunk-9": make_execution("chunk", 9),
    "loop": make_execution("loop"),
    "devices": make_execution("vmap", num_devices=4),
    "devices-map": make_execution("map", num_devices=3),
}


@pytest.mark.parametrize("work", [False, True])
@pytest.mark.parametrize("mode", sorted(MODES))
def test_all_modes_agree(mode, work):
    x = jnp.arange(14.0).reshape(7, 2)
    keys = jax.random.split(jax.random.key(0), 7)

    def fn(shared, x, key):
        return {"t": shared * x}, {"x": x + 1, "u": jax.random.uniform(key)}

    order = jnp.array([3, 1, 4, 1, 5, 9, 2]) if work else None
    total, outs = jax.jit(sum_and_map_clients(fn, MODES[mode], order))(jnp.float32(2), x, keys)
    np.testing.assert_allclose(total["t"], 2 * x.sum(0))
    np.testing.assert_allclose(outs["x"], x + 1)
    np.testing.assert_allclose(outs["u"], jax.vmap(jax.random.uniform)(keys))
    mapped = map_clients(lambda s, x: s + x, MODES[mode], order)(1.0, x)
    np.testing.assert_allclose(mapped, x + 1)


def test_the_padding_of_a_chunk_cannot_spread_a_nan():
    """Chunks repeat the first client; where that one is fine and its term is masked, nothing leaks."""
    x = jnp.array([1.0, 2.0, jnp.nan, 4.0])
    total, outs = sum_and_map_clients(lambda s, x: (x, x), make_execution("chunk", 3))(0, x)
    assert np.isnan(total)
    np.testing.assert_array_equal(np.isnan(outs), [False, False, True, False])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pmap",), "unknown execution mode 'pmap'; expected one of vmap, map, chunk, loop"),
        (("chunk",), "needs a chunk of at least 1 client, got None"),
        (("chunk", 0), "got 0"),
        (("vmap", 5), "chunk=5 goes with mode 'chunk', not 'vmap'"),
        (("vmap", None, 0), "num_devices is 0"),
        (("vmap", None, 99), "99 devices asked for but there are 4"),
    ],
)
def test_bad_executions(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_execution(*arguments)


def test_defaults():
    small = {"w": jax.ShapeDtypeStruct((60, 10), jnp.float32)}
    large = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
    assert default_execution(small, "cpu") == make_execution("chunk", 32)
    assert default_execution(large, "cpu").mode == "map"
    assert default_execution(large, "gpu").chunk > 100


def temporary_bytes(cohort, server=None):
    samples = 4
    examples = {
        "inputs": np.ones((cohort * samples, 256), np.float32),
        "labels": np.zeros(cohort * samples, np.int32),
    }
    rows = np.split(np.arange(cohort * samples), cohort)
    federation = make_federation(examples, rows)
    algorithm = algorithms.fedavg(
        models.mlp((256,), 3, (256,)),
        TASK,
        num_clients=cohort,
        plan=batching.epochs(1, 2),
        optimizer=optax.sgd(0.1),
        server=server,
        execution=make_execution("chunk", 2),
    )
    state = jax.eval_shape(algorithm.init, jax.random.key(0))
    made = sampling.full_participation()(jax.random.key(0), jnp.int32(0), federation)
    compiled = jax.jit(algorithm.round).lower(state, made, jax.random.key(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_cohort_when_the_server_averages():
    from fedjax_mtl import server

    one_model = 4 * (256 * 256 + 256 + 3 * 256 + 3)
    grown = temporary_bytes(64) - temporary_bytes(8)
    assert grown < one_model / 4
    # The same server with a transformation that needs every update holds them all.
    clipped = optax.chain(server.clip_clients(1.0), server.average_clients(), optax.sgd(1.0))
    assert temporary_bytes(64, clipped) - temporary_bytes(8, clipped) > 40 * one_model


def test_importing_the_package_needs_only_jax_flax_optax_and_numpy():
    import subprocess
    import sys

    heavy = "{'networkx', 'orbax', 'tensorflow_datasets', 'ml_collections', 'matplotlib', 'scipy.stats', 'sklearn', 'tensorflow'}"
    code = f"import sys, fedjax_mtl; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
