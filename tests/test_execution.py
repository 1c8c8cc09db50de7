"""Client maps: all strategies give the same numbers.

An averaging server's memory does not grow with the cohort.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TASK

from fedjax_mtl import (
    Solver,
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
    """Chunks are padded with the first client.

    Where that client is fine and its term is masked, nothing leaks.
    """
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


def shapes_of(size):
    """Parameters of so many bytes, in two leaves."""
    half = jax.ShapeDtypeStruct((size // 8,), jnp.float32)
    return {"a": half, "b": half}


@pytest.mark.parametrize(
    ("platform", "size", "expected"),
    [
        # 2^18 bytes are a part of a core's cache; more than 32 clients bring nothing.
        ("cpu", 2**18, ("map", None)),
        ("cpu", 2**17 + 8, ("map", None)),
        ("cpu", 2**17, ("chunk", 2)),
        ("cpu", 50_000, ("chunk", 5)),
        ("cpu", 2**13, ("chunk", 32)),
        ("cpu", 8, ("chunk", 32)),
        # An accelerator has 2 GiB for four copies of the parameters of every client in flight.
        ("gpu", 2**30, ("map", None)),
        ("gpu", 2**28, ("chunk", 2)),
        ("gpu", 4_000_000, ("chunk", 134)),
        ("tpu", 2**20, ("chunk", 512)),
    ],
)
def test_defaults(platform, size, expected):
    chosen = default_execution(shapes_of(size), platform)
    assert (chosen.mode, chosen.chunk) == expected and chosen.mesh is None


def test_the_default_platform_is_jaxs():
    own = shapes_of(2**20)
    assert default_execution(own) == default_execution(own, jax.default_backend())
    narrow = {"a": jax.ShapeDtypeStruct((2**16,), jnp.bfloat16)}
    assert default_execution(narrow, "cpu").chunk == 2


@jax.custom_batching.custom_vmap
def beside(own):
    """How many clients run at once with this one, and the largest number among them."""
    return jnp.int32(1), own


@beside.def_vmap
def _beside_others(count, batched, own):
    del batched
    return (jnp.full(count, count, jnp.int32), jnp.full_like(own, jnp.max(own))), (True, True)


@pytest.mark.parametrize(
    ("mode", "lanes"), [("vmap", 7), ("map", 1), ("chunk-3", 3), ("chunk-5", 4), ("chunk-9", 7)]
)
def test_how_many_clients_run_at_once(mode, lanes):
    """Clients run in as few chunks as suffice, which have one width.

    Seven clients in chunks of up to five make two chunks of four.
    """
    name, _, chunk = mode.partition("-")
    execution = make_execution(name, int(chunk) if chunk else None)
    counts, _ = map_clients(lambda _, own: beside(own), execution)(None, jnp.arange(7))
    np.testing.assert_array_equal(counts, [lanes] * 7)


def test_clients_of_like_work_share_a_chunk():
    """Clients are sorted by their work, because a chunk runs as long as its slowest client.

    Outputs come back in order.
    """
    work = jnp.array([5, 1, 4, 2, 3, 0])
    execution = make_execution("chunk", 2)
    _, largest = map_clients(lambda _, own: beside(own), execution, work)(None, work)
    np.testing.assert_array_equal(largest, [5, 1, 5, 3, 3, 1])
    _, unsorted = map_clients(lambda _, own: beside(own), execution)(None, work)
    np.testing.assert_array_equal(unsorted, [5, 5, 4, 4, 3, 3])


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
        solver=Solver(optax.sgd(0.1), batching.epochs(1, 2)),
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

    heavy = {"networkx", "orbax", "ml_collections", "matplotlib", "scipy.stats", "sklearn"}
    heavy |= {"tensorflow", "tensorflow_datasets"}
    code = f"import sys, fedjax_mtl; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
