"""MOCHA: federated multi-task learning in the dual, with work and failures that differ between nodes and rounds.

Smith, Chiang, Sanjabi, Talwalkar, NeurIPS 2017, arXiv 1705.10467, algorithm 1. One linear model a task:

    P(W) = sum_t mean_i loss(w_t . x_ti, y_ti) + penalty / 2 tr(W^T Omega W),    Sigma = Omega^-1

Every task counts alike, whatever its size (the released code's normalisation; the paper sums over examples).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.core.batching import epoch_order
from fedjax_mtl.core.federation import Federation
from fedjax_mtl.execution import Execution
from fedjax_mtl.relations import covariance
from fedjax_mtl.relations.covariance import Relationship
from fedjax_mtl.rounds.dual import (
    DualNodes,
    DualState,
    apply_changes,
    local_work,
    node_block,
    predict_linear,
    round_metrics,
    traffic_of_models,
    zero_state,
)
from fedjax_mtl.rounds.dual_ascent import (
    Subproblem,
    ascend_until,
    ascend_until_still,
    coordinate_ascent,
    no_change,
)
from fedjax_mtl.rounds.federated import Algorithm, client_key
from fedjax_mtl.tasks.dual import DualLoss

PyTree = Any
Order = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]


def random_order(
    key: jax.Array, round_index: jax.Array, size: jax.Array, capacity: int
) -> jax.Array:
    """A fresh permutation every round, int32 ``[capacity]``: the paper's randomised coordinate ascent."""
    del round_index
    return epoch_order(key, size, capacity)


def cyclic_order(
    key: jax.Array, round_index: jax.Array, size: jax.Array, capacity: int
) -> jax.Array:
    """The examples as they are stored, int32 ``[capacity]``."""
    del key, round_index, size
    return jnp.arange(capacity, dtype=jnp.int32)


ORDERS = {"random": random_order, "cyclic": cyclic_order}
BOUNDS = {"row_sum": covariance.row_sum_bound, "eigenvalue": covariance.eigenvalue_bound}


