"""Speed of the server's part of a round.

    python -m experiments.benchmarks.server [projection] [transformations] [heterogeneous]

- ``projection``: PCGrad on the Gram matrix, with and without the average, against the sequential
  form, over clients and parameters.
- ``transformations``: one update of each server transformation as a share of the round of local
  training that it follows: the ``small`` dense model, one epoch of 20 rendered-sized images a
  client.
- ``heterogeneous``: one compiled round over groups against the same clients trained group by group
  from Python.

Compile time is not counted. Every figure is the median of repeated runs in this process; it is
scaled where the sequential form projects one client of many. Trust ratios.
"""

import argparse
import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl import (
    Group,
    Population,
    Solver,
    heterogeneous,
    local_trainer,
    make_federation,
    models,
    server,
    tasks,
)
from fedjax_mtl.core import batching, sampling, trees

PyTree = Any
Updates = dict[str, jax.Array]
CLIENTS, IMAGES, SIDE = 8, 20, 64


class Seconds(NamedTuple):
    """The time of repeated runs.

    Attributes:
        median: of all.
        fastest: of all.
        slowest: of all.
    """

    median: float
    fastest: float
    slowest: float


def time_runs(run: Callable[[], Any], at_least: float = 2.0, most: int = 20) -> Seconds:
    """Times repeated runs, without the first, which compiles; there are at least 3.

    Args:
        run: what is timed.
        at_least: seconds, after which it is enough.
        most: runs, after which it is enough.
    """
    jax.block_until_ready(run())
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < at_least and len(taken) < most):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return Seconds(float(np.median(taken)), min(taken), max(taken))


# --- Projection.


