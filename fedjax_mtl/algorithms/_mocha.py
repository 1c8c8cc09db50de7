"""MOCHA: federated multi-task learning in the dual, with uneven work and failures.

Smith, Chiang, Sanjabi, Talwalkar, NeurIPS 2017, arXiv 1705.10467, algorithm 1. Work and failures
may differ between nodes and rounds. One linear model a task:

    P(W) = sum_t mean_i loss(w_t . x_ti, y_ti) + penalty / 2 tr(W^T Omega W),    Sigma = Omega^-1

Every task counts alike, whatever its size (the released code's normalisation; the paper sums over
examples).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.algorithms._later_tasks import adapt_tasks, later_task
from fedjax_mtl.core.algorithm import Algorithm, Info
from fedjax_mtl.core.batching import epoch_order
from fedjax_mtl.core.checks import InputError, check_choice, check_fidelity
from fedjax_mtl.core.federation import ClientView, Cohort, Federation
from fedjax_mtl.execution import Execution
from fedjax_mtl.relations import covariance
from fedjax_mtl.relations.covariance import Relationship
from fedjax_mtl.rounds.dual import (
    DualNodes,
    DualState,
    allowed_steps,
    apply_changes,
    local_work,
    models_of,
    predict_linear,
    round_info,
    traffic_of_models,
    zero_state,
)
from fedjax_mtl.rounds.dual_ascent import (
    Change,
    Subproblem,
    ascend_until,
    ascend_until_still,
    coordinate_ascent,
)
from fedjax_mtl.tasks.dual import DualLoss

PyTree = Any
Order = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]


def random_order(
    key: jax.Array, round_index: jax.Array, size: jax.Array, capacity: int
) -> jax.Array:
    """A fresh permutation every round, int32 ``[capacity]``: the paper's randomised ascent."""
    del round_index
    return epoch_order(key, size, capacity)


def cyclic_order(
    key: jax.Array, round_index: jax.Array, size: jax.Array, capacity: int
) -> jax.Array:
    """The examples as they are stored, int32 ``[capacity]``."""
    del key, round_index, size
    return jnp.arange(capacity, dtype=jnp.int32)


ORDERS: dict[str, Order] = {"random": random_order, "cyclic": cyclic_order}
BOUNDS = {"row_sum": covariance.row_sum_bound, "eigenvalue": covariance.eigenvalue_bound}


def order_of(order: str | Order) -> Order:
    """The order that a name in ``ORDERS`` stands for, or the function that was given."""
    if not isinstance(order, str):
        return order
    check_choice("order", order, ORDERS)
    return ORDERS[order]


def _when(condition: jax.Array, fn: Callable[[PyTree], PyTree], operand: PyTree) -> PyTree:
    """``fn(operand)`` where the condition holds, else the operand.

    A loop of at most one turn: ``lax.cond`` under ``vmap`` over seeds computes both branches
    always, a loop runs only while some seed needs it.
    """

    def body(carry):
        return jnp.zeros_like(carry[0]), fn(carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], body, (condition, operand))[1]


class LocalSolver(NamedTuple):
    """How a node improves its subproblem; the arguments of :func:`mocha` explain each."""

    loss: DualLoss
    passes: float
    max_steps: int
    inexactness: float | None
    tolerance: float | None
    order: Order

    def solve(
        self, round_index: jax.Array, problem: Subproblem, me: ClientView, key: jax.Array
    ) -> Change:
        """One node's work."""
        order = self.order(key, round_index, problem.size, problem.labels.shape[0])
        most = int(np.ceil(self.passes))
        if self.inexactness is not None:
            return ascend_until(self.loss, problem, order, self.inexactness, most)
        if self.tolerance is not None:
            return ascend_until_still(self.loss, problem, order, self.tolerance, most)
        steps = jnp.minimum(allowed_steps(problem, me, self.passes), self.max_steps)
        return coordinate_ascent(self.loss, problem, order, steps, self.max_steps)


class Mocha(NamedTuple):
    """What :func:`mocha` was asked for; its arguments explain each."""

    solver: LocalSolver
    sizes: jax.Array
    capacity: int
    features: int
    penalty: float | jax.Array
    relationship: Relationship
    relationship_every: int | None
    aggregation: float
    sigma_prime: str | float
    adaptation_passes: int
    measure_inexactness: bool
    recomputed: bool
    dtype: Any
    execution: Execution | None

    def bound(self, sigma: jax.Array) -> jax.Array:
        """sigma' for a Sigma, ``[]``."""
        return sigma_prime_bound(sigma, self.sigma_prime, self.aggregation)


