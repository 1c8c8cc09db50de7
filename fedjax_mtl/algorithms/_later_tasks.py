"""Tasks that arrive when MOCHA has trained the others.

Li et al. 2019, online federated multi-task learning.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_mtl.core.batching import epoch_order
from fedjax_mtl.core.federation import Federation
from fedjax_mtl.relations.covariance import Relationship
from fedjax_mtl.rounds.dual import DualNodes, DualState, node_block
from fedjax_mtl.rounds.dual_ascent import (
    Change,
    Subproblem,
    coordinate_ascent,
    full_precision,
    no_change,
)
from fedjax_mtl.rounds.engine import client_key
from fedjax_mtl.tasks.dual import DualLoss


@full_precision
def _pull(covariance: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the other tasks' weights make of the last task of a relation.

    Returns:
        The model it would have without data, and its own precision.
    """
    column = jnp.zeros(covariance.shape[0], covariance.dtype).at[-1].set(1)
    precision = jnp.linalg.solve(covariance, column)
    return -(precision[:-1] @ weights) / precision[-1], precision[-1]


class LaterTask(NamedTuple):
    """What a task that arrives later has learned.

    Attributes:
        alpha: ``[capacity]``, its dual variables.
        dual_sums: ``[features]``, ``X^T alpha / n``.
        weights: ``[features]``, its model.
    """

    alpha: jax.Array
    dual_sums: jax.Array
    weights: jax.Array


def later_task(
    loss: DualLoss,
    penalty: float | jax.Array,
    relationship: Relationship,
    state: DualState,
    task: tuple[jax.Array, jax.Array, jax.Array],
    key: jax.Array,
    *,
    passes: int,
) -> LaterTask:
    """A task that arrives when the others are done and frozen.

        w_new = (X^T alpha / n - penalty sum_t Omega_new,t w_t) / (penalty Omega_new,new)

    Li et al. 2019, online federated multi-task learning. Its relation is first
    ``relationship.extend``'s; where the rule learns, Sigma is updated once with the model found,
    and the model solved again.

    Args:
        loss: of the examples.
        penalty: lambda.
        relationship: the rule.
        state: of the other tasks.
        task: ``inputs [capacity, features]``, ``labels [capacity]``, ``size []``.
        key: of the order of the data.
        passes: over its data, for each solve.
    """
    inputs, labels, size = task
    others = state.clients.weights
    capacity = labels.shape[0]

    def solve(
        sigma: jax.Array, start: Change | None, solve_key: jax.Array
    ) -> tuple[Change, jax.Array]:
        weights, precision = _pull(sigma, others)
        alpha = jnp.zeros(capacity, others.dtype)
        problem = Subproblem(inputs, labels, size, alpha, weights, 1 / (penalty * precision))

        def one_pass(index, change):
            order = epoch_order(jax.random.fold_in(solve_key, index), size, capacity)
            return coordinate_ascent(loss, problem, order, size, capacity, start=change)

        change = jax.lax.fori_loop(0, passes, one_pass, start or no_change(problem))
        return change, weights + problem.curvature * change.combined

    first_key, second_key = jax.random.split(key)
    sigma = relationship.extend(state.covariance)
    change, weights = solve(sigma, None, first_key)
    if relationship.update is not None:
        sigma = relationship.update(jnp.concatenate([others, weights[None]]), sigma)
        change, weights = solve(sigma, change, second_key)
    return LaterTask(change.alpha, change.combined, weights)


def adapt_tasks(
    learn: Callable[..., LaterTask], state: DualState, newcomers: Federation, key: jax.Array
) -> DualState:
    """The state whose nodes are the newcomers, each as if it were the only one.

    Args:
        learn: ``((inputs, labels, size), key) -> LaterTask``.
        state: of the other tasks.
        newcomers: their data.
        key: of their training.
    """

    def one(client_id, rows, size):
        return learn((*node_block(newcomers.examples, rows), size), client_key(key, client_id))

    ids = jnp.arange(newcomers.num_clients, dtype=jnp.int32)
    own = jax.vmap(one)(ids, newcomers.indices, newcomers.sizes)
    return state._replace(clients=DualNodes(own.alpha, own.weights), dual_sums=own.dual_sums)
