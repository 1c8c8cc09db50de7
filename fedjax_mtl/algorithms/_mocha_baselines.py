"""What MOCHA is compared with: CoCoA, mini-batch SDCA, mini-batch SGD, one model a task, one model for all.

As in MOCHA's experiments (arXiv 1705.10467, section 5; the formulas are those of its released code), all of the first three solve MOCHA's problem.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_mtl.algorithms._mocha import ORDERS, Order, adapt_tasks, later_task, mocha
from fedjax_mtl.core.federation import NO_BUDGET, Cohort
from fedjax_mtl.execution import Execution, make_execution, map_clients
from fedjax_mtl.relations import covariance
from fedjax_mtl.relations.covariance import Relationship
from fedjax_mtl.rounds.dual import (
    DualNodes,
    DualState,
    apply_changes,
    local_work,
    predict_linear,
    round_metrics,
    traffic_of_models,
    zero_state,
)
from fedjax_mtl.rounds.dual_ascent import Subproblem, coordinate_ascent, no_change
from fedjax_mtl.rounds.federated import Algorithm
from fedjax_mtl.tasks.dual import DualLoss

PyTree = Any

_RELEASED_MAX_STEPS = 999


def cocoa(
    loss: DualLoss,
    *,
    inexactness: float = 0.5,
    max_passes: int = 50,
    fidelity: str = "paper",
    **settings: Any,
) -> Algorithm:
    """CoCoA (Jaggi et al., arXiv 1409.1458; Ma et al., arXiv 1502.03508) on MOCHA's problem: one common theta for all nodes and rounds.

    Every node works until its theta is certainly at most ``inexactness``, however long that takes: a round costs as much as its slowest node (metric ``slowest_steps``).

    ``fidelity="released"`` is the stopping test of MOCHA's code: a local gap, in mixed normalisations and compared as it is, not relative, with ``inexactness``,
    tested after steps 1, 6, 11, ...; at most 999 steps; and once a node has used them up, the nodes after it are not tested any more. In practice it is met at once or never. It
    needs the hinge loss, and Sigma fixed.

    Args:
        settings: as for :func:`fedjax_mtl.algorithms._mocha.mocha`, without ``passes``.
    """
    if fidelity == "released":
        return _released_cocoa(loss, inexactness, **settings)
    return mocha(loss, inexactness=inexactness, passes=max_passes, fidelity=fidelity, **settings)


def _released_cocoa(loss: DualLoss, inexactness: float, **settings: Any) -> Algorithm:
    """CoCoA as coded: the steps that its test allows, found first, are MOCHA's budgets."""
    capacity, penalty = settings["capacity"], settings["penalty"]
    order = settings.get("order", "random")
    draw_order = ORDERS[order] if isinstance(order, str) else order
    method = mocha(loss, passes=_RELEASED_MAX_STEPS, max_steps=_RELEASED_MAX_STEPS, **settings)

    def one_round(state, cohort, key):
        total = jnp.sum(jnp.asarray(settings["sizes"]))
        covariances = jnp.diagonal(state.covariance)
        precisions = jnp.diagonal(jnp.linalg.inv(state.covariance))

        def steps_until(problem, own, order_key):
            chosen = draw_order(order_key, state.round, problem.size, capacity)
            sizes = (
                covariances[own.client_id],
                precisions[own.client_id],
                state.sigma_prime,
                penalty,
                total,
            )
            steps = _released_steps(loss, problem, chosen, inexactness, sizes)
            return no_change(problem)._replace(num_steps=steps)

        curvatures = state.sigma_prime * covariances / penalty
        tested = local_work(
            steps_until, loss, state, cohort, curvatures, key, settings.get("execution"), False
        )
        steps = tested.change.num_steps
        # A node counts its steps plus one; the first to reach the limit ends the testing of those behind it.
        capped = (steps >= _RELEASED_MAX_STEPS) & cohort.present
        behind = jnp.cumsum(capped) - capped > 0
        budgets = jnp.where(behind, _RELEASED_MAX_STEPS, steps)
        return method.round(
            state, cohort._replace(budgets=jnp.minimum(budgets, cohort.budgets)), key
        )

    return method._replace(round=one_round)