def mocha(
    loss: DualLoss,
    *,
    sizes: jax.Array,
    capacity: int,
    features: int,
    penalty: float | jax.Array,
    relationship: Relationship,
    relationship_every: int | None = None,
    passes: float = 1.0,
    max_steps: int | None = None,
    inexactness: float | None = None,
    tolerance: float | None = None,
    aggregation: float = 1.0,
    sigma_prime: str | float = "row_sum",
    order: str | Order = "random",
    adaptation_passes: int = 100,
    measure_inexactness: bool = False,
    fidelity: str = "paper",
    dtype: Any = jnp.float32,
    execution: Execution | None = None,
) -> Algorithm:
    """MOCHA.

    Every round each node improves its own subproblem by coordinate ascent, ``floor(passes n_t)``
    steps or fewer if it manages less (stragglers; :func:`fedjax_mtl.core.sampling.straggling`),
    none if it is absent (faults; :func:`fedjax_mtl.core.sampling.dropping`, or a sampled cohort).
    It sends ``X_t^T d_t / n_t``, one number a feature; the server adds them up and sends back
    ``W = Sigma B / penalty``. Every ``relationship_every`` rounds the server learns Sigma from W.

    A round reports, after it, ``loss`` (mean over tasks), ``num_steps`` (coordinate steps of all
    nodes), ``slowest_steps`` (of the one that made most), ``num_examples`` (of all nodes, absent
    ones too), ``sigma_prime``, and, if the cohort has a slot for every node (absent ones included),
    ``primal``, ``dual`` and ``gap``. A node whose change is not finite counts as absent
    (``diverged``).

    A newcomer (``adapt``) is a task that arrives later, with the others frozen (Li et al. 2019,
    OFMTL): its relation starts as the rule's ``extend`` says, and if the rule learns it is updated
    once.

    Args:
        loss: see :mod:`fedjax_mtl.tasks.dual`. The examples are ``inputs [n, features]`` and
            ``labels [n]``, -1 and 1 for classification.
        sizes: int ``[tasks]``, examples of each task (``federation.sizes``).
        capacity: ``federation.capacity``.
        features: numbers of an input.
        penalty: lambda.
        relationship: Sigma and how it is learned, see :mod:`fedjax_mtl.relations.covariance`.
        relationship_every: rounds between updates of Sigma; None never (the paper's "W update").
        passes: local work, in passes over the node's data.
        max_steps: the most coordinate steps of any node; default that of ``passes`` over the
            largest.
        inexactness: instead, pass after pass until theta is certainly at most this, the same for
            all nodes: CoCoA; ``passes`` bounds it (rounded up) and budgets do not apply.
        tolerance: instead, pass after pass until the node's own primal changes by less than this
            from pass to pass: how the released code trains tasks that are alone; ``passes`` and
            budgets as for ``inexactness``.
        aggregation: gamma, the share of the nodes' changes that is applied.
        sigma_prime: ``row_sum`` (the paper's and the code's) or ``eigenvalue`` (tightest) bound,
            both times gamma; or a number, which may be too small to converge.
        order: ``random``, ``cyclic``, or ``(key, round, size, capacity) -> int32 [capacity]``.
        adaptation_passes: local passes of a task that arrives later, before and after its relation
            to the others is learned.
        measure_inexactness: reports ``inexactness`` and ``worst_inexactness`` too, upper bounds of
            theta (mean and largest over the nodes present), at the price of two passes.
        fidelity: ``released`` keeps W when Sigma changes, as the released code does: W and alpha do
            not belong together any more, "dual" is no bound, and the alternation does not minimise
            the joint objective. ``paper`` recomputes ``W = Sigma B / penalty``.
        dtype: of the state; float64 needs JAX's x64 mode (gaps below 1e-6 relative need float64).
        execution: how nodes are mapped; default all at once.

    Raises:
        InputError: settings that make no sense, or float64 without x64 mode.
    """
    check_fidelity(fidelity)
    _check_work(passes, inexactness, tolerance)
    _check_aggregation(aggregation, sigma_prime)
    _check_relationship(relationship, relationship_every)
    _check_dtype(dtype)
    max_steps = int(np.floor(capacity * passes)) if max_steps is None else max_steps
    method = Mocha(
        solver=LocalSolver(loss, passes, max_steps, inexactness, tolerance, order_of(order)),
        sizes=sizes,
        capacity=capacity,
        features=features,
        penalty=penalty,
        relationship=relationship,
        relationship_every=relationship_every,
        aggregation=aggregation,
        sigma_prime=sigma_prime,
        adaptation_passes=adaptation_passes,
        measure_inexactness=measure_inexactness,
        recomputed=fidelity == "paper",
        dtype=dtype,
        execution=execution,
    )
    return Algorithm(
        init=functools.partial(_init, method),
        round=functools.partial(_round, method),
        predict=predict_linear,
        adapt=functools.partial(_adapt, method),
        traffic=traffic_of_models,
        num_clients=len(sizes),
    )