def _when(condition: jax.Array, fn: Callable[[PyTree], PyTree], operand: PyTree) -> PyTree:
    """``fn(operand)`` where the condition holds, else the operand.

    A loop of at most one turn: ``lax.cond`` under ``vmap`` over seeds computes both branches always, a loop runs only while some seed needs it.
    """

    def body(carry):
        return jnp.zeros_like(carry[0]), fn(carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], body, (condition, operand))[1]


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

    Every round each node improves its own subproblem by coordinate ascent, ``floor(passes n_t)`` steps or fewer if its budget is smaller (stragglers;
    :func:`fedjax_mtl.core.sampling.straggling`), none if it is absent (faults; :func:`fedjax_mtl.core.sampling.dropping`, or a sampled cohort). It sends ``X_t^T d_t / n_t``, one number a
    feature; the server adds them up and sends back ``W = Sigma B / penalty``. Every ``relationship_every`` rounds the server learns Sigma from W.

    Metrics of a round, after it: ``loss`` (mean over tasks), ``num_steps`` (coordinate steps of all nodes), ``slowest_steps`` (of the one that made most), ``num_examples`` (of all nodes, absent ones too), ``sigma_prime``, and, if the cohort has a slot for every
    node (absent ones included), ``primal``, ``dual`` and ``gap``.

    Args:
        loss: see :mod:`fedjax_mtl.tasks.dual`. The examples are ``inputs [n, features]`` and ``labels [n]``, -1 and 1 for classification.
        sizes: int ``[tasks]``, examples of each task (``federation.sizes``). capacity: ``federation.capacity``.
        penalty: lambda. relationship: Sigma and how it is learned, see :mod:`fedjax_mtl.relations.covariance`.
        relationship_every: rounds between updates of Sigma; None never (the paper's "W update").
        passes: local work, in passes over the node's data. max_steps: the most coordinate steps of any node; default that of ``passes`` over the largest.
        inexactness: instead, pass after pass until theta is certainly at most this, the same for all nodes: CoCoA; ``passes`` bounds it (rounded up) and budgets do not apply.
        tolerance: instead, pass after pass until the node's own primal changes by less than this from pass to pass: how the released code trains tasks that are alone; ``passes`` and
            budgets as for ``inexactness``.
        aggregation: gamma, the share of the nodes' changes that is applied.
        sigma_prime: ``row_sum`` (the paper's and the code's) or ``eigenvalue`` (tightest) bound, both times gamma; or a number, which may be too small to converge.
        order: ``random``, ``cyclic``, or ``(key, round, size, capacity) -> int32 [capacity]``.
        adaptation_passes: local passes of a task that arrives later, before and after its relation to the others is learned.
        measure_inexactness: adds the metrics ``inexactness`` and ``worst_inexactness``, upper bounds of theta (mean and largest over the nodes present), at
            the price of two passes.
        fidelity: ``released`` keeps W when Sigma changes, as the released code does: W and alpha do not belong together any more, "dual" is no bound, and the alternation does not minimise the
            joint objective. ``paper`` recomputes ``W = Sigma B / penalty``.
        dtype: of the state; float64 needs JAX's x64 mode (gaps below 1e-6 relative need float64).
        execution: how nodes are mapped; default all at once.

    A newcomer (``adapt``) is a task that arrives later, with the others frozen (Li et al. 2019, OFMTL): its relation starts as the rule's ``extend`` says, and if the rule learns it is updated once.

    Raises:
        ValueError: settings that make no sense, or float64 without x64 mode.
    """
    num_tasks = len(sizes)
    if fidelity not in ("paper", "released"):
        raise ValueError(f"fidelity must be 'paper' or 'released', got {fidelity!r}")
    _check_settings(
        passes,
        inexactness,
        tolerance,
        aggregation,
        sigma_prime,
        relationship,
        relationship_every,
        dtype,
    )
    draw_order = ORDERS[order] if isinstance(order, str) else order
    max_steps = int(np.floor(capacity * passes)) if max_steps is None else max_steps
    recomputed = fidelity == "paper"

    def solve(problem, budget, order):
        if inexactness is not None:
            return ascend_until(loss, problem, order, inexactness, int(np.ceil(passes)))
        if tolerance is not None:
            return ascend_until_still(loss, problem, order, tolerance, int(np.ceil(passes)))
        planned = jnp.floor(problem.size * passes).astype(jnp.int32)
        num_steps = jnp.minimum(jnp.minimum(planned, budget), max_steps)
        return coordinate_ascent(loss, problem, order, num_steps, max_steps)

    def bound(covariance):
        return sigma_prime_bound(covariance, sigma_prime, aggregation)

    def init(key):
        del key
        covariance = relationship.init(num_tasks, dtype)
        return zero_state(covariance, capacity, features, bound(covariance))

    def learn_relationship(state):
        covariance = relationship.update(state.clients.weights, state.covariance)
        weights = covariance @ state.dual_sums / penalty if recomputed else state.clients.weights
        return state._replace(
            clients=state.clients._replace(weights=weights),
            covariance=covariance,
            sigma_prime=bound(covariance),
        )

    def one_round(state, cohort, key):
        curvatures = state.sigma_prime * jnp.diagonal(state.covariance) / penalty

        def work(problem, own, order_key):
            chosen = draw_order(order_key, state.round, problem.size, capacity)
            return solve(problem, own.budget, chosen)

        worked = local_work(
            work, loss, state, cohort, curvatures, key, execution, measure_inexactness
        )
        state = apply_changes(state, cohort, worked.change, aggregation, penalty, recomputed)
        if relationship_every is not None:
            due = (state.round % relationship_every) == 0
            state = _when(due, learn_relationship, state)
        metrics = round_metrics(loss, penalty, state, cohort, sizes, worked, recomputed, execution)
        return state, metrics

    def adapt(state, newcomers, key):
        def learn(task, own_key):
            return later_task(loss, penalty, relationship, state, task, adaptation_passes, own_key)

        return adapt_tasks(learn, state, newcomers, key)

    return Algorithm(init, one_round, predict_linear, adapt, traffic_of_models, num_tasks)


def _check_settings(
    passes, inexactness, tolerance, aggregation, sigma_prime, relationship, every, dtype
) -> None:
    if passes <= 0:
        raise ValueError(f"passes is {passes}; give a positive number of passes over a node's data")
    if inexactness is not None and not 0 <= inexactness < 1:
        raise ValueError(
            f"inexactness is {inexactness}; theta is at least 0 and below 1, or nobody would work"
        )
    if tolerance is not None and (tolerance <= 0 or inexactness is not None):
        raise ValueError(
            f"tolerance is {tolerance} and inexactness {inexactness}; give one of them, the tolerance positive"
        )
    if not 0 < aggregation <= 1:
        raise ValueError(f"aggregation is {aggregation}; gamma lies above 0 and at most at 1")
    if isinstance(sigma_prime, str) and sigma_prime not in BOUNDS:
        raise ValueError(
            f"unknown sigma_prime {sigma_prime!r}; expected a number or one of {', '.join(BOUNDS)}"
        )
    if every is not None and (every < 1 or relationship.update is None):
        raise ValueError(
            f"relationship_every is {every}, but "
            + (
                "it must be at least 1 round"
                if every < 1
                else "this relationship is fixed; give None"
            )
        )
    if jnp.dtype(dtype) == jnp.float64 and not jax.config.jax_enable_x64:
        raise ValueError(
            "dtype float64 needs JAX's x64 mode: wrap the run in `with jax.enable_x64(True):`"
        )


def sigma_prime_bound(
    covariance: jax.Array, sigma_prime: str | float, aggregation: float
) -> jax.Array:
    """The bound of ``sigma_prime``, a name in ``BOUNDS`` or a number, ``[]``."""
    if isinstance(sigma_prime, str):
        return aggregation * BOUNDS[sigma_prime](covariance)
    return jnp.asarray(sigma_prime, covariance.dtype)


def _pull(covariance: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For the last task of a relation, given the other tasks' weights: the model it would have without data, and its own precision."""
    column = jnp.zeros(covariance.shape[0], covariance.dtype).at[-1].set(1)
    precision = jnp.linalg.solve(covariance, column)
    return -(precision[:-1] @ weights) / precision[-1], precision[-1]


def later_task(
    loss: DualLoss,
    penalty: float | jax.Array,
    relationship: Relationship,
    state: DualState,
    task: tuple[jax.Array, jax.Array, jax.Array],
    passes: int,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A task that arrives when the others are done and frozen (Li et al. 2019, online federated multi-task learning).

        w_new = (X^T alpha / n - penalty sum_t Omega_new,t w_t) / (penalty Omega_new,new)

    Its relation is first ``relationship.extend``'s; where the rule learns, Sigma is updated once with the model found, and the model solved again.

    Args:
        task: ``inputs [capacity, features]``, ``labels [capacity]``, ``size []``. passes: over its data, for each solve.

    Returns:
        ``alpha [capacity]``, ``X^T alpha / n`` ``[features]`` and the model ``[features]``.
    """
    inputs, labels, size = task
    others = state.clients.weights
    capacity = labels.shape[0]

    def solve(covariance, start, solve_key):
        weights, precision = _pull(covariance, others)
        alpha = jnp.zeros(capacity, others.dtype)
        problem = Subproblem(inputs, labels, size, alpha, weights, 1 / (penalty * precision))

        def one_pass(index, change):
            order = epoch_order(jax.random.fold_in(solve_key, index), size, capacity)
            return coordinate_ascent(loss, problem, order, size, capacity, start=change)

        change = jax.lax.fori_loop(0, passes, one_pass, start or no_change(problem))
        return change, weights + problem.curvature * change.combined

    first_key, second_key = jax.random.split(key)
    covariance = relationship.extend(state.covariance)
    change, weights = solve(covariance, None, first_key)
    if relationship.update is not None:
        covariance = relationship.update(jnp.concatenate([others, weights[None]]), covariance)
        change, weights = solve(covariance, change, second_key)
    return change.alpha, change.combined, weights


def adapt_tasks(
    learn: Callable[..., tuple[jax.Array, jax.Array, jax.Array]],
    state: DualState,
    newcomers: Federation,
    key: jax.Array,
) -> DualState:
    """The state whose nodes are the newcomers, each ``learn((inputs, labels, size), key)`` as if it were the only one."""

    def one(client_id, rows, size):
        return learn((*node_block(newcomers.examples, rows), size), client_key(key, client_id))

    ids = jnp.arange(newcomers.num_clients, dtype=jnp.int32)
    alpha, dual_sums, weights = jax.vmap(one)(ids, newcomers.indices, newcomers.sizes)
    return state._replace(clients=DualNodes(alpha, weights), dual_sums=dual_sums)


def with_later_task(
    state: DualState,
    relationship: Relationship,
    penalty: float | jax.Array,
    *,
    sigma_prime: str | float = "row_sum",
    aggregation: float = 1.0,
) -> DualState:
    """The state with one task more, untrained, for training on with everybody: :func:`mocha` made for the larger federation takes it up.

    The dual variables of the others stay; their models are those of the extended relation.
    """
    covariance = relationship.extend(state.covariance)
    grown = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 1), (0, 0))), (state.clients.alpha, state.dual_sums)
    )
    return state._replace(
        clients=DualNodes(grown[0], covariance @ grown[1] / penalty),
        dual_sums=grown[1],
        covariance=covariance,
        sigma_prime=sigma_prime_bound(covariance, sigma_prime, aggregation),
    )
