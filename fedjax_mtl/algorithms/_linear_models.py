"""What MOCHA's relation is compared with: one model a task, and one for all."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_mtl.algorithms._minibatch_sgd import PrimalNodes
from fedjax_mtl.algorithms._mocha import Order, mocha
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm, Info
from fedjax_mtl.core.checks import InputError, check_fidelity
from fedjax_mtl.core.federation import NO_BUDGET, Cohort, Federation
from fedjax_mtl.execution import Execution
from fedjax_mtl.relations import covariance
from fedjax_mtl.rounds.dual import DualState, predict_linear, traffic_of_models
from fedjax_mtl.tasks.dual import DualLoss

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
        InputError: (when traced) a cohort without a slot for every node.
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
            raise InputError(
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