def _released_steps(loss, problem: Subproblem, order, inexactness, sizes) -> jax.Array:
    """Steps until the released code's local gap is at most ``inexactness``, int32 ``[]``, in blocks of 1, 5, 5, ..."""
    covariance, precision, sigma_prime, penalty, total = sizes
    n = jnp.maximum(problem.size, 1)

    def gap(change):
        alpha = problem.alpha + change.alpha
        # The code's W moves by Sigma_tt / lambda, without sigma'.
        weights = problem.weights + covariance / penalty * change.combined
        sums = problem.combine(alpha)
        dual = problem.mean(alpha * problem.labels) - weights @ sums
        dual -= sigma_prime / (2 * penalty) * covariance**2 * jnp.sum(jnp.square(sums))
        losses = n * problem.mean(loss.loss(problem.inputs @ weights, problem.labels)) / total
        return (
            losses
            + penalty / (2 * sigma_prime) * precision**2 * jnp.sum(jnp.square(weights))
            - dual
        )

    def body(carry):
        steps, change, _ = carry
        block = jnp.minimum(jnp.where(steps == 0, 1, 5), _RELEASED_MAX_STEPS - steps)
        turned = jnp.take(order, (jnp.arange(order.shape[0]) + steps) % n)
        change = coordinate_ascent(loss, problem, turned, block, 5, start=change)
        # A last block cut short by the limit ends between two tests.
        tested = (steps == 0) | (block == 5)
        return steps + block, change, jnp.where(tested, gap(change), jnp.inf)

    start = (
        jnp.zeros((), jnp.int32),
        no_change(problem),
        jnp.asarray(jnp.inf, problem.weights.dtype),
    )
    steps, _, _ = jax.lax.while_loop(
        lambda carry: (carry[2] > inexactness) & (carry[0] < _RELEASED_MAX_STEPS), body, start
    )
    return steps


def minibatch_sdca(
    loss: DualLoss,
    *,
    sizes: jax.Array,
    capacity: int,
    features: int,
    penalty: float | jax.Array,
    relationship: Relationship,
    passes: float = 1.0,
    scaling: float = 10.0,
    order: str | Order = "random",
    adaptation_passes: int = 100,
    dtype: Any = jnp.float32,
    execution: Execution | None = None,
) -> Algorithm:
    """Mini-batch SDCA (Takac et al., arXiv 1507.08322): coordinate steps that do not see each other's effect on the model, applied in part.

    All alphas are maximised at the round's W; the change is scaled by ``scaling / (coordinate steps of all nodes)``, at most 1, with scaling from 1 to that number (to be tuned; the released code's driver: 10).
    Sigma stays as ``relationship`` starts. Other settings as for MOCHA.
    """
    draw_order = ORDERS[order] if isinstance(order, str) else order
    num_tasks, max_steps = len(sizes), int(capacity * passes)

    def init(key):
        del key
        covariance = relationship.init(num_tasks, dtype)
        return zero_state(covariance, capacity, features, jnp.ones((), dtype))

    def one_round(state, cohort, key):
        def work(problem, own, order_key):
            planned = jnp.floor(problem.size * passes).astype(jnp.int32)
            chosen = draw_order(order_key, state.round, problem.size, capacity)
            budget = jnp.minimum(planned, own.budget)
            return coordinate_ascent(loss, problem, chosen, budget, max_steps, feedback=False)

        curvatures = jnp.diagonal(state.covariance) / penalty
        worked = local_work(work, loss, state, cohort, curvatures, key, execution, False)
        # Beyond 1 the duals would leave their domain: few steps, as when nodes fail, are applied in full.
        step = jnp.minimum(
            scaling / jnp.maximum(jnp.sum(worked.change.num_steps), 1).astype(dtype), 1
        )
        state = apply_changes(state, cohort, worked.change, step, penalty)
        return state, round_metrics(loss, penalty, state, cohort, sizes, worked, True, execution)

    def adapt(state, newcomers, key):
        def learn(task, own_key):
            return later_task(loss, penalty, relationship, state, task, adaptation_passes, own_key)

        return adapt_tasks(learn, state, newcomers, key)

    return Algorithm(init, one_round, predict_linear, adapt, traffic_of_models, num_tasks)


class PrimalNodes(NamedTuple):
    """Nodes without dual variables: ``weights`` ``[tasks, features]``."""

    weights: jax.Array


