"""What MOCHA is compared with: CoCoA, mini-batch SDCA and SGD, one model a task, one model for all.

As in MOCHA's experiments (arXiv 1705.10467, section 5; the formulas are those of its released
code), all of the first three solve MOCHA's problem.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_mtl.algorithms._mocha import Order, adapt_tasks, later_task, mocha, order_of
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm, Info
from fedjax_mtl.core.checks import check_fidelity
from fedjax_mtl.core.federation import NO_BUDGET, ClientView, Cohort, Federation
from fedjax_mtl.execution import Execution, make_execution, map_clients
from fedjax_mtl.relations import covariance
from fedjax_mtl.relations.covariance import Relationship
from fedjax_mtl.rounds.dual import (
    DualNodes,
    DualState,
    LocalWork,
    allowed_steps,
    apply_changes,
    local_work,
    mean_loss,
    node_block,
    predict_linear,
    round_info,
    traffic_of_models,
    work_info,
    zero_state,
)
from fedjax_mtl.rounds.dual_ascent import (
    Change,
    Subproblem,
    coordinate_ascent,
    full_precision,
    no_change,
)
from fedjax_mtl.tasks.dual import DualLoss

PyTree = Any

_RELEASED_MAX_STEPS = 999


# --- CoCoA.


def cocoa(
    loss: DualLoss,
    *,
    sizes: jax.Array,
    capacity: int,
    features: int,
    penalty: float | jax.Array,
    relationship: Relationship,
    relationship_every: int | None = None,
    inexactness: float = 0.5,
    max_passes: int = 50,
    aggregation: float = 1.0,
    sigma_prime: str | float = "row_sum",
    order: str | Order = "random",
    adaptation_passes: int = 100,
    measure_inexactness: bool = False,
    fidelity: str = "paper",
    dtype: Any = jnp.float32,
    execution: Execution | None = None,
) -> Algorithm:
    """CoCoA on MOCHA's problem: one common theta for all nodes and rounds.

    Jaggi et al., arXiv 1409.1458; Ma et al., arXiv 1502.03508. Every node works until its theta is
    certainly at most ``inexactness``, however long that takes: a round costs as much as its slowest
    node (``slowest_steps``).

    Args:
        loss: as for :func:`mocha`.
        sizes: as for :func:`mocha`.
        capacity: as for :func:`mocha`.
        features: as for :func:`mocha`.
        penalty: as for :func:`mocha`.
        relationship: as for :func:`mocha`.
        relationship_every: as for :func:`mocha`.
        inexactness: theta.
        max_passes: the most passes of a node in a round.
        aggregation: as for :func:`mocha`.
        sigma_prime: as for :func:`mocha`.
        order: as for :func:`mocha`.
        adaptation_passes: as for :func:`mocha`.
        measure_inexactness: as for :func:`mocha`.
        fidelity: ``released`` is the stopping test of MOCHA's code: a local gap, in mixed
            normalisations and compared as it is, not relative, with ``inexactness``, tested after
            steps 1, 6, 11, ...; at most 999 steps; and once a node has used them up, the nodes
            after it are not tested any more. In practice it is met at once or never. It needs the
            hinge loss, and Sigma fixed; ``max_passes`` does not apply.
        dtype: as for :func:`mocha`.
        execution: as for :func:`mocha`.
    """
    check_fidelity(fidelity)
    make = functools.partial(
        mocha,
        loss,
        sizes=sizes,
        capacity=capacity,
        features=features,
        penalty=penalty,
        relationship=relationship,
        relationship_every=relationship_every,
        aggregation=aggregation,
        sigma_prime=sigma_prime,
        order=order,
        adaptation_passes=adaptation_passes,
        measure_inexactness=measure_inexactness,
        dtype=dtype,
        execution=execution,
    )
    if fidelity == "paper":
        return make(inexactness=inexactness, passes=max_passes)
    method = make(passes=_RELEASED_MAX_STEPS, max_steps=_RELEASED_MAX_STEPS)
    test = ReleasedTest(loss, sizes, penalty, inexactness, order_of(order), execution)
    return method._replace(round=functools.partial(_released_cocoa_round, test, method))


class ReleasedTest(NamedTuple):
    """The stopping test of CoCoA as coded; the arguments of :func:`cocoa` explain each."""

    loss: DualLoss
    sizes: jax.Array
    penalty: float | jax.Array
    inexactness: float
    order: Order
    execution: Execution | None


def _released_cocoa_round(
    test: ReleasedTest, method: Algorithm, state: DualState, cohort: Cohort, key: jax.Array
) -> tuple[DualState, Info]:
    """A round in which the steps that the test allows, found first, are MOCHA's budgets."""
    curvatures = state.sigma_prime * jnp.diagonal(state.covariance) / test.penalty
    precisions = jnp.diagonal(jnp.linalg.inv(state.covariance))

    def count_steps(problem: Subproblem, me: ClientView, key: jax.Array) -> Change:
        order = test.order(key, state.round, problem.size, problem.labels.shape[0])
        steps = _released_steps(test, problem, order, state, precisions, me.client_id)
        return no_change(problem)._replace(num_steps=steps)

    tested = local_work(
        count_steps,
        test.loss,
        state.round,
        state.clients,
        cohort,
        curvatures,
        key,
        test.execution,
        False,
    )
    steps = tested.change.num_steps
    # A node counts its steps plus one; the first to reach the limit ends the test of those behind.
    capped = (steps >= _RELEASED_MAX_STEPS) & cohort.present
    behind = jnp.cumsum(capped) - capped > 0
    budgets = jnp.where(behind, _RELEASED_MAX_STEPS, steps)
    return method.round(state, cohort._replace(budgets=jnp.minimum(budgets, cohort.budgets)), key)


