"""Speed of the server's part: projection in Gram space, the price of each transformation, heterogeneous rounds.

    python -m experiments.benchmarks.server [projection] [transformations] [heterogeneous]

``projection``: PCGrad on the Gram matrix, with and without the average, against the sequential form, over clients and parameters. ``transformations``: one update of each server transformation as a fraction of the
round of local training that it follows (the `small` dense model, one epoch of 20 rendered-sized images a client). ``heterogeneous``: one compiled round over groups against the same clients trained group
by group from Python. Compile time is not counted; every figure is the median of repeated runs in this process, scaled where the sequential form projects one client of many. Trust ratios.
"""

import argparse
import functools
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl import Group, heterogeneous, local_trainer, make_federation, models, server, tasks
from fedjax_mtl.core import batching, sampling, trees

PyTree = Any
CLIENTS, IMAGES, SIDE = 8, 20, 64


def seconds(
    run: Callable[[], Any], at_least: float = 2.0, most: int = 20
) -> tuple[float, float, float]:
    """Median, fastest and slowest of repeated runs, the first of which compiles and is not counted."""
    jax.block_until_ready(run())
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < at_least and len(taken) < most):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return float(np.median(taken)), min(taken), max(taken)


def stacked_updates(clients: int, parameters: int) -> dict[str, jax.Array]:
    """Random updates of a model of ten layers, leaves ``[clients, parameters / 10]``; row by row, because drawing a layer at once takes four times its memory."""

    @jax.jit
    def layer(key):
        return jax.lax.map(
            lambda key: jax.random.normal(key, (parameters // 10,)), jax.random.split(key, clients)
        )

    return {f"layer_{i}": layer(jax.random.key(i)) for i in range(10)}


def sequential_projection(updates: dict[str, jax.Array], first: int) -> dict[str, jax.Array]:
    """PCGrad as it is usually written, running vectors, partner after partner, of the first clients: leaves ``[first, ...]``."""
    count = updates["layer_0"].shape[0]

    def one(i):
        def visit(j, v):
            partner = jax.tree.map(lambda u: u[j], updates)
            product = optax.tree.vdot(v, partner)
            step = jnp.where(
                (product < 0) & (j != i), product / optax.tree.vdot(partner, partner), 0
            )
            return optax.tree.add_scale(v, -step, partner)

        return jax.lax.fori_loop(0, count, visit, jax.tree.map(lambda u: u[i], updates))

    return jax.lax.map(one, jnp.arange(first))


def check_corrections(own: PyTree, expected: PyTree, updates: PyTree) -> None:
    """Client 0's update after projection ``[...]`` against the sequential form's ``[clients, ...]``: what both took away from it."""
    start = updates["layer_0"][0]
    ours, theirs = own["layer_0"] - start, expected["layer_0"][0] - start
    np.testing.assert_allclose(ours, theirs, atol=1e-2 * float(jnp.max(jnp.abs(theirs))))


def projection() -> None:
    """Gram space against the sequential form, both compiled; results compared.

    Where the projected updates do not fit the memory beside the originals, only their average is formed. Where the sequential form would take minutes or hours, it
    projects one of the clients, and its time is scaled.
    """
    print(
        "PCGrad: clients, parameters, Gram ms, Gram and average ms, sequential ms, ratios to the sequential form"
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for clients, parameters in itertools.product((8, 64, 512), (10**5, 10**7)):
        updates = stacked_updates(clients, parameters)
        keeping, averaging = (
            server.project_conflicts(order="index", average=a) for a in (False, True)
        )
        project = jax.jit(lambda u, t=keeping: t.update(u, optax.EmptyState())[0])
        average = jax.jit(lambda u, w, t=averaging: t.update(u, optax.EmptyState(), weights=w)[0])
        first = clients if clients**2 * parameters < 10**10 else 1
        plain = jax.jit(functools.partial(sequential_projection, first=first))

        check_corrections(average(updates, jax.nn.one_hot(0, clients)), plain(updates), updates)
        uniform = jnp.full(clients, 1 / clients)
        averaged, _, _ = seconds(lambda u=updates, w=uniform, f=average: f(u, w))
        theirs, _, _ = seconds(lambda u=updates, f=plain: f(u))
        theirs *= clients / first
        line = f"  {clients:4} {parameters:9}"
        if 2.2 * 4 * clients * parameters < memory:
            check_corrections(
                jax.tree.map(lambda x: x[0], project(updates)), plain(updates), updates
            )
            projected, _, _ = seconds(lambda u=updates, f=project: f(u))
            line += f" {1e3 * projected:10.1f} {1e3 * averaged:10.1f} {1e3 * theirs:12.1f} {theirs / projected:8.1f}"
        else:
            line += f" {'no memory':>10} {1e3 * averaged:10.1f} {1e3 * theirs:12.1f} {'-':>8}"
        print(f"{line} {theirs / averaged:8.1f}", flush=True)


def dense_groups() -> tuple[dict[str, Group], dict[str, Any]]:
    """Eight clients with the `small` dense model: two groups of four with one task each."""
    rng = np.random.default_rng(0)
    groups, population = {}, {}
    for name, task, channels in (
        ("depth", tasks.dense.depth(), 1),
        ("edge", tasks.dense.edges(), 1),
    ):
        images = rng.normal(size=(4 * IMAGES, SIDE, SIDE, 3)).astype(np.float32)
        labels = {
            name: rng.integers(0, 2, size=(4 * IMAGES, SIDE, SIDE, channels)).astype(np.float32)
        }
        examples = {"inputs": images, "labels": labels}
        population[name] = make_federation(examples, list(np.arange(4 * IMAGES).reshape(4, IMAGES)))
        model = models.multi_decoder((SIDE, SIDE, 3), {name: channels}, "small")
        client = local_trainer(
            model,
            tasks.joint({name: (task, 1.0)}),
            optax.adam(1e-3),
            batching.epochs(1, 4),
            personal=trees.under("decoders"),
        )
        groups[name] = Group(model.init, client, 4)
    return groups, population


def round_of(groups, population, chain) -> Callable[[], Any]:
    """A compiled round, ready to be called."""
    algorithm = heterogeneous(groups, chain)
    cohorts = sampling.by_group(sampling.full_participation())(jax.random.key(0), 0, population)
    state = jax.jit(algorithm.init)(jax.random.key(0))
    compiled = jax.jit(algorithm.round)
    return lambda: compiled(state, cohorts, jax.random.key(1))[0].params


def transformations() -> None:
    """Each transformation's update beside the round of local training it follows."""
    groups, population = dense_groups()
    whole, low, high = seconds(round_of(groups, population, server.step_from(optax.sgd(1.0))), 10.0)
    print(
        f"round of local training, 8 clients, small dense model: {whole:.3f} s ({low:.3f} - {high:.3f})"
    )
    params = jax.eval_shape(groups["depth"].init_params, jax.random.key(0))["encoder"]
    updates = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), (CLIENTS, *x.shape)), params
    )
    start = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    facts = {
        "weights": jnp.full(CLIENTS, 1 / CLIENTS),
        "losses": jnp.arange(1.0, CLIENTS + 1),
        "client_ids": jnp.arange(CLIENTS),
        "present": jnp.ones(CLIENTS, bool),
        "key": jax.random.key(0),
    }
    chains = {
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
    for name, transform in chains.items():
        transform = optax.with_extra_args_support(transform)
        state = transform.init(start)
        update = jax.jit(lambda u, s, t=transform: t.update(u, s, start, **facts))
        taken, low, high = seconds(lambda u=updates, s=state, f=update: f(u, s))
        print(
            f"  {name:28} {1e3 * taken:8.2f} ms ({1e3 * low:.2f} - {1e3 * high:.2f}), {100 * taken / whole:.2f} % of the round",
            flush=True,
        )


def heterogeneous_round() -> None:
    """One compiled round over all groups against Python over groups and clients, each client's update compiled."""
    groups, population = dense_groups()
    ours, low, high = seconds(round_of(groups, population, server.step_from(optax.sgd(1.0))), 10.0)
    by_group = {
        n: round_of({n: groups[n]}, {n: population[n]}, server.step_from(optax.sgd(1.0)))
        for n in groups
    }
    apart, _, _ = seconds(lambda: [run() for run in by_group.values()], 10.0)
    singles = []
    for name, group in groups.items():
        for client in range(4):
            one = {name: population[name].take(jnp.array([client]))}
            singles.append(
                round_of(
                    {name: group._replace(num_clients=1)}, one, server.step_from(optax.sgd(1.0))
                )
            )
    alone, _, _ = seconds(lambda: [run() for run in singles], 10.0)
    print(
        f"heterogeneous round {ours:.3f} s ({low:.3f} - {high:.3f}); group by group {apart:.3f} s = {apart / ours:.2f} x; "
    )
    print(f"client by client from Python (each compiled) {alone:.3f} s = {alone / ours:.2f} x")


PARTS = {
    "projection": projection,
    "transformations": transformations,
    "heterogeneous": heterogeneous_round,
}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", default=list(PARTS), metavar="part", help=", ".join(PARTS)
    )
    for part in parser.parse_args(argv).parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
