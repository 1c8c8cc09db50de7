"""How well each client is served by its own model on its own rows, and summaries over clients."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import Federation, Population
from fedjax_mtl.core.task import Description, Metric, Task, measures
from fedjax_mtl.execution import Execution, map_clients

PyTree = Any
PerClient = dict[str, jax.Array]
"""The value of each metric for every client, ``[clients]``."""


def evaluate_clients(
    algorithm: Algorithm,
    tasks: Task | Mapping[str, Task],
    execution: Execution,
    batch_size: int = 256,
) -> Callable[[PyTree, Any], Any]:
    """Returns ``(state, federation) -> {metric: [clients]}``, the loss and metrics on their rows.

    Client c of the federation is judged with the model of client c of the state. Where clients
    come in groups, tasks and federations are dicts by group, and so are the results.

    Args:
        algorithm: predicts with each client's own model.
        tasks: what the clients are judged on, by group where they come in groups.
        execution: how the clients are mapped over.
        batch_size: rows of a client that are judged at once, which bounds the memory. A client's
            loop ends with its data.

    Raises:
        InputError: one task for clients in groups, or tasks by group for clients without groups;
            when called, a group without a task, or a state of other clients.
    """
    groups = algorithm.num_clients if isinstance(algorithm.num_clients, dict) else None
    if isinstance(tasks, Task):
        if groups is not None:
            raise InputError(
                f"the clients come in groups, {sorted(groups)}, but there is one task, "
                f"{tasks.name!r}; give a dict with the task of each group"
            )
        return _judge_federation(algorithm.predict, tasks, execution, batch_size)
    if groups is None:
        raise InputError(
            f"the clients do not come in groups, but tasks are given for {sorted(tasks)}; "
            "give the one task"
        )
    return _judge_population(algorithm, tasks, execution, batch_size)


def _judge_federation(
    predict: Callable[..., PyTree], task: Task, execution: Execution, batch_size: int
) -> Callable[[PyTree, Federation], PerClient]:
    judge = _judge_clients(predict, task, execution, batch_size)

    def evaluate(state: PyTree, federation: Federation) -> PerClient:
        _check_clients(state.clients, federation, "")
        return judge(state, federation)

    return evaluate


def _judge_population(
    algorithm: Algorithm, tasks: Mapping[str, Task], execution: Execution, batch_size: int
) -> Callable[[PyTree, Population], dict[str, PerClient]]:
    def judge_group(name):
        def predict(state, client_ids, inputs):
            return algorithm.predict(state, {name: client_ids}, {name: inputs})[name]

        return _judge_clients(predict, tasks[name], execution, batch_size)

    judges = {name: judge_group(name) for name in sorted(tasks)}

    def evaluate(state: PyTree, population: Population) -> dict[str, PerClient]:
        missing = sorted(set(population) - set(judges))
        if missing:
            raise InputError(
                f"group {missing[0]!r} has no task to be judged on; "
                f"tasks are given for {sorted(judges)}"
            )
        for name, federation in population.items():
            _check_clients(state.clients[name], federation, f" in group {name!r}")
        return {name: judges[name](state, population[name]) for name in sorted(population)}

    return evaluate


def _check_clients(clients: PyTree, federation: Federation, where: str) -> None:
    """Refuses to judge the models of other clients than those whose rows are given."""
    for leaf in jax.tree.leaves(clients)[:1]:
        if leaf.shape[0] != federation.num_clients:
            raise InputError(
                f"the state has {leaf.shape[0]} clients{where} but the federation to judge has "
                f"{federation.num_clients}; adapt the state to its clients first"
            )


def _judge_clients(
    predict: Callable[..., PyTree], task: Task, execution: Execution, batch_size: int
) -> Callable[[PyTree, Federation], PerClient]:
    """The evaluation of clients that share a task; ``predict`` is of these clients alone."""
    metrics = measures(task)

    def measure_rows(shared, client_id, rows):
        """What each metric measures on these rows of a client, leaves ``[rows, ...]``."""
        state, examples = shared
        batch = jax.tree.map(lambda leaf: leaf[rows], examples)
        inputs = jax.tree.map(lambda leaf: leaf[None], batch["inputs"])
        outputs = jax.tree.map(lambda leaf: leaf[0], predict(state, client_id[None], inputs))
        return {name: metric.measure(outputs, batch["labels"]) for name, metric in metrics.items()}

    def evaluate(state, federation):
        width = min(batch_size, federation.capacity)

        def one_client(shared, client_id, rows, size):
            def sums_from(start):
                positions = start + jnp.arange(width)
                own = rows[jnp.minimum(positions, rows.shape[0] - 1)]
                values = measure_rows(shared, client_id, own)
                return jax.tree.map(lambda x: _sum_real(x, positions < size), values)

            sums = _sum_batches(sums_from, size, width)
            return {name: _value(metric, sums[name], size) for name, metric in metrics.items()}

        ids = jnp.arange(federation.num_clients, dtype=jnp.int32)
        return map_clients(one_client, execution, federation.sizes)(
            (state, federation.examples), ids, federation.indices, federation.sizes
        )

    return evaluate


def _sum_real(values: jax.Array, real: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(trees.along_first_axis(real, values), values, 0), axis=0)


def _sum_batches(sums_from: Callable[[jax.Array], PyTree], size: jax.Array, width: int) -> PyTree:
    """The sum of ``sums_from(start)`` over the starts 0, width, ... below ``size``."""

    def one_batch(carry):
        start, sums = carry
        more = sums_from(start)
        return start + width, jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, more)

    start = jnp.zeros((), jnp.int32)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
        jax.eval_shape(sums_from, start),
    )
    _, sums = jax.lax.while_loop(lambda carry: carry[0] < size, one_batch, (start, zero))
    return sums


def _value(metric: Metric, sums: PyTree, size: jax.Array) -> jax.Array:
    """A metric's value from the sums over a client's rows."""
    return sums / jnp.maximum(size, 1) if metric.finish is None else metric.finish(sums)


LEVELS = ("", "_mean", "_bottom_decile", "_worst_tenth")
"""Suffixes of the summaries that tell how well clients fare: their direction is the metric's."""

