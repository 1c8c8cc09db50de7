"""Mini-batch subgradient descent on MOCHA's primal.

As in MOCHA's experiments (arXiv 1705.10467, section 5); the formulas are those of its released
code.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_mtl.algorithms._mocha import Order, order_of
from fedjax_mtl.core.algorithm import Algorithm, Info
from fedjax_mtl.core.checks import check_fidelity
from fedjax_mtl.core.federation import ClientView, Cohort, Federation
from fedjax_mtl.execution import Execution, make_execution, map_clients
from fedjax_mtl.relations.covariance import Relationship
from fedjax_mtl.rounds.dual import (
    DualNodes,
    LocalWork,
    allowed_steps,
    local_work,
    mean_loss,
    node_block,
    predict_linear,
    traffic_of_models,
    work_info,
)
from fedjax_mtl.rounds.dual_ascent import Change, Subproblem, full_precision, no_change
from fedjax_mtl.tasks.dual import DualLoss


class PrimalNodes(NamedTuple):
    """Nodes without dual variables: ``weights`` ``[tasks, features]``."""

    weights: jax.Array


class PrimalState(NamedTuple):
    """The state of a primal method; ``covariance`` as MOCHA's."""

    round: jax.Array
    clients: PrimalNodes
    covariance: jax.Array


class MinibatchSGD(NamedTuple):
    """What :func:`minibatch_sgd` was asked for; its arguments explain each."""

    loss: DualLoss
    sizes: jax.Array
    capacity: int
    features: int
    penalty: float | jax.Array
    relationship: Relationship
    passes: float
    scaling: float
    order: Order
    released: bool
    dtype: Any
    execution: Execution | None


def minibatch_sgd(
    loss: DualLoss,
    *,
    sizes: jax.Array,
    capacity: int,
    features: int,
    penalty: float | jax.Array,
    relationship: Relationship,
    passes: float = 1.0,
    scaling: float = 0.1,
    order: str | Order = "random",
    fidelity: str = "paper",
    dtype: Any = jnp.float32,
    execution: Execution | None = None,
) -> Algorithm:
    """Mini-batch subgradient descent on MOCHA's primal, steps ``scaling / (round + 1)``.

    ``paper``: ``W <- W - scaling / h (penalty Omega W + gradient_t)``, the gradient of the mean
    loss over ``floor(passes n_t)`` of the node's examples (fewer if it manages less). ``released``:
    ``W <- (I - scaling / h Omega) W - scaling / b (summed gradients)``, b the examples of all
    nodes, then ``||w_t||`` is cut to ``1 / sqrt(penalty)``; its data term has a constant step and
    its decay no penalty, so its fixed point is not MOCHA's.

    It has no way to start a newcomer but the untrained model.

    Args:
        loss: as for :func:`mocha`.
        sizes: as for :func:`mocha`.
        capacity: as for :func:`mocha`.
        features: as for :func:`mocha`.
        penalty: as for :func:`mocha`.
        relationship: as for :func:`mocha`; Sigma stays as it starts.
        passes: examples of a step, in passes over the node's data.
        scaling: of the steps.
        order: as for :func:`mocha`.
        fidelity: ``paper`` or ``released``, see above.
        dtype: as for :func:`mocha`.
        execution: as for :func:`mocha`.
    """
    check_fidelity(fidelity)
    method = MinibatchSGD(
        loss=loss,
        sizes=sizes,
        capacity=capacity,
        features=features,
        penalty=penalty,
        relationship=relationship,
        passes=passes,
        scaling=scaling,
        order=order_of(order),
        released=fidelity == "released",
        dtype=dtype,
        execution=execution,
    )
    return Algorithm(
        init=functools.partial(_init_sgd, method),
        round=functools.partial(_sgd_round, method),
        predict=predict_linear,
        adapt=functools.partial(_adapt_sgd, method),
        traffic=traffic_of_models,
        num_clients=len(sizes),
    )


def _init_sgd(method: MinibatchSGD, key: jax.Array) -> PrimalState:
    del key
    count = len(method.sizes)
    nodes = PrimalNodes(jnp.zeros((count, method.features), method.dtype))
    sigma = method.relationship.init(count, method.dtype)
    return PrimalState(jnp.zeros((), jnp.int32), nodes, sigma)