def _check_work(passes: float, inexactness: float | None, tolerance: float | None) -> None:
    if passes <= 0:
        raise InputError(f"passes is {passes}; give a positive number of passes over a node's data")
    if inexactness is not None and not 0 <= inexactness < 1:
        raise InputError(
            f"inexactness is {inexactness}; theta is at least 0 and below 1, or nobody would work"
        )
    if tolerance is not None and (tolerance <= 0 or inexactness is not None):
        raise InputError(
            f"tolerance is {tolerance} and inexactness {inexactness}; give one of them, the "
            "tolerance positive"
        )


def _check_aggregation(aggregation: float, sigma_prime: str | float) -> None:
    if not 0 < aggregation <= 1:
        raise InputError(f"aggregation is {aggregation}; gamma lies above 0 and at most at 1")
    if isinstance(sigma_prime, str) and sigma_prime not in BOUNDS:
        raise InputError(
            f"unknown sigma_prime {sigma_prime!r}; expected a number or one of {', '.join(BOUNDS)}"
        )


def _check_relationship(relationship: Relationship, every: int | None) -> None:
    if every is not None and every < 1:
        raise InputError(f"relationship_every is {every}, but it must be at least 1 round")
    if every is not None and relationship.update is None:
        raise InputError(
            f"relationship_every is {every}, but this relationship is fixed; give None"
        )


def _check_dtype(dtype: Any) -> None:
    wanted = jnp.dtype(dtype)
    if wanted == jnp.float64 and jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise InputError(
            "dtype float64 needs JAX's x64 mode: wrap the run in `with jax.enable_x64(True):`"
        )


def sigma_prime_bound(
    covariance: jax.Array, sigma_prime: str | float, aggregation: float
) -> jax.Array:
    """The bound of ``sigma_prime``, a name in ``BOUNDS`` or a number, ``[]``."""
    if isinstance(sigma_prime, str):
        return aggregation * BOUNDS[sigma_prime](covariance)
    return jnp.asarray(sigma_prime, covariance.dtype)


def _init(method: Mocha, key: jax.Array) -> DualState:
    del key
    sigma = method.relationship.init(len(method.sizes), method.dtype)
    return zero_state(sigma, method.capacity, method.features, method.bound(sigma))


def _round(
    method: Mocha, state: DualState, cohort: Cohort, key: jax.Array
) -> tuple[DualState, Info]:
    loss, penalty = method.solver.loss, method.penalty
    curvatures = state.sigma_prime * jnp.diagonal(state.covariance) / penalty
    worked = local_work(
        functools.partial(method.solver.solve, state.round),
        loss,
        state.round,
        state.clients,
        cohort,
        curvatures,
        key,
        method.execution,
        method.measure_inexactness,
    )
    state = apply_changes(state, worked, method.aggregation, penalty, method.recomputed)
    if method.relationship_every is not None:
        due = (state.round % method.relationship_every) == 0
        state = _when(due, functools.partial(_learn_relationship, method), state)
    info = round_info(
        loss, penalty, state, worked, method.sizes, method.recomputed, method.execution
    )
    return state, info


def _learn_relationship(method: Mocha, state: DualState) -> DualState:
    weights, sigma = state.clients.weights, state.covariance
    if method.relationship.update is not None:
        sigma = method.relationship.update(weights, sigma)
    if method.recomputed:
        weights = models_of(sigma, state.dual_sums, method.penalty)
    clients = state.clients._replace(weights=weights)
    return state._replace(clients=clients, covariance=sigma, sigma_prime=method.bound(sigma))


def _adapt(method: Mocha, state: DualState, newcomers: Federation, key: jax.Array) -> DualState:
    learn = functools.partial(
        later_task,
        method.solver.loss,
        method.penalty,
        method.relationship,
        state,
        passes=method.adaptation_passes,
    )
    return adapt_tasks(learn, state, newcomers, key)


def with_later_task(
    state: DualState,
    relationship: Relationship,
    penalty: float | jax.Array,
    *,
    sigma_prime: str | float = "row_sum",
    aggregation: float = 1.0,
) -> DualState:
    """The state with one task more, untrained, for training on with everybody.

    :func:`mocha` made for the larger federation takes it up. The dual variables of the others stay;
    their models are those of the extended relation.

    Args:
        state: of the tasks so far.
        relationship: the rule that extends their relation.
        penalty: lambda.
        sigma_prime: as for :func:`mocha`.
        aggregation: as for :func:`mocha`.
    """
    sigma = relationship.extend(state.covariance)
    alpha, dual_sums = (
        jnp.pad(x, ((0, 1), (0, 0))) for x in (state.clients.alpha, state.dual_sums)
    )
    return state._replace(
        clients=DualNodes(alpha, models_of(sigma, dual_sums, penalty)),
        dual_sums=dual_sums,
        covariance=sigma,
        sigma_prime=sigma_prime_bound(sigma, sigma_prime, aggregation),
    )
