"""A round of the methods in the dual: their state, its objective, the nodes' work and what the server does with it.

MOCHA (arXiv 1705.10467), CoCoA and mini-batch SDCA minimise

    P(W) = sum_t mean_i loss(w_t . x_ti, y_ti) + penalty / 2 tr(W^T Omega W),    Sigma = Omega^-1

with one linear model a task, every task counting alike. They differ in what a node does and how its change is scaled; all else is here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.core.federation import Cohort, Federation
from fedjax_mtl.execution import Execution, make_execution, map_clients
from fedjax_mtl.rounds.dual_ascent import Change, Subproblem, inexactness_bound
from fedjax_mtl.rounds.federated import client_key
from fedjax_mtl.tasks.dual import DualLoss

PyTree = Any


class DualNodes(NamedTuple):
    """What belongs to the nodes: dual variables ``alpha`` ``[tasks, capacity]``, which never travel, and models ``weights`` ``[tasks, features]``."""

    alpha: jax.Array
    weights: jax.Array


class DualState(NamedTuple):
    """The state of MOCHA and of the dual methods it is compared with.

    Attributes:
        round: int32 ``[]``.
        clients: the nodes'.
        dual_sums: ``[tasks, features]``, ``X_t^T alpha_t / n_t``. The model is ``Sigma dual_sums / penalty``.
        covariance: Sigma ``[tasks, tasks]``. sigma_prime: ``[]``, its bound.
    """

    round: jax.Array
    clients: DualNodes
    dual_sums: jax.Array
    covariance: jax.Array
    sigma_prime: jax.Array


class Objective(NamedTuple):
    """Primal and dual value and their difference, ``[]`` each; ``losses`` ``[tasks]``, each task's mean loss."""

    primal: jax.Array
    dual: jax.Array
    gap: jax.Array
    losses: jax.Array


