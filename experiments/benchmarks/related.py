"""Speed and memory of related models: MOCHA against its algorithm in plain numpy, and how a LoRA round grows with clients.

    python -m experiments.benchmarks.related [mocha] [lora] [--repetitions=5]

Each ratio comes from one run on one machine, both sides alternating; compile time is told apart. Give it one core (``taskset -c 0``) for figures that compare.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.mocha_numpy import Twin
from fedjax_mtl import Model, algorithms, make_execution, make_federation, models, tasks
from fedjax_mtl.core import batching, sampling
from fedjax_mtl.data.task_tables import related_tasks
from fedjax_mtl.relations import covariance, graphs

REPETITIONS = 5
ROUNDS = 10


def spread(seconds: list[float]) -> str:
    """Median, smallest and largest, in milliseconds."""
    low, middle, high = (1000 * f(seconds) for f in (min, statistics.median, max))
    return f"{middle:9.2f} ms ({low:.2f} to {high:.2f})"


def timed(fn: Callable[[], Any]) -> float:
    """Seconds of one call, results awaited."""
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def mocha_against_numpy(num_tasks: int, repetitions: int) -> None:
    """A round of one pass a node: compiled (scanned ten at a time, objective off) against coordinate by coordinate."""
    table = related_tasks(num_tasks=num_tasks, features=20, smallest=20, largest=100)
    examples = {"inputs": table.inputs, "labels": table.labels}
    federation = make_federation(examples, table.rows)
    relation = covariance.mean_regularised(0.01, 0.1, 0.1)
    algorithm = algorithms.mocha(
        tasks.dual.hinge(),
        sizes=federation.sizes,
        capacity=federation.capacity,
        features=20,
        penalty=0.01,
        relationship=relation,
        order="cyclic",
        dtype=jnp.float64,
    )
    cohort = sampling.make_cohort(federation, jnp.arange(num_tasks))

    @jax.jit
    def rounds(state, cohort, key):
        return jax.lax.fori_loop(0, ROUNDS, lambda i, s: algorithm.round(s, cohort, key)[0], state)

    key = jax.random.key(0)
    state = algorithm.init(key)
    compile_seconds = timed(lambda: rounds(state, cohort, key))
    sigma = np.asarray(state.covariance)
    inputs = [table.inputs[rows] for rows in table.rows]
    twin = Twin("hinge", inputs, [table.labels[rows] for rows in table.rows], sigma, 0.01)
    steps = [len(rows) for rows in table.rows]
    ours, theirs = [], []
    for _ in range(repetitions):
        ours.append(timed(lambda: rounds(state, cohort, key)) / ROUNDS)
        theirs.append(timed(lambda: twin.round(steps)))
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(
        f"MOCHA {num_tasks:5d} tasks, {sum(steps)} steps: {spread(ours)}; numpy {spread(theirs)}; {ratio:.0f} x; "
        f"first call {compile_seconds:.1f} s"
    )


def lora_growth(repetitions: int) -> None:
    """One MIRA round of 1, 8 and 32 clients on a base of a few million weights: time, and XLA's count of temporary bytes."""
    config = models.tiny_transformer(
        512, width=256, num_layers=4, num_heads=4, mlp_width=1024, max_length=32
    )
    base = models.language_model(config)
    adapted = models.lora(base, targets=["*/attention/query", "*/attention/value"], rank=8)
    tokens = np.random.default_rng(0).integers(0, 512, (32 * 8, 32)).astype(np.int32)
    examples = {"inputs": tokens, "labels": np.roll(tokens, -1, axis=1)}
    shapes = jax.eval_shape(base.init, jax.random.key(0))
    base_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    print(f"base of {base_bytes / 1e6:.1f} MB")
    for clients in (1, 8, 32):
        federation = make_federation(examples, list(np.arange(8 * clients).reshape(clients, 8)))
        for name, model, frozen in (("LoRA", adapted, True), ("whole models", base, False)):
            report_round(name, model, frozen, federation, clients, repetitions)


def report_round(
    name: str, model: Model, frozen: bool, federation, clients: int, repetitions: int
) -> None:
    """Prints one round's time, arguments and temporaries."""
    settings = {
        "num_clients": clients,
        "plan": batching.steps(2, 4),
        "optimizer": optax.adam(1e-3),
        "execution": make_execution("vmap"),
    }
    graph = graphs.fixed(graphs.complete(clients))
    build = algorithms.mira if frozen else algorithms.fedu
    algorithm = build(model, tasks.language_modelling(), graph=graph, strength=0.01, **settings)
    state = jax.jit(algorithm.init)(jax.random.key(0))
    cohort = sampling.make_cohort(federation, jnp.arange(clients))
    lowered = jax.jit(algorithm.round).lower(state, cohort, jax.random.key(1))
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    compiled(state, cohort, jax.random.key(1))
    seconds = [
        timed(lambda: compiled(state, cohort, jax.random.key(1))) for _ in range(repetitions)
    ]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(
        f"{name:13s} {clients:3d} clients: {spread(seconds)} a round; state {held / 1e6:8.1f} MB, "
        f"temporaries {memory.temp_size_in_bytes / 1e6:8.1f} MB; compiled in {compile_seconds:.1f} s"
    )


def main(arguments: list[str]) -> None:
    """Which parts, and ``--repetitions``."""
    counts = [int(a.partition("=")[2]) for a in arguments if a.startswith("--repetitions=")]
    repetitions = counts[0] if counts else REPETITIONS
    parts = [a for a in arguments if not a.startswith("--")] or ["mocha", "lora"]
    if "mocha" in parts:
        with jax.enable_x64(True):
            for num_tasks in (30, 300, 3000):
                mocha_against_numpy(num_tasks, repetitions)
    if "lora" in parts:
        lora_growth(repetitions)


if __name__ == "__main__":
    main(sys.argv[1:])
