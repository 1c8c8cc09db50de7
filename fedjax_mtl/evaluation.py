"""How well each client is served: its personalised model on its own rows, and summaries over clients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_mtl.core import trees
from fedjax_mtl.core.federation import Federation, Population
from fedjax_mtl.execution import Execution, map_clients
from fedjax_mtl.rounds.federated import Algorithm
from fedjax_mtl.tasks import PooledMetric, Task, lower_is_better

PyTree = Any


def _statistics(measures, outputs, labels):
    """What is summed for each metric, leaves ``[batch, ...]``."""
    return {
        name: (measure.statistics if isinstance(measure, PooledMetric) else measure)(
            outputs, labels
        )
        for name, measure in measures.items()
    }


def _sum_real(values: jax.Array, real: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(trees.along_first_axis(real, values), values, 0), axis=0)


def _finish(measure, total, size):
    return (
        measure.finish(total) if isinstance(measure, PooledMetric) else total / jnp.maximum(size, 1)
    )


def evaluate_clients(
    algorithm: Algorithm, task: Task, execution: Execution, batch_size: int = 256
) -> Callable[[PyTree, Federation], dict[str, jax.Array]]:
    """Returns ``(state, federation) -> {metric: [clients]}``: the task's loss and metrics over each client's rows.

    Client c of the federation is judged with the model of client c of the state. Batches bound the memory; a client's loop ends with
    its data.
    """
    measures = {"loss": task.loss, **task.metrics}

    def evaluate(state: PyTree, federation: Federation) -> dict[str, jax.Array]:
        for leaf in (
            [] if isinstance(algorithm.num_clients, dict) else jax.tree.leaves(state.clients)[:1]
        ):
            if leaf.shape[0] != federation.num_clients:
                raise ValueError(
                    f"the state has {leaf.shape[0]} clients but the federation to judge has {federation.num_clients}; "
                    "adapt the state to its clients first"
                )
        width = min(batch_size, federation.capacity)

        def one_client(shared, client_id, rows, size):
            state, examples = shared

            def sums_from(start):
                positions = start + jnp.arange(width)
                own = rows[jnp.minimum(positions, rows.shape[0] - 1)]
                batch = jax.tree.map(lambda leaf: leaf[own], examples)
                inputs = jax.tree.map(lambda x: x[None], batch["inputs"])
                outputs = algorithm.predict(state, client_id[None], inputs)
                outputs = jax.tree.map(lambda x: x[0], outputs)
                values = _statistics(measures, outputs, batch["labels"])
                return jax.tree.map(lambda x: _sum_real(x, positions < size), values)

            def one_batch(carry):
                start, totals = carry
                return start + width, jax.tree.map(
                    lambda t, x: t + x.astype(t.dtype), totals, sums_from(start)
                )

            start = jnp.zeros((), jnp.int32)
            shapes = jax.eval_shape(sums_from, start)
            zero = jax.tree.map(
                lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes
            )
            _, totals = jax.lax.while_loop(lambda carry: carry[0] < size, one_batch, (start, zero))
            return {
                name: _finish(measure, totals[name], size) for name, measure in measures.items()
            }

        ids = jnp.arange(federation.num_clients, dtype=jnp.int32)
        return map_clients(one_client, execution, federation.sizes)(
            (state, federation.examples), ids, federation.indices, federation.sizes
        )

    return evaluate


def evaluate_population(
    algorithm: Algorithm, tasks: dict[str, Task], execution: Execution, batch_size: int = 256
) -> Callable[[PyTree, Population], dict[str, dict[str, jax.Array]]]:
    """:func:`evaluate_clients` for every group of a heterogeneous population: ``(state, population) -> {group: {metric: [clients]}}``.

    Raises:
        ValueError: a group without a task.
    """

    def one_group(name):
        def predict(state, client_ids, inputs):
            return algorithm.predict(state, {name: client_ids}, {name: inputs})[name]

        return evaluate_clients(
            algorithm._replace(predict=predict), tasks[name], execution, batch_size
        )

    def evaluate(state: PyTree, population: Population) -> dict[str, dict[str, jax.Array]]:
        missing = sorted(set(population) - set(tasks))
        if missing:
            raise ValueError(
                f"group {missing[0]!r} has no task to be judged on; tasks are given for {sorted(tasks)}"
            )
        for name, federation in population.items():
            there = jax.tree.leaves(state.clients[name])
            if there and there[0].shape[0] != federation.num_clients:
                raise ValueError(
                    f"the state has {there[0].shape[0]} clients in group {name!r} but the federation to judge has "
                    f"{federation.num_clients}; adapt the state to its clients first"
                )
        return {name: one_group(name)(state, population[name]) for name in sorted(population)}

    return evaluate


def summarise_clients(per_client: dict[str, jax.Array], sizes: jax.Array) -> dict[str, jax.Array]:
    """Summaries over clients of every metric ``[clients]``.

    ``<metric>``: mean weighted by the clients' numbers of examples (as the papers report); ``_mean``: unweighted; ``_std``: standard deviation over
    clients; ``_bottom_decile``: 10th percentile over clients, linearly interpolated; ``_worst_tenth``: mean of the ceil(clients / 10) worst (lowest;
    for a loss the deciles are of the highest).
    """
    summary = {}
    shares = sizes / jnp.sum(sizes)
    tenth = -(-sizes.shape[0] // 10)
    for name, values in per_client.items():
        # "Bottom" is where clients fare worst, which for losses and errors is the top.
        sign = -1.0 if lower_is_better(name) else 1.0
        ordered = jnp.sort(sign * values)
        summary[name] = jnp.sum(shares * values)
        summary[f"{name}_mean"] = jnp.mean(values)
        summary[f"{name}_std"] = jnp.std(values)
        summary[f"{name}_bottom_decile"] = sign * jnp.percentile(ordered, 10)
        summary[f"{name}_worst_tenth"] = sign * jnp.mean(ordered[:tenth])
    return summary
