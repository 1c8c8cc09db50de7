"""Mini-batch SDCA on MOCHA's problem.

As in MOCHA's experiments (arXiv 1705.10467, section 5); the formulas are those of its released
code.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_mtl.algorithms._later_tasks import adapt_tasks, later_task
from fedjax_mtl.algorithms._mocha import Order, order_of
from fedjax_mtl.core.algorithm import Algorithm, Info
from fedjax_mtl.core.federation import ClientView, Cohort, Federation
from fedjax_mtl.execution import Execution
from fedjax_mtl.relations.covariance import Relationship
from fedjax_mtl.rounds.dual import (
    DualState,
    allowed_steps,
    apply_changes,
    local_work,
    predict_linear,
    round_info,
    traffic_of_models,
    zero_state,
)
from fedjax_mtl.rounds.dual_ascent import Change, Subproblem, coordinate_ascent
from fedjax_mtl.tasks.dual import DualLoss


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