def _released_steps(
    test: ReleasedTest,
    problem: Subproblem,
    order: jax.Array,
    state: DualState,
    precisions: jax.Array,
    task: jax.Array,
) -> jax.Array:
    """Steps until the released code's local gap is low enough, int32 ``[]``.

    They come in blocks of 1, 5, 5, ...
    """
    gap = functools.partial(
        _released_gap,
        test,
        problem,
        covariance=state.covariance[task, task],
        precision=precisions[task],
        sigma_prime=state.sigma_prime,
    )

    def body(carry):
        steps, change, _ = carry
        block = jnp.minimum(jnp.where(steps == 0, 1, 5), _RELEASED_MAX_STEPS - steps)
        size = jnp.maximum(problem.size, 1)
        turned = jnp.take(order, (jnp.arange(order.shape[0]) + steps) % size)
        change = coordinate_ascent(test.loss, problem, turned, block, 5, start=change)
        # A last block cut short by the limit ends between two tests.
        tested = (steps == 0) | (block == 5)
        return steps + block, change, jnp.where(tested, gap(change), jnp.inf)

    def unfinished(carry):
        steps, _, value = carry
        return (value > test.inexactness) & (steps < _RELEASED_MAX_STEPS)

    never = jnp.asarray(jnp.inf, problem.weights.dtype)
    start = (jnp.zeros((), jnp.int32), no_change(problem), never)
    return jax.lax.while_loop(unfinished, body, start)[0]


def _released_gap(
    test: ReleasedTest,
    problem: Subproblem,
    change: Change,
    *,
    covariance: jax.Array,
    precision: jax.Array,
    sigma_prime: jax.Array,
) -> jax.Array:
    """The released code's local gap of a change, ``[]``."""
    penalty, total = test.penalty, jnp.sum(jnp.asarray(test.sizes))
    alpha = problem.alpha + change.alpha
    # The code's W moves by Sigma_tt / lambda, without sigma'.
    weights = problem.weights + covariance / penalty * change.combined
    sums = problem.combine(alpha)
    dual = problem.mean(alpha * problem.labels) - weights @ sums
    dual -= sigma_prime / (2 * penalty) * covariance**2 * jnp.sum(jnp.square(sums))
    losses = problem.mean(test.loss.loss(problem.inputs @ weights, problem.labels))
    losses = jnp.maximum(problem.size, 1) * losses / total
    squared = precision**2 * jnp.sum(jnp.square(weights))
    return losses + penalty / (2 * sigma_prime) * squared - dual


# --- Mini-batch SDCA.