def stacked_updates(clients: int, parameters: int) -> Updates:
    """Random updates of a model of ten layers, leaves ``[clients, parameters / 10]``.

    They are drawn row by row: drawing a layer at once takes four times its memory.

    Args:
        clients: how many.
        parameters: of the model.
    """

    @jax.jit
    def layer(key: jax.Array) -> jax.Array:
        return jax.lax.map(
            lambda key: jax.random.normal(key, (parameters // 10,)), jax.random.split(key, clients)
        )

    return {f"layer_{i}": layer(jax.random.key(i)) for i in range(10)}


def sequential_projection(updates: Updates, first: int) -> Updates:
    """PCGrad as it is usually written: running vectors, partner after partner.

    Args:
        updates: leaves ``[clients, ...]``.
        first: how many clients' updates are projected.

    Returns:
        The projected updates of the first clients, leaves ``[first, ...]``.
    """
    count = updates["layer_0"].shape[0]

    def one(i: jax.Array) -> Updates:
        def visit(j: jax.Array, v: Updates) -> Updates:
            partner = jax.tree.map(lambda u: u[j], updates)
            product = optax.tree.vdot(v, partner)
            step = jnp.where(
                (product < 0) & (j != i), product / optax.tree.vdot(partner, partner), 0
            )
            return optax.tree.add_scale(v, -step, partner)

        return jax.lax.fori_loop(0, count, visit, jax.tree.map(lambda u: u[i], updates))

    return jax.lax.map(one, jnp.arange(first))


def check_corrections(own: Updates, expected: Updates, updates: Updates) -> None:
    """Compares what two forms took away from client 0's update.

    Args:
        own: its update after projection, leaves ``[...]``.
        expected: updates by the sequential form, leaves ``[clients, ...]``.
        updates: before projection, leaves ``[clients, ...]``.
    """
    start = updates["layer_0"][0]
    ours, theirs = own["layer_0"] - start, expected["layer_0"][0] - start
    np.testing.assert_allclose(ours, theirs, atol=1e-2 * float(jnp.max(jnp.abs(theirs))))


def compiled_projection(*, average: bool) -> Callable[..., Any]:
    """A compiled function ``(updates, **facts)`` that applies PCGrad in Gram space."""
    transform = server.project_conflicts(order="index", average=average)
    state = transform.init({})
    return jax.jit(lambda updates, **facts: transform.update(updates, state, **facts)[0])


def projection_line(clients: int, parameters: int, memory: int) -> str:
    """Times one case; the forms must agree.

    Args:
        clients: how many.
        parameters: of the model.
        memory: bytes of this machine. Where the projected updates do not fit beside the originals,
            only their average is formed.
    """
    updates = stacked_updates(clients, parameters)
    project, average = (compiled_projection(average=either) for either in (False, True))
    # The sequential form would take minutes or hours for all clients of the large cases.
    first = clients if clients**2 * parameters < 10**10 else 1
    plain = jax.jit(functools.partial(sequential_projection, first=first))

    only_first = jax.nn.one_hot(0, clients)
    check_corrections(average(updates, weights=only_first), plain(updates), updates)
    uniform = jnp.full(clients, 1 / clients)
    averaged = time_runs(lambda: average(updates, weights=uniform)).median
    theirs = time_runs(lambda: plain(updates)).median * clients / first
    projected, ratio = f"{'no memory':>10}", f"{'-':>8}"
    if 2.2 * 4 * clients * parameters < memory:
        own = jax.tree.map(lambda x: x[0], project(updates))
        check_corrections(own, plain(updates), updates)
        ours = time_runs(lambda: project(updates)).median
        projected, ratio = f"{1e3 * ours:10.1f}", f"{theirs / ours:8.1f}"
    return (
        f"  {clients:4} {parameters:9} {projected} {1e3 * averaged:10.1f} {1e3 * theirs:12.1f} "
        f"{ratio} {theirs / averaged:8.1f}"
    )


def projection() -> None:
    """Prints the times of PCGrad in Gram space and in the sequential form, both compiled."""
    print(
        "PCGrad: clients, parameters, Gram ms, Gram and average ms, sequential ms, ratios to the "
        "sequential form"
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for clients, parameters in itertools.product((8, 64, 512), (10**5, 10**7)):
        print(projection_line(clients, parameters, memory), flush=True)


# --- Rounds of local training.


def dense_group(name: str, task: tasks.Task) -> Group:
    """Four clients with the ``small`` dense model and one task of one channel."""
    model = models.multi_decoder((SIDE, SIDE, 3), {name: 1}, "small")
    client = local_trainer(
        model,
        tasks.joint({name: (task, 1.0)}),
        Solver(optax.adam(1e-3), batching.epochs(1, 4)),
        personal=trees.under("decoders"),
    )
    return Group(model.init, client, 4)


def dense_groups() -> tuple[dict[str, Group], Population]:
    """Eight clients with the ``small`` dense model: two groups of four with one task each."""
    rng = np.random.default_rng(0)
    groups, population = {}, {}
    for name, task in (("depth", tasks.dense.depth()), ("edge", tasks.dense.edges())):
        images = rng.normal(size=(4 * IMAGES, SIDE, SIDE, 3)).astype(np.float32)
        labels = rng.integers(0, 2, size=(4 * IMAGES, SIDE, SIDE, 1)).astype(np.float32)
        examples = {"inputs": images, "labels": {name: labels}}
        population[name] = make_federation(examples, list(np.arange(4 * IMAGES).reshape(4, IMAGES)))
        groups[name] = dense_group(name, task)
    return groups, population


def round_of(groups: dict[str, Group], population: Population) -> Callable[[], Any]:
    """A compiled round of plain averaging, ready to be called."""
    algorithm = heterogeneous(groups, server.step_from(optax.sgd(1.0)))
    cohorts = sampling.by_group(sampling.full_participation())(jax.random.key(0), 0, population)
    state = jax.jit(algorithm.init)(jax.random.key(0))
    compiled = jax.jit(algorithm.round)
    return lambda: compiled(state, cohorts, jax.random.key(1))[0].params


# --- Transformations.


def all_transformations() -> dict[str, optax.GradientTransformation]:
    """What is timed, by the name it is printed with."""
    return {
        "average_clients": server.average_clients(),
        "clip_clients": server.clip_clients(1.0),
        "project_conflicts": server.project_conflicts(),
        "gp_aggregation": server.gp_aggregation(),
        "conflict_averse": server.conflict_averse(),
        "normalize_gradients": server.normalize_gradients(CLIENTS, learning_rate=0.02),
        "decouple_updates": server.decouple_updates(0.2),
        "decouple_updates per layer": server.decouple_updates(0.2, scope="layer"),
        "coordinate_median": server.coordinate_median(),
        "trimmed_mean": server.trimmed_mean(0.2),
        "private_average": server.private_average(1.0, 0.1),
        "compress top 10 %": server.compress_clients(server.top_entries(0.1), CLIENTS),
        "compress 4 levels": server.compress_clients(server.stochastic_levels(4), CLIENTS),
    }


def facts() -> dict[str, jax.Array]:
    """The extra arguments that a round gives to its server."""
    return {
        "weights": jnp.full(CLIENTS, 1 / CLIENTS),
        "losses": jnp.arange(1.0, CLIENTS + 1),
        "client_ids": jnp.arange(CLIENTS),
        "present": jnp.ones(CLIENTS, bool),
        "key": jax.random.key(0),
    }


def time_update(
    transform: optax.GradientTransformation, updates: PyTree, params: PyTree
) -> Seconds:
    """Times one update of a transformation.

    Args:
        transform: what is timed.
        updates: of all clients, leaves ``[clients, ...]``.
        params: of the server.
    """
    transform = optax.with_extra_args_support(transform)
    state, known = transform.init(params), facts()
    update = jax.jit(lambda updates, state: transform.update(updates, state, params, **known))
    return time_runs(lambda: update(updates, state))


def transformations() -> None:
    """Prints each transformation's time beside the round of local training it follows."""
    groups, population = dense_groups()
    whole = time_runs(round_of(groups, population), 10.0)
    print(
        f"round of local training, 8 clients, small dense model: {whole.median:.3f} s "
        f"({whole.fastest:.3f} - {whole.slowest:.3f})"
    )
    shapes = jax.eval_shape(groups["depth"].init_params, jax.random.key(0))["encoder"]
    updates = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), (CLIENTS, *x.shape)), shapes
    )
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    for name, transform in all_transformations().items():
        taken = time_update(transform, updates, params)
        print(
            f"  {name:28} {1e3 * taken.median:8.2f} ms "
            f"({1e3 * taken.fastest:.2f} - {1e3 * taken.slowest:.2f}), "
            f"{100 * taken.median / whole.median:.2f} % of the round",
            flush=True,
        )


