"""Speed and memory of related models: MOCHA beside plain numpy, and how a LoRA round grows.

    python -m experiments.benchmarks.related [mocha] [lora] [--repetitions=5]

``mocha``: a compiled round against the same algorithm in plain numpy. ``lora``: time and memory of
a round of MIRA over the number of clients. Each ratio comes from one run on one machine with both
sides alternating, and compile time is told apart. Give it one core (``taskset -c 0``) for figures
that compare.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.mocha_numpy import Twin
from fedjax_mtl import (
    Algorithm,
    Federation,
    Model,
    Solver,
    algorithms,
    make_execution,
    make_federation,
    models,
    tasks,
)
from fedjax_mtl.core import batching, sampling
from fedjax_mtl.data.task_tables import TaskTable, related_tasks
from fedjax_mtl.relations import covariance, graphs

PyTree = Any
ROUNDS = 10
PENALTY = 0.01


def spread(seconds: Sequence[float]) -> str:
    """Median, smallest and largest, in milliseconds."""
    low, middle, high = (1000 * f(seconds) for f in (min, statistics.median, max))
    return f"{middle:9.2f} ms ({low:.2f} to {high:.2f})"


def timed(fn: Callable[[], Any]) -> float:
    """Seconds of one call, results awaited."""
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


# --- MOCHA.


def make_mocha(federation: Federation) -> Algorithm:
    """MOCHA with one pass a node in storage order, in double precision."""
    return algorithms.mocha(
        tasks.dual.hinge(),
        sizes=federation.sizes,
        capacity=federation.capacity,
        features=20,
        penalty=PENALTY,
        relationship=covariance.mean_regularised(PENALTY, 0.1, 0.1),
        order="cyclic",
        dtype=jnp.float64,
    )


def make_twin(table: TaskTable, sigma: np.ndarray) -> Twin:
    """The same problem for MOCHA in plain numpy."""
    inputs = [table.inputs[rows] for rows in table.rows]
    return Twin("hinge", inputs, [table.labels[rows] for rows in table.rows], sigma, PENALTY)


def mocha_against_numpy(num_tasks: int, repetitions: int) -> None:
    """Prints the time of a round of one pass a node, compiled and coordinate by coordinate.

    Compiled rounds are scanned ten at a time, without the objective.

    Args:
        num_tasks: how many nodes there are.
        repetitions: how often each side is timed.
    """
    table = related_tasks(num_tasks=num_tasks, features=20, smallest=20, largest=100)
    examples = {"inputs": table.inputs, "labels": table.labels}
    federation = make_federation(examples, table.rows)
    algorithm = make_mocha(federation)
    cohort = sampling.make_cohort(federation, jnp.arange(num_tasks))

    @jax.jit
    def rounds(state, cohort, key):
        return jax.lax.fori_loop(0, ROUNDS, lambda i, s: algorithm.round(s, cohort, key)[0], state)

    key = jax.random.key(0)
    state = algorithm.init(key)
    compile_seconds = timed(lambda: rounds(state, cohort, key))
    twin = make_twin(table, np.asarray(state.covariance))
    steps = [len(rows) for rows in table.rows]
    ours, theirs = [], []
    for _ in range(repetitions):
        ours.append(timed(lambda: rounds(state, cohort, key)) / ROUNDS)
        theirs.append(timed(lambda: twin.round(steps)))
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(
        f"MOCHA {num_tasks:5d} tasks, {sum(steps)} steps: {spread(ours)}; "
        f"numpy {spread(theirs)}; {ratio:.0f} x; first call {compile_seconds:.1f} s"
    )


def mocha(repetitions: int) -> None:
    """:func:`mocha_against_numpy` for 30, 300 and 3000 tasks."""
    with jax.enable_x64(True):
        for num_tasks in (30, 300, 3000):
            mocha_against_numpy(num_tasks, repetitions)


# --- MIRA.


def lora(repetitions: int) -> None:
    """Prints time and memory of one MIRA round of 1, 8 and 32 clients.

    The base has a few million weights. Beside MIRA stands the same round with whole models. The
    temporary bytes are XLA's count.

    Args:
        repetitions: how often each round is timed.
    """
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
        sides = {"LoRA": (algorithms.mira, adapted), "whole models": (algorithms.fedu, base)}
        for name, (constructor, model) in sides.items():
            algorithm = tuned_together(constructor, model, clients)
            report_round(name, algorithm, federation, repetitions)


def tuned_together(
    constructor: Callable[..., Algorithm], model: Model, num_clients: int
) -> Algorithm:
    """MIRA or FedU with two local steps and a complete graph.

    Args:
        constructor: ``algorithms.mira`` or ``algorithms.fedu``.
        model: with adapters for the former.
        num_clients: in the population.
    """
    return constructor(
        model,
        tasks.language_modelling(),
        num_clients=num_clients,
        solver=Solver(optax.adam(1e-3), batching.steps(2, 4)),
        graph=graphs.fixed(graphs.complete_weights(num_clients)),
        strength=0.01,
        execution=make_execution("vmap"),
    )


def report_round(name: str, algorithm: Algorithm, federation: Federation, repetitions: int) -> None:
    """Prints one round's time, the bytes of the state and of temporaries, and compile time.

    Args:
        name: of the line.
        algorithm: whose round it is.
        federation: the clients, who all take part.
        repetitions: how often the round is timed.
    """
    clients = federation.num_clients
    state = jax.jit(algorithm.init)(jax.random.key(0))
    cohort = sampling.make_cohort(federation, jnp.arange(clients))
    lowered = jax.jit(algorithm.round).lower(state, cohort, jax.random.key(1))
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - start

    def run() -> PyTree:
        return compiled(state, cohort, jax.random.key(1))

    run()
    seconds = [timed(run) for _ in range(repetitions)]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    memory = compiled.memory_analysis()
    temporaries = float("nan") if memory is None else memory.temp_size_in_bytes / 1e6
    print(
        f"{name:13s} {clients:3d} clients: {spread(seconds)} a round; state {held:8.1f} MB, "
        f"temporaries {temporaries:8.1f} MB; compiled in {compile_seconds:.1f} s"
    )


PARTS: dict[str, Callable[[int], None]] = {"mocha": mocha, "lora": lora}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=list(PARTS), help="default: all")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args(argv)
    for part in arguments.parts or PARTS:
        PARTS[part](arguments.repetitions)


if __name__ == "__main__":
    main()