class MinibatchSDCA(NamedTuple):
    """What :func:`minibatch_sdca` was asked for; its arguments explain each."""

    loss: DualLoss
    sizes: jax.Array
    capacity: int
    features: int
    penalty: float | jax.Array
    relationship: Relationship
    passes: float
    scaling: float
    order: Order
    adaptation_passes: int
    dtype: Any
    execution: Execution | None


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
    """Mini-batch SDCA (Takac et al., arXiv 1507.08322): coordinate steps applied in part.

    They do not see each other's effect on the model: all alphas are maximised at the round's W, and
    the change is scaled by ``scaling / (coordinate steps of all nodes)``, at most 1. Sigma stays as
    ``relationship`` starts.

    Args:
        loss: as for :func:`mocha`.
        sizes: as for :func:`mocha`.
        capacity: as for :func:`mocha`.
        features: as for :func:`mocha`.
        penalty: as for :func:`mocha`.
        relationship: as for :func:`mocha`.
        passes: as for :func:`mocha`.
        scaling: from 1 to the coordinate steps of all nodes, to be tuned; the released code's
            driver has 10.
        order: as for :func:`mocha`.
        adaptation_passes: as for :func:`mocha`.
        dtype: as for :func:`mocha`.
        execution: as for :func:`mocha`.
    """
    method = MinibatchSDCA(
        loss=loss,
        sizes=sizes,
        capacity=capacity,
        features=features,
        penalty=penalty,
        relationship=relationship,
        passes=passes,
        scaling=scaling,
        order=order_of(order),
        adaptation_passes=adaptation_passes,
        dtype=dtype,
        execution=execution,
    )
    return Algorithm(
        init=functools.partial(_init_sdca, method),
        round=functools.partial(_sdca_round, method),
        predict=predict_linear,
        adapt=functools.partial(_adapt_sdca, method),
        traffic=traffic_of_models,
        num_clients=len(sizes),
    )


def _init_sdca(method: MinibatchSDCA, key: jax.Array) -> DualState:
    del key
    sigma = method.relationship.init(len(method.sizes), method.dtype)
    return zero_state(sigma, method.capacity, method.features, jnp.ones((), method.dtype))


def _sdca_round(
    method: MinibatchSDCA, state: DualState, cohort: Cohort, key: jax.Array
) -> tuple[DualState, Info]:
    max_steps = int(method.capacity * method.passes)

    def work(problem: Subproblem, me: ClientView, key: jax.Array) -> Change:
        order = method.order(key, state.round, problem.size, method.capacity)
        steps = allowed_steps(problem, me, method.passes)
        return coordinate_ascent(method.loss, problem, order, steps, max_steps, feedback=False)

    curvatures = jnp.diagonal(state.covariance) / method.penalty
    worked = local_work(
        work,
        method.loss,
        state.round,
        state.clients,
        cohort,
        curvatures,
        key,
        method.execution,
        False,
    )
    # Beyond 1 the duals would leave their domain: few steps, as when nodes fail, count in full.
    steps = jnp.maximum(jnp.sum(worked.change.num_steps), 1).astype(method.dtype)
    step = jnp.minimum(method.scaling / steps, 1)
    state = apply_changes(state, worked, step, method.penalty)
    info = round_info(
        method.loss, method.penalty, state, worked, method.sizes, True, method.execution
    )
    return state, info


def _adapt_sdca(
    method: MinibatchSDCA, state: DualState, newcomers: Federation, key: jax.Array
) -> DualState:
    learn = functools.partial(
        later_task,
        method.loss,
        method.penalty,
        method.relationship,
        state,
        passes=method.adaptation_passes,
    )
    return adapt_tasks(learn, state, newcomers, key)


# --- Mini-batch SGD.


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


# --- One model a task, and one for all.

# How MOCHA's released code trains the models that it compares with.
_RELEASED_TRAINING = {"order": "cyclic", "tolerance": 1e-5, "passes": 500}


def _training(fidelity: str, passes: float, order: str | Order) -> dict[str, Any]:
    check_fidelity(fidelity)
    return {"passes": passes, "order": order} if fidelity == "paper" else _RELEASED_TRAINING