class PrimalState(NamedTuple):
    """The state of a primal method; ``covariance`` as MOCHA's."""

    round: jax.Array
    clients: PrimalNodes
    covariance: jax.Array


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

    ``paper``: ``W <- W - scaling / h (penalty Omega W + gradient_t)``, the gradient of the mean loss over ``floor(passes n_t)`` of the node's examples (fewer with a smaller budget). ``released``:
    ``W <- (I - scaling / h Omega) W - scaling / b (summed gradients)``, b the examples of all nodes, then ``||w_t||`` is cut to ``1 / sqrt(penalty)``; its
    data term has a constant step and its decay no penalty, so its fixed point is not MOCHA's.

    It has no way to start a newcomer but the untrained model.
    """
    if fidelity not in ("paper", "released"):
        raise ValueError(f"fidelity must be 'paper' or 'released', got {fidelity!r}")
    draw_order = ORDERS[order] if isinstance(order, str) else order
    num_tasks = len(sizes)
    how = make_execution("vmap") if execution is None else execution
    score_gradient = jax.vmap(jax.grad(loss.loss))

    def init(key):
        del key
        nodes = PrimalNodes(jnp.zeros((num_tasks, features), dtype))
        return PrimalState(jnp.zeros((), jnp.int32), nodes, relationship.init(num_tasks, dtype))

    def one_round(state, cohort, key):
        def summed_gradient(problem, own, order_key):
            planned = jnp.floor(problem.size * passes).astype(jnp.int32)
            count = jnp.minimum(jnp.minimum(planned, own.budget), problem.size)
            chosen = draw_order(order_key, state.round, problem.size, capacity)
            counted = jnp.zeros(capacity, bool).at[chosen].max(jnp.arange(capacity) < count)
            slopes = score_gradient(problem.inputs @ problem.weights, problem.labels)
            total = jnp.where(counted, slopes, 0) @ problem.inputs
            return no_change(problem)._replace(combined=total, num_steps=count)

        # Subproblems hold a node's data; its dual variables are not used.
        unused = jnp.zeros((num_tasks, capacity), dtype)
        seen = state._replace(clients=DualNodes(unused, state.clients.weights))
        zeros = jnp.zeros(num_tasks, dtype)
        worked = local_work(summed_gradient, loss, seen, cohort, zeros, key, execution, False)
        steps = jnp.where(cohort.present, worked.change.num_steps, 0)
        gradient = jnp.where(cohort.present[:, None], worked.change.combined, 0)
        weights, rate = state.clients.weights, scaling / (state.round + 1).astype(dtype)
        decayed = jnp.linalg.solve(state.covariance, weights)
        if fidelity == "released":
            shared = scaling / jnp.maximum(jnp.sum(steps), 1).astype(dtype)
            data_step = jnp.zeros_like(weights).at[cohort.client_ids].add(shared * gradient)
            weights = weights - rate * decayed - data_step
            norms = jnp.maximum(
                jnp.linalg.norm(weights, axis=1, keepdims=True), jnp.finfo(dtype).tiny
            )
            weights = jnp.minimum(1, 1 / (jnp.sqrt(penalty) * norms)) * weights
        else:
            mean = gradient / jnp.maximum(steps, 1)[:, None]
            data_step = jnp.zeros_like(weights).at[cohort.client_ids].add(mean)
            weights = weights - rate * (penalty * decayed + data_step)
        state = PrimalState(state.round + 1, PrimalNodes(weights), state.covariance)
        return state, metrics(state, cohort, steps)

    def metrics(state, cohort, steps):
        def one_node(examples, rows, size, weights):
            inputs, labels = examples["inputs"][rows], examples["labels"][rows]
            problem = Subproblem(inputs, labels, size, jnp.zeros(()), weights, jnp.zeros(()))
            return problem.mean(loss.loss(inputs @ weights, labels))

        data, ids = cohort.federation, cohort.client_ids
        own_sizes = jnp.asarray(sizes)[ids]
        losses = map_clients(one_node, how)(
            data.examples, data.indices, own_sizes, state.clients.weights[ids]
        )
        reports = {
            "loss": jnp.mean(losses),
            "num_steps": jnp.sum(steps).astype(dtype),
            "slowest_steps": jnp.max(steps).astype(dtype),
            "num_examples": jnp.sum(jnp.asarray(sizes)).astype(dtype),
        }
        if ids.shape[0] == num_tasks:
            weights = state.clients.weights
            precision = jnp.sum(weights * jnp.linalg.solve(state.covariance, weights))
            reports["primal"] = jnp.sum(losses) + penalty / 2 * precision
        return reports

    def adapt(state, newcomers, key):
        del key
        return state._replace(
            clients=PrimalNodes(jnp.zeros((newcomers.num_clients, features), dtype))
        )

    return Algorithm(init, one_round, predict_linear, adapt, traffic_of_models, num_tasks)


class PooledState(NamedTuple):
    """The state of :func:`global_model`: every node's copy of the model, and the ``pool``, MOCHA's state of a single task."""

    round: jax.Array
    clients: PrimalNodes
    pool: DualState


# How MOCHA's released code trains the models that it compares with.
_RELEASED_TRAINING = {"order": "cyclic", "tolerance": 1e-5, "passes": 500}


def _training(fidelity: str, passes: float, order: str | Order) -> dict[str, Any]:
    if fidelity not in ("paper", "released"):
        raise ValueError(f"fidelity must be 'paper' or 'released', got {fidelity!r}")
    return {"passes": passes, "order": order} if fidelity == "paper" else _RELEASED_TRAINING


def local_models(
    loss: DualLoss,
    *,
    passes: float = 1.0,
    order: str | Order = "random",
    fidelity: str = "paper",
    **settings: Any,
) -> Algorithm:
    """One model a task, alone: ``mean loss + penalty / 2 ||w||^2``. Settings as for MOCHA, without the relationship.

    ``fidelity="released"``: one round is the whole training, passes in the order of storage until a task's primal changes by less than 1e-5 from one to the next, at most 500. The
    primal is not monotone, so a task may stop early: its test errors are those of the code, not of the optimum. ``passes`` and ``order`` do not apply.
    """
    alone = covariance.independent(1.0)
    return mocha(loss, relationship=alone, **_training(fidelity, passes, order), **settings)


def global_model(
    loss: DualLoss,
    *,
    sizes: jax.Array,
    capacity: int,
    features: int,
    penalty: float | jax.Array,
    passes: float = 1.0,
    order: str | Order = "random",
    fidelity: str = "paper",
    dtype: Any = jnp.float32,
) -> Algorithm:
    """One model for all: ``mean loss + penalty / 2 ||w||^2`` over the pooled examples, as if they lay in one place; every node predicts with it.

    ``fidelity="released"``: one round is the whole training, as in :func:`local_models`. A round is else ``passes`` passes of coordinate ascent over the pool, in an order of its own. It is centralised training, not a federated method: it needs a cohort with a slot for every
    node, and whether they are absent or slow does not matter to it.
    """
    num_tasks = len(sizes)
    pooled = mocha(
        loss,
        sizes=jnp.sum(jnp.asarray(sizes))[None],
        capacity=num_tasks * capacity,
        features=features,
        penalty=penalty,
        relationship=covariance.independent(1.0),
        dtype=dtype,
        **_training(fidelity, passes, order),
    )

    def init(key):
        return everybody(pooled.init(key), num_tasks)

    def everybody(pool, count):
        weights = jnp.broadcast_to(pool.clients.weights, (count, features))
        return PooledState(pool.round, PrimalNodes(weights), pool)

    def one_round(state, cohort, key):
        if cohort.client_ids.shape[0] != num_tasks:
            raise ValueError(
                f"a global model pools the data of all {num_tasks} tasks; use full participation"
            )
        pool, metrics = pooled.round(state.pool, _as_one_node(cohort, jnp.asarray(sizes)), key)
        return everybody(pool, num_tasks), metrics

    def adapt(state, newcomers, key):
        del key
        return everybody(state.pool, newcomers.num_clients)

    return Algorithm(init, one_round, predict_linear, adapt, traffic_of_models, num_tasks)


def _as_one_node(cohort: Cohort, sizes: jax.Array) -> Cohort:
    """The cohort whose only node owns everybody's examples, present or not, always in the same places: in the order of nodes."""
    data = cohort.federation
    indices = data.indices[jnp.argsort(cohort.client_ids)]
    real = (jnp.arange(data.capacity) < sizes[:, None]).reshape(-1)
    rows = indices.reshape(-1)[jnp.argsort(~real, stable=True)]
    return Cohort(
        federation=data._replace(
            indices=rows[None], sizes=jnp.sum(sizes, keepdims=True, dtype=jnp.int32)
        ),
        client_ids=jnp.zeros(1, jnp.int32),
        present=jnp.ones(1, bool),
        budgets=jnp.full(1, NO_BUDGET, jnp.int32),
        shares=jnp.ones(1),
    )
