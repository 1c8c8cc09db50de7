"""A round of the methods in the dual: state, objective, the nodes' work and the server's.

MOCHA (arXiv 1705.10467), CoCoA and mini-batch SDCA minimise

    P(W) = sum_t mean_i loss(w_t . x_ti, y_ti) + penalty / 2 tr(W^T Omega W),    Sigma = Omega^-1

with one linear model a task, every task counting alike. They differ in what a node does and how its
change is scaled; all else is here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Info
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import ClientView, Cohort, Federation
from fedjax_mtl.execution import Execution, make_execution, map_clients
from fedjax_mtl.rounds.dual_ascent import Change, Subproblem, full_precision, inexactness_bound
from fedjax_mtl.rounds.engine import (
    client_key,
    client_view,
    cohort_inputs,
    is_finite,
    without,
)
from fedjax_mtl.tasks.dual import DualLoss

PyTree = Any


class DualNodes(NamedTuple):
    """What belongs to the nodes.

    Attributes:
        alpha: ``[tasks, capacity]``, the dual variables, which never travel.
        weights: ``[tasks, features]``, the models.
    """

    alpha: jax.Array
    weights: jax.Array


class DualState(NamedTuple):
    """The state of MOCHA and of the dual methods it is compared with.

    Attributes:
        round: int32 ``[]``.
        clients: the nodes'.
        dual_sums: ``[tasks, features]``, ``X_t^T alpha_t / n_t``. The model is
            ``Sigma dual_sums / penalty``.
        covariance: ``[tasks, tasks]``, Sigma.
        sigma_prime: ``[]``, its bound.
    """

    round: jax.Array
    clients: DualNodes
    dual_sums: jax.Array
    covariance: jax.Array
    sigma_prime: jax.Array


class Objective(NamedTuple):
    """The value of a state on its training data.

    Attributes:
        primal: ``[]``.
        dual: ``[]``.
        gap: ``[]``, their difference.
        losses: ``[tasks]``, each task's mean loss.
    """

    primal: jax.Array
    dual: jax.Array
    gap: jax.Array
    losses: jax.Array


def node_block(examples: PyTree, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A node's ``inputs [capacity, features]`` and ``labels [capacity]``.

    Linear models are small, so the block is gathered once a round.
    """
    return examples["inputs"][rows], examples["labels"][rows].astype(examples["inputs"].dtype)


def zero_state(
    covariance: jax.Array, capacity: int, features: int, sigma_prime: jax.Array
) -> DualState:
    """Nothing learned yet: alpha and W are 0."""
    num_tasks, dtype = covariance.shape[0], covariance.dtype
    models = jnp.zeros((num_tasks, features), dtype)
    nodes = DualNodes(jnp.zeros((num_tasks, capacity), dtype), models)
    return DualState(jnp.zeros((), jnp.int32), nodes, models, covariance, sigma_prime)


def models_of(covariance: jax.Array, dual_sums: jax.Array, penalty: float | jax.Array) -> jax.Array:
    """The models ``Sigma B / penalty``, ``[tasks, features]``, in full precision on any device."""
    return trees.mix_clients(covariance, dual_sums) / penalty


@full_precision
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

    ``D(alpha) = -sum_t mean_i conj(-alpha_ti) - 1 / (2 penalty) tr(B^T Sigma B)`` with
    ``B = dual_sums``. As long as the weights are those of alpha the gap is never negative and zero
    at the optimum for this Sigma.

    Args:
        loss: of the examples.
        penalty: lambda.
        state: whose value it is.
        federation: the training data of its tasks.
        recomputed: False if the weights are not those of alpha (``fidelity="released"``); the
            regulariser is then ``penalty / 2 tr(W^T Sigma^-1 W)`` in both values, and the dual is
            no bound.
        execution: how nodes are mapped; default all at once.
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


Work = Callable[[Subproblem, ClientView, jax.Array], Change]
"""What a node does: ``(problem, own view, key) -> Change``."""


def allowed_steps(problem: Subproblem, me: ClientView, passes: float | jax.Array) -> jax.Array:
    """The coordinate steps of ``passes`` over a node's data that it manages, int32 ``[]``.

    A node manages its share of the planned steps, and at most as many as its budget says.
    """
    planned = jnp.floor(problem.size * passes)
    managed = jnp.where(me.work < 1, jnp.floor(me.work * planned), planned)
    return jnp.minimum(managed.astype(jnp.int32), me.budget)


class LocalWork(NamedTuple):
    """What the nodes of a cohort did.

    Attributes:
        change: leaves ``[cohort, ...]``; 0 where a node is absent or diverged.
        inexactness: ``[cohort]``, bounds of the nodes' theta, or None.
        cohort: without the nodes that diverged, who count as absent.
        diverged: bool ``[cohort]``; present, but the change was not finite.
    """

    change: Change
    inexactness: jax.Array | None
    cohort: Cohort
    diverged: jax.Array