def local_models(
    loss: DualLoss,
    *,
    sizes: jax.Array,
    capacity: int,
    features: int,
    penalty: float | jax.Array,
    passes: float = 1.0,
    order: str | Order = "random",
    adaptation_passes: int = 100,
    measure_inexactness: bool = False,
    fidelity: str = "paper",
    dtype: Any = jnp.float32,
    execution: Execution | None = None,
) -> Algorithm:
    """One model a task, alone: ``mean loss + penalty / 2 ||w||^2``.

    Args:
        loss: as for :func:`mocha`.
        sizes: as for :func:`mocha`.
        capacity: as for :func:`mocha`.
        features: as for :func:`mocha`.
        penalty: as for :func:`mocha`.
        passes: as for :func:`mocha`.
        order: as for :func:`mocha`.
        adaptation_passes: local passes of a task that arrives later.
        measure_inexactness: as for :func:`mocha`.
        fidelity: with ``released`` one round is the whole training, passes in the order of storage
            until a task's primal changes by less than 1e-5 from one to the next, at most 500. The
            primal is not monotone, so a task may stop early: its test errors are those of the code,
            not of the optimum. ``passes`` and ``order`` do not apply.
        dtype: as for :func:`mocha`.
        execution: as for :func:`mocha`.
    """
    return mocha(
        loss,
        sizes=sizes,
        capacity=capacity,
        features=features,
        penalty=penalty,
        relationship=covariance.independent(1.0),
        adaptation_passes=adaptation_passes,
        measure_inexactness=measure_inexactness,
        dtype=dtype,
        execution=execution,
        **_training(fidelity, passes, order),
    )


class PooledState(NamedTuple):
    """The state of :func:`global_model`.

    Attributes:
        round: int32 ``[]``; rounds done.
        clients: every node's copy of the model.
        pool: MOCHA's state of a single task.
    """

    round: jax.Array
    clients: PrimalNodes
    pool: DualState


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
    """One model for all: ``mean loss + penalty / 2 ||w||^2`` over the pooled examples.

    It is trained as if they lay in one place, and every node predicts with it. A round is
    ``passes`` passes of coordinate ascent over the pool, in an order of its own. It is centralised
    training, not a federated method: it needs a cohort with a slot for every node, and whether they
    are absent or slow does not matter to it.

    Args:
        loss: as for :func:`mocha`.
        sizes: as for :func:`mocha`.
        capacity: as for :func:`mocha`.
        features: as for :func:`mocha`.
        penalty: as for :func:`mocha`.
        passes: as for :func:`mocha`, over the pool.
        order: as for :func:`mocha`, of the pool.
        fidelity: with ``released`` one round is the whole training, as in :func:`local_models`.
        dtype: as for :func:`mocha`.

    Raises:
        ValueError: (when traced) a cohort without a slot for every node.
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

    def init(key: jax.Array) -> PooledState:
        return _everybody(pooled.init(key), num_tasks)

    def one_round(state: PooledState, cohort: Cohort, key: jax.Array) -> tuple[PooledState, Info]:
        if cohort.client_ids.shape[0] != num_tasks:
            raise ValueError(
                f"a global model pools the data of all {num_tasks} tasks; use full participation"
            )
        pool, info = pooled.round(state.pool, _as_one_node(cohort, jnp.asarray(sizes)), key)
        return _everybody(pool, num_tasks), info

    def adapt(state: PooledState, newcomers: Federation, key: jax.Array) -> PooledState:
        del key
        return _everybody(state.pool, newcomers.num_clients)

    return Algorithm(init, one_round, predict_linear, adapt, traffic_of_models, num_tasks)


def _everybody(pool: DualState, count: int) -> PooledState:
    """The state in which ``count`` nodes predict with the pool's model."""
    weights = trees.broadcast_clients(pool.clients.weights[0], count)
    return PooledState(pool.round, PrimalNodes(weights), pool)


def _as_one_node(cohort: Cohort, sizes: jax.Array) -> Cohort:
    """The cohort whose only node owns everybody's examples, present or not.

    They always lie in the same places: in the order of nodes.
    """
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
        work=jnp.ones(1, jnp.float32),
    )
