"""How well each client is served: its personalised model on its own rows, and summaries over clients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_mtl.algorithm import Algorithm
from fedjax_mtl.execution import Execution, map_clients
from fedjax_mtl.federation import Federation
from fedjax_mtl.tasks import Task

PyTree = Any


def evaluate_clients(
    algorithm: Algorithm, task: Task, execution: Execution, batch_size: int = 256
) -> Callable[[PyTree, Federation], dict[str, jax.Array]]:
    """Returns ``(state, federation) -> {metric: [clients]}``: the task's loss and metrics, averaged over each client's rows.

    Client c of the federation is judged with the model of client c of the state. Batches bound the memory; a client's loop ends with
    its data.
    """
    measures = {"loss": task.loss, **task.metrics}

    def evaluate(state: PyTree, federation: Federation) -> dict[str, jax.Array]:
        for leaf in jax.tree.leaves(state.clients)[:1]:
            if leaf.shape[0] != federation.num_clients:
                raise ValueError(
                    f"the state has {leaf.shape[0]} clients but the federation to judge has {federation.num_clients}; "
                    "adapt the state to its clients first"
                )
        width = min(batch_size, federation.capacity)

        def one_client(shared, client_id, rows, size):
            state, examples = shared

            def one_batch(carry):
                start, totals = carry
                positions = start + jnp.arange(width)
                own = rows[jnp.minimum(positions, rows.shape[0] - 1)]
                batch = jax.tree.map(lambda leaf: leaf[own], examples)
                inputs = jax.tree.map(lambda x: x[None], batch["inputs"])
                outputs = algorithm.predict(state, client_id[None], inputs)
                outputs = jax.tree.map(lambda x: x[0], outputs)
                real = positions < size
                sums = {
                    name: jnp.sum(jnp.where(real, measure(outputs, batch["labels"]), 0))
                    for name, measure in measures.items()
                }
                return start + width, jax.tree.map(lambda t, x: t + x.astype(t.dtype), totals, sums)

            zero = {name: jnp.zeros(()) for name in measures}
            start = (jnp.zeros((), jnp.int32), zero)
            _, totals = jax.lax.while_loop(lambda carry: carry[0] < size, one_batch, start)
            return jax.tree.map(lambda t: t / jnp.maximum(size, 1), totals)

        ids = jnp.arange(federation.num_clients, dtype=jnp.int32)
        return map_clients(one_client, execution, federation.sizes)(
            (state, federation.examples), ids, federation.indices, federation.sizes
        )

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
        sign = -1.0 if name == "loss" or name.endswith("error") else 1.0
        ordered = jnp.sort(sign * values)
        summary[name] = jnp.sum(shares * values)
        summary[f"{name}_mean"] = jnp.mean(values)
        summary[f"{name}_std"] = jnp.std(values)
        summary[f"{name}_bottom_decile"] = sign * jnp.percentile(ordered, 10)
        summary[f"{name}_worst_tenth"] = sign * jnp.mean(ordered[:tenth])
    return summary