def local_work(
    work: Work,
    loss: DualLoss,
    round_index: jax.Array,
    nodes: DualNodes,
    cohort: Cohort,
    curvatures: jax.Array,
    key: jax.Array,
    execution: Execution | None,
    measure: bool,
) -> LocalWork:
    """Maps the nodes' work over a cohort.

    Args:
        work: of one node.
        loss: of the examples.
        round_index: int32 ``[]``.
        nodes: all nodes, before the round.
        cohort: who takes part.
        curvatures: ``[tasks]``, of each node's subproblem.
        key: of the round.
        execution: how nodes are mapped; default all at once.
        measure: whether to bound theta, how inexactly each subproblem was solved.
    """
    how = make_execution("vmap") if execution is None else execution

    def one_node(common, own, curvature, alpha, weights):
        examples, round_index, round_key = common
        me = client_view(examples, own, round_index, round_key)
        problem = Subproblem(*node_block(examples, me.rows), me.size, alpha, weights, curvature)
        change = work(problem, me, client_key(round_key, me.client_id))
        theta = inexactness_bound(loss, problem, change.alpha) if measure else None
        return change, theta, is_finite((change.alpha, change.combined))

    ids, data = cohort.client_ids, cohort.federation
    own = (cohort_inputs(cohort), curvatures[ids], *trees.take_clients(tuple(nodes), ids))
    change, theta, finite = map_clients(one_node, how, data.sizes)(
        (data.examples, round_index, key), *own
    )
    diverged = cohort.present & ~finite
    rest = without(cohort, diverged)
    return LocalWork(trees.mask_clients(change, rest.present), theta, rest, diverged)


def apply_changes(
    state: DualState,
    worked: LocalWork,
    step: float | jax.Array,
    penalty: float | jax.Array,
    recomputed: bool = True,
) -> DualState:
    """Adds a cohort's changes, and brings every node's model, absent or not, up to date.

    Args:
        state: before the round.
        worked: what the cohort did.
        step: factor on the changes.
        penalty: lambda.
        recomputed: False moves the models by what the changes make of them instead of computing
            them from all dual variables.
    """
    ids, change = worked.cohort.client_ids, worked.change
    alpha = state.clients.alpha.at[ids].add(step * change.alpha)
    change_of_sums = jnp.zeros_like(state.dual_sums).at[ids].add(step * change.combined)
    dual_sums = state.dual_sums + change_of_sums
    if recomputed:
        weights = models_of(state.covariance, dual_sums, penalty)
    else:
        weights = state.clients.weights + models_of(state.covariance, change_of_sums, penalty)
    return state._replace(
        round=state.round + 1, clients=DualNodes(alpha, weights), dual_sums=dual_sums
    )


def work_info(worked: LocalWork, sizes: jax.Array, dtype: Any) -> Info:
    """What a round reports of the nodes' work; scalars.

    Args:
        worked: what the cohort did.
        sizes: ``[tasks]``, examples of each task, absent ones too.
        dtype: of the counts of steps and examples.
    """
    steps, there = worked.change.num_steps, worked.cohort.present
    info = {
        "num_steps": jnp.sum(steps).astype(dtype),
        "slowest_steps": jnp.max(steps).astype(dtype),
        "num_examples": jnp.sum(jnp.asarray(sizes)).astype(dtype),
        "diverged": jnp.sum(worked.diverged).astype(jnp.float32),
        "participants": jnp.sum(there).astype(jnp.float32),
    }
    if worked.inexactness is not None:
        solved = there & (worked.cohort.federation.sizes > 0)
        theta = jnp.where(solved, worked.inexactness, 0)
        info["inexactness"] = jnp.mean(theta, where=solved)
        info["worst_inexactness"] = jnp.where(jnp.any(solved), jnp.max(theta), jnp.nan)
    return info


def mean_loss(losses: jax.Array) -> jax.Array:
    """The mean of the tasks' losses, ``[tasks] -> []``, without those that are not finite."""
    return jnp.mean(losses, where=jnp.isfinite(losses))


def round_info(
    loss: DualLoss,
    penalty: float | jax.Array,
    state: DualState,
    worked: LocalWork,
    sizes: jax.Array,
    recomputed: bool,
    execution: Execution | None,
) -> Info:
    """What a round of a dual method reports, after it; scalars.

    Beside the nodes' work it is the loss, and, if the cohort has a slot for everybody, primal, dual
    and gap.

    Args:
        loss: of the examples.
        penalty: lambda.
        state: after the round.
        worked: what the cohort did.
        sizes: ``[tasks]``, examples of each task.
        recomputed: as for :func:`objective`.
        execution: as for :func:`objective`.
    """
    ids, data = worked.cohort.client_ids, worked.cohort.federation
    # The sizes of absent nodes are 0 in their cohort, but the objective counts their examples.
    whole = data._replace(sizes=jnp.asarray(sizes)[ids])
    of_cohort = state._replace(
        clients=trees.take_clients(state.clients, ids),
        dual_sums=state.dual_sums[ids],
        covariance=state.covariance[ids][:, ids],
    )
    value = objective(loss, penalty, of_cohort, whole, recomputed=recomputed, execution=execution)
    info = work_info(worked, sizes, state.dual_sums.dtype)
    info |= {"sigma_prime": state.sigma_prime, "loss": mean_loss(value.losses)}
    if ids.shape[0] == len(sizes):
        info |= {"primal": value.primal, "dual": value.dual, "gap": value.gap}
    return info


def check_tasks(federation: Federation, loss: DualLoss) -> None:
    """Refuses tasks from which nothing can be learned; for launchers, on concrete data.

    Raises:
        InputError: a task with a single example, labels other than -1 and 1 in classification, or a
            task with one class only, naming the task.
    """
    labels, rows = np.asarray(federation.examples["labels"]), np.asarray(federation.indices)
    for task, size in enumerate(np.asarray(federation.sizes)):
        own = labels[rows[task, :size]]
        if size < 2:
            raise InputError(
                f"task {task} has {size} training example; drop it, or give it at least 2"
            )
        if loss.labels != "signs":
            continue
        odd = own[np.abs(own) != 1]
        if odd.size:
            raise InputError(f"task {task} has label {odd[0]}; the {loss.name} loss takes -1 and 1")
        if len(np.unique(own)) < 2:
            raise InputError(
                f"all {size} training labels of task {task} are {own[0]:g}; a classifier needs "
                "both classes, drop the task or split its data by class"
            )