SPREAD = "_std"
"""The suffix of the summary that tells how unequally clients fare: less is always better."""


def summarise_clients(
    per_client: Mapping[str, jax.Array | np.ndarray],
    sizes: jax.Array | np.ndarray,
    descriptions: Mapping[str, Description],
) -> dict[str, jax.Array]:
    """Summaries over clients of every metric.

    ``<metric>`` is the mean weighted by the clients' numbers of examples, as the papers report it;
    ``<metric>_mean`` the unweighted mean; ``_std`` the standard deviation over clients;
    ``_bottom_decile`` the 10th percentile over clients, linearly interpolated; ``_worst_tenth``
    the mean of the ceil(clients / 10) worst. Bottom and worst are where clients fare worst: the
    lowest values where higher is better, the highest where lower is better.

    Args:
        per_client: each metric's values, ``[clients]``.
        sizes: the clients' numbers of examples, ``[clients]``.
        descriptions: how each metric is to be read, as by :func:`fedjax_mtl.tasks.describe`.
    """
    summary = {}
    shares = sizes / jnp.sum(sizes)
    tenth = -(-sizes.shape[0] // 10)
    for name, values in per_client.items():
        sign = 1.0 if descriptions[name].higher_is_better else -1.0
        ordered = jnp.sort(sign * values)
        summary[name] = jnp.sum(shares * values)
        summary[f"{name}_mean"] = jnp.mean(values)
        summary[f"{name}{SPREAD}"] = jnp.std(values)
        summary[f"{name}_bottom_decile"] = sign * jnp.percentile(ordered, 10)
        summary[f"{name}_worst_tenth"] = sign * jnp.mean(ordered[:tenth])
    return summary


def describe_summaries(descriptions: Mapping[str, Description]) -> dict[str, Description]:
    """How the summaries of these metrics are to be read; see :func:`summarise_clients`."""
    described: dict[str, Description] = {}
    for name, of_metric in descriptions.items():
        derived = of_metric._replace(primary=False)
        described |= {f"{name}{suffix}": derived for suffix in LEVELS}
        described[f"{name}{SPREAD}"] = derived._replace(higher_is_better=False)
        described[name] = of_metric
    return described
