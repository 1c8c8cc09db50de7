"""CoCoA on MOCHA's problem: one common inexactness for all nodes and rounds.

As in MOCHA's experiments (arXiv 1705.10467, section 5); the formulas are those of its released
code.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_mtl.algorithms._mocha import Order, mocha, order_of
from fedjax_mtl.core.algorithm import Algorithm, Info
from fedjax_mtl.core.checks import check_fidelity
from fedjax_mtl.core.federation import ClientView, Cohort
from fedjax_mtl.execution import Execution
from fedjax_mtl.relations.covariance import Relationship
from fedjax_mtl.rounds.dual import DualState, local_work
from fedjax_mtl.rounds.dual_ascent import Change, Subproblem, coordinate_ascent, no_change
from fedjax_mtl.tasks.dual import DualLoss

_RELEASED_MAX_STEPS = 999


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