def node_block(examples: PyTree, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A node's ``inputs [capacity, features]`` and ``labels [capacity]``; linear models are small, so the block is gathered once a round."""
    return examples["inputs"][rows], examples["labels"][rows].astype(examples["inputs"].dtype)


def zero_state(
    covariance: jax.Array, capacity: int, features: int, sigma_prime: jax.Array
) -> DualState:
    """Nothing learned yet: alpha and W are 0."""
    num_tasks, dtype = covariance.shape[0], covariance.dtype
    models = jnp.zeros((num_tasks, features), dtype)
    nodes = DualNodes(jnp.zeros((num_tasks, capacity), dtype), models)
    return DualState(jnp.zeros((), jnp.int32), nodes, models, covariance, sigma_prime)


def objective(
    loss: DualLoss,
    penalty: float | jax.Array,
    state: DualState,
    federation: Federation,
    *,
    recomputed: bool = True,
    execution: Execution | None = None,
) -> Objective:
    """``P(W)``, ``D(alpha)`` and the gap of a state on its training data.

    ``D(alpha) = -sum_t mean_i conj(-alpha_ti) - 1 / (2 penalty) tr(B^T Sigma B)`` with ``B = dual_sums``. As long as the weights are those of alpha the gap is never negative and zero at the
    optimum for this Sigma.

    Args:
        recomputed: False if the weights are not those of alpha (``fidelity="released"``); the regulariser is then ``penalty / 2 tr(W^T Sigma^-1 W)``
            in both values, and the dual is no bound.
    """
    how = make_execution("vmap") if execution is None else execution

    def one_node(examples, rows, size, alpha, weights):
        inputs, labels = node_block(examples, rows)
        node = Subproblem(inputs, labels, size, alpha, weights, jnp.zeros(()))
        return node.mean(loss.loss(inputs @ weights, labels)), node.mean(
            loss.conjugate(alpha, labels)
        )

    losses, conjugates = map_clients(one_node, how)(
        federation.examples, federation.indices, federation.sizes, *state.clients
    )
    weights = state.clients.weights
    if recomputed:
        regulariser = jnp.sum(state.dual_sums * weights) / 2
    else:
        regulariser = penalty / 2 * jnp.sum(weights * jnp.linalg.solve(state.covariance, weights))
    primal, dual = jnp.sum(losses) + regulariser, -jnp.sum(conjugates) - regulariser
    return Objective(primal, dual, primal - dual, losses)


def predict_linear(state: PyTree, client_ids: jax.Array, inputs: jax.Array) -> jax.Array:
    """Scores of each node's own model, ``[clients, batch, features] -> [clients, batch]``."""
    return jnp.einsum("cbf,cf->cb", inputs, state.clients.weights[client_ids])


def traffic_of_models(state: PyTree) -> tuple[int, int]:
    """A node sends and receives one number a feature."""
    one = state.clients.weights.shape[-1] * state.clients.weights.dtype.itemsize
    return one, one


class _Own(NamedTuple):
    """One node's inputs of a round."""

    client_id: jax.Array
    rows: jax.Array
    size: jax.Array
    budget: jax.Array
    curvature: jax.Array


class LocalWork(NamedTuple):
    """The nodes' changes, leaves ``[cohort, ...]``, and the bounds of their theta ``[cohort]`` or None."""

    change: Change
    inexactness: jax.Array | None


def local_work(
    work: Callable[[Subproblem, Any, jax.Array], Change],
    loss: DualLoss,
    state: DualState,
    cohort: Cohort,
    curvatures: jax.Array,
    key: jax.Array,
    execution: Execution | None,
    measure: bool,
) -> LocalWork:
    """Maps ``work(problem, own, key) -> Change`` over the cohort's nodes.

    Args:
        curvatures: ``[tasks]``, of each node's subproblem. measure: whether to bound theta, how inexactly each was solved.
    """
    how = make_execution("vmap") if execution is None else execution

    def one_node(shared, own, alpha, weights):
        examples, round_key = shared
        inputs, labels = node_block(examples, own.rows)
        problem = Subproblem(inputs, labels, own.size, alpha, weights, own.curvature)
        change = work(problem, own, client_key(round_key, own.client_id))
        return LocalWork(
            change, inexactness_bound(loss, problem, change.alpha) if measure else None
        )

    ids, data = cohort.client_ids, cohort.federation
    own = _Own(ids, data.indices, data.sizes, cohort.budgets, curvatures[ids])
    return map_clients(one_node, how, data.sizes)(
        (data.examples, key), own, state.clients.alpha[ids], state.clients.weights[ids]
    )


def apply_changes(
    state: DualState,
    cohort: Cohort,
    change: Change,
    step: float | jax.Array,
    penalty: float | jax.Array,
    recomputed: bool = True,
) -> DualState:
    """Adds ``step`` times the cohort's changes, and brings every node's model, absent or not, up to date.

    A node whose change is not finite counts as absent.
    """
    finite = jnp.isfinite(change.combined).all(axis=1) & jnp.isfinite(change.alpha).all(axis=1)
    there = (cohort.present & finite)[:, None]
    ids = cohort.client_ids
    alpha = state.clients.alpha.at[ids].add(jnp.where(there, step * change.alpha, 0))
    change_of_sums = (
        jnp.zeros_like(state.dual_sums).at[ids].add(jnp.where(there, step * change.combined, 0))
    )
    dual_sums = state.dual_sums + change_of_sums
    if recomputed:
        weights = state.covariance @ dual_sums / penalty
    else:
        weights = state.clients.weights + state.covariance @ change_of_sums / penalty
    return state._replace(
        round=state.round + 1, clients=DualNodes(alpha, weights), dual_sums=dual_sums
    )


def round_metrics(
    loss: DualLoss,
    penalty: float | jax.Array,
    state: DualState,
    cohort: Cohort,
    sizes: jax.Array,
    worked: LocalWork,
    recomputed: bool,
    execution: Execution | None,
) -> dict[str, jax.Array]:
    """What a round of a dual method reports: work, bounds, loss, and, when everybody takes part, primal, dual and gap; scalars."""
    steps = jnp.where(cohort.present, worked.change.num_steps, 0)
    metrics = {
        "num_steps": jnp.sum(steps).astype(state.dual_sums.dtype),
        "slowest_steps": jnp.max(steps).astype(state.dual_sums.dtype),
        "num_examples": jnp.sum(jnp.asarray(sizes)).astype(state.dual_sums.dtype),
        "sigma_prime": state.sigma_prime,
    }
    if worked.inexactness is not None:
        there = cohort.present & (cohort.federation.sizes > 0)
        theta = jnp.where(there, worked.inexactness, 0)
        metrics["inexactness"] = jnp.sum(theta) / jnp.maximum(jnp.sum(there), 1)
        metrics["worst_inexactness"] = jnp.max(theta)
    everybody = cohort.client_ids.shape[0] == len(sizes)
    # The sizes of absent nodes are 0 in their cohort, but the objective counts their examples.
    ids = cohort.client_ids
    whole = cohort.federation._replace(sizes=jnp.asarray(sizes)[ids])
    of_cohort = state._replace(
        clients=jax.tree.map(lambda x: x[ids], state.clients),
        dual_sums=state.dual_sums[ids],
        covariance=state.covariance[ids][:, ids],
    )
    value = objective(loss, penalty, of_cohort, whole, recomputed=recomputed, execution=execution)
    metrics["loss"] = jnp.mean(value.losses)
    if everybody:
        metrics |= {"primal": value.primal, "dual": value.dual, "gap": value.gap}
    return metrics


def check_tasks(federation: Federation, loss: DualLoss) -> None:
    """Refuses tasks from which nothing can be learned; for launchers, on data that are not abstract.

    Raises:
        ValueError: a task with a single example, labels other than -1 and 1 in classification, or a task with one class only, naming the task.
    """
    labels, rows = np.asarray(federation.examples["labels"]), np.asarray(federation.indices)
    for task, size in enumerate(np.asarray(federation.sizes)):
        own = labels[rows[task, :size]]
        if size < 2:
            raise ValueError(
                f"task {task} has {size} training example; drop it, or give it at least 2"
            )
        if loss.labels != "signs":
            continue
        odd = own[np.abs(own) != 1]
        if odd.size:
            raise ValueError(f"task {task} has label {odd[0]}; the {loss.name} loss takes -1 and 1")
        if len(np.unique(own)) < 2:
            raise ValueError(
                f"all {size} training labels of task {task} are {own[0]:g}; a classifier needs both classes, drop the task or split "
                "its data by class"
            )