# --- Groups.


def heterogeneous_round() -> None:
    """Prints the time of one compiled round over all groups, and of the same work from Python.

    Python goes over groups, or over clients; each group's, or each client's, round is compiled.
    """
    groups, population = dense_groups()
    whole = time_runs(round_of(groups, population), 10.0)
    by_group = [round_of({name: groups[name]}, {name: population[name]}) for name in groups]
    apart = time_runs(lambda: [run() for run in by_group], 10.0).median
    singles = [
        round_of(
            {name: group._replace(num_clients=1)},
            {name: population[name].take(jnp.array([client]))},
        )
        for name, group in groups.items()
        for client in range(group.num_clients)
    ]
    alone = time_runs(lambda: [run() for run in singles], 10.0).median
    print(
        f"heterogeneous round {whole.median:.3f} s ({whole.fastest:.3f} - {whole.slowest:.3f}); "
        f"group by group {apart:.3f} s = {apart / whole.median:.2f} x; "
    )
    print(
        f"client by client from Python (each compiled) {alone:.3f} s = {alone / whole.median:.2f} x"
    )


PARTS: dict[str, Callable[[], None]] = {
    "projection": projection,
    "transformations": transformations,
    "heterogeneous": heterogeneous_round,
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=list(PARTS), help="default: all")
    for part in parser.parse_args(argv).parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