@full_precision
def _summed_gradient(
    method: MinibatchSGD,
    round_index: jax.Array,
    problem: Subproblem,
    me: ClientView,
    key: jax.Array,
) -> Change:
    """The gradient over some of a node's examples, summed, as if it were a change."""
    count = jnp.minimum(allowed_steps(problem, me, method.passes), problem.size)
    order = method.order(key, round_index, problem.size, method.capacity)
    counted = jnp.zeros(method.capacity, bool).at[order].max(jnp.arange(method.capacity) < count)
    scores = problem.inputs @ problem.weights
    slopes = jax.vmap(jax.grad(method.loss.loss))(scores, problem.labels)
    total = jnp.where(counted, slopes, 0) @ problem.inputs
    return no_change(problem)._replace(combined=total, num_steps=count)


def _sgd_round(
    method: MinibatchSGD, state: PrimalState, cohort: Cohort, key: jax.Array
) -> tuple[PrimalState, Info]:
    count = len(method.sizes)
    # Subproblems hold a node's data; its dual variables are not used.
    unused = jnp.zeros((count, method.capacity), method.dtype)
    worked = local_work(
        functools.partial(_summed_gradient, method, state.round),
        method.loss,
        state.round,
        DualNodes(unused, state.clients.weights),
        cohort,
        jnp.zeros(count, method.dtype),
        key,
        method.execution,
        False,
    )
    step = _released_step if method.released else _paper_step
    clients = PrimalNodes(step(method, state, worked))
    state = PrimalState(state.round + 1, clients, state.covariance)
    return state, _primal_info(method, state, worked)


def _decayed(method: MinibatchSGD, state: PrimalState) -> tuple[jax.Array, jax.Array]:
    """The step size of the round, and ``Omega W``."""
    rate = method.scaling / (state.round + 1).astype(method.dtype)
    return rate, jnp.linalg.solve(state.covariance, state.clients.weights)


def _paper_step(method: MinibatchSGD, state: PrimalState, worked: LocalWork) -> jax.Array:
    """The models after a step along the gradient of the objective."""
    weights, change = state.clients.weights, worked.change
    rate, decayed = _decayed(method, state)
    mean = change.combined / jnp.maximum(change.num_steps, 1)[:, None]
    data_step = jnp.zeros_like(weights).at[worked.cohort.client_ids].add(mean)
    return weights - rate * (method.penalty * decayed + data_step)


def _released_step(method: MinibatchSGD, state: PrimalState, worked: LocalWork) -> jax.Array:
    """The models after the released code's step, cut to its ball."""
    weights, change, dtype = state.clients.weights, worked.change, method.dtype
    rate, decayed = _decayed(method, state)
    shared = method.scaling / jnp.maximum(jnp.sum(change.num_steps), 1).astype(dtype)
    ids = worked.cohort.client_ids
    data_step = jnp.zeros_like(weights).at[ids].add(shared * change.combined)
    weights = weights - rate * decayed - data_step
    norms = jnp.linalg.norm(weights, axis=1, keepdims=True)
    norms = jnp.maximum(norms, jnp.finfo(dtype).tiny)
    return jnp.minimum(1, 1 / (jnp.sqrt(method.penalty) * norms)) * weights


@full_precision
def _primal_info(method: MinibatchSGD, state: PrimalState, worked: LocalWork) -> Info:
    """What a round reports, after it; scalars."""
    loss, dtype = method.loss, method.dtype
    how = make_execution("vmap") if method.execution is None else method.execution

    def one_node(examples, rows, size, weights):
        inputs, labels = node_block(examples, rows)
        unused = jnp.zeros(())
        problem = Subproblem(inputs, labels, size, unused, weights, unused)
        return problem.mean(loss.loss(inputs @ weights, labels))

    data, ids = worked.cohort.federation, worked.cohort.client_ids
    weights = state.clients.weights
    own_sizes = jnp.asarray(method.sizes)[ids]
    losses = map_clients(one_node, how)(data.examples, data.indices, own_sizes, weights[ids])
    info = work_info(worked, method.sizes, dtype) | {"loss": mean_loss(losses)}
    if ids.shape[0] == len(method.sizes):
        decay = jnp.sum(weights * jnp.linalg.solve(state.covariance, weights))
        info["primal"] = jnp.sum(losses) + method.penalty / 2 * decay
    return info


def _adapt_sgd(
    method: MinibatchSGD, state: PrimalState, newcomers: Federation, key: jax.Array
) -> PrimalState:
    del key
    shape = (newcomers.num_clients, method.features)
    return state._replace(clients=PrimalNodes(jnp.zeros(shape, method.dtype)))
