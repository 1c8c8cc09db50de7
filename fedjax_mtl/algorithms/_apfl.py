"""APFL: adaptive personalised federated learning.

Deng, Kamani, Mahdavi, arXiv 2003.13461, algorithm 1.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.training import Gradient, Solver, loss_gradient, mean_over_steps
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import Batch, for_each_batch
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import ClientView
from fedjax_mtl.core.model import Model
from fedjax_mtl.core.task import example_losses
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.engine import Weighting
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import Counts, Models, Server, Tasks, each_group
from fedjax_mtl.server import step_from

PyTree = Any


class APFLClientState(NamedTuple):
    """What an APFL client keeps.

    Attributes:
        own: its own model v.
        alpha: the share of v in its personalised model, ``[]``.
        optimizers: the states of the optimisers of w and v, or ``()`` where they start afresh in
            every round.
    """

    own: PyTree
    alpha: jax.Array
    optimizers: Any = ()


def interpolate(alpha: jax.Array, own: PyTree, shared: PyTree) -> PyTree:
    """``alpha * own + (1 - alpha) * shared`` on every leaf: the personalised model."""
    return jax.tree.map(lambda v, w: (alpha * v + (1 - alpha) * w).astype(w.dtype), own, shared)


class AdaptiveTraining(NamedTuple):
    """What an APFL client was asked for; the arguments of :func:`apfl` explain each."""

    model: Model
    gradient: Gradient
    solver: Solver
    alpha: float | jax.Array
    alpha_learning_rate: float | jax.Array


class _Walk(NamedTuple):
    """Where a client is in its local steps: w, v, alpha, the two optimisers, the sum of losses."""

    shared: PyTree
    own: PyTree
    alpha: jax.Array
    shared_optimizer: optax.OptState
    own_optimizer: optax.OptState
    total: jax.Array


def apfl(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    alpha: float | jax.Array = 0.5,
    alpha_learning_rate: float | jax.Array = 0.0,
    server: Server | None = None,
    weighting: Weighting = "samples",
    fidelity: str = "paper",
    execution: Execution | None = None,
) -> Algorithm:
    """APFL.

    Every local step, on one batch: ``w <- w - eta grad f(w)`` and ``v <- v - eta grad_v f(alpha v +
    (1 - alpha) w)``; if adaptive, ``alpha <- clip(alpha - eta_alpha <v - w, grad f(alpha v + (1 -
    alpha) w)>, 0, 1)`` (equation 9). The server averages w. Clients predict with the interpolated
    model; a newcomer trains v for one round.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: local training of both w and v; afresh in every round unless ``keep_optimizer``.
        alpha: initial share of the own model: 0 is FedAvg, 1 is training alone.
        alpha_learning_rate: eta_alpha; 0 keeps alpha fixed.
        server: as for :func:`fedavg`.
        weighting: as for :func:`fedavg`.
        fidelity: only ``paper``; FedEM's released code lists APFL but cannot start it.
        execution: as for :func:`fedavg`.

    Raises:
        InputError: ``fidelity="released"``, or alpha outside [0, 1].
    """
    if fidelity != "paper":
        raise InputError(
            f"apfl has fidelity 'paper' only, got {fidelity!r}: FedEM's released code raises "
            "NotImplementedError for APFL"
        )
    if not isinstance(alpha, jax.core.Tracer) and not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha}; it is a share, give 0..1")

    def make_client(model, task):
        gradient = loss_gradient(example_losses(model, task))
        training = AdaptiveTraining(model, gradient, solver, alpha, alpha_learning_rate)
        return ClientUpdate(
            init=functools.partial(_init_client, training),
            update=functools.partial(_update_client, training),
            predict=functools.partial(_predict_interpolated, training),
            adapt=functools.partial(_adapt_client, training),
        )

    return federated(
        each_group(model, task, num_clients, make_client),
        step_from(optax.sgd(1.0)) if server is None else server,
        weighting=weighting,
        execution=execution,
    )


def _init_client(training: AdaptiveTraining, params: PyTree) -> APFLClientState:
    start = training.solver.optimizer.init
    optimizers = (start(params), start(params)) if training.solver.keep_optimizer else ()
    return APFLClientState(params, jnp.asarray(training.alpha, jnp.float32), optimizers)


def _personal_gradient(
    training: AdaptiveTraining, at: _Walk, batch: Batch, key: jax.Array
) -> tuple[jax.Array, PyTree, jax.Array]:
    """The loss of the personalised model, its gradient in v, and its derivative in alpha."""
    mixed = interpolate(at.alpha, at.own, at.shared)
    loss, grads = training.gradient(mixed, batch, key)
    # d(alpha v + (1 - alpha) w) / dv = alpha
    slope = optax.tree.vdot(optax.tree.sub(at.own, at.shared), grads)
    return loss, optax.tree.scale(at.alpha, grads), slope


def _train(
    training: AdaptiveTraining,
    params: PyTree,
    state: APFLClientState,
    client: ClientView,
    key: jax.Array,
) -> tuple[_Walk, jax.Array]:
    """A round's local steps, and how many there were."""
    solver = training.solver
    scale = solver.step_scale(client.round)

    def move(grads, optimizer_state, params):
        updates, optimizer_state = solver.optimizer.update(grads, optimizer_state, params)
        updates = jax.tree.map(lambda u: u * jnp.asarray(scale, u.dtype), updates)
        return optax.apply_updates(params, updates), optimizer_state

    def step(at: _Walk, batch: Batch, step_key: jax.Array) -> _Walk:
        _, shared_grads = training.gradient(at.shared, batch, step_key)
        loss, own_grads, slope = _personal_gradient(training, at, batch, step_key)
        shared, shared_state = move(shared_grads, at.shared_optimizer, at.shared)
        own, own_state = move(own_grads, at.own_optimizer, at.own)
        alpha = jnp.clip(at.alpha - training.alpha_learning_rate * slope, 0, 1)
        alpha = alpha.astype(at.alpha.dtype)
        return _Walk(shared, own, alpha, shared_state, own_state, at.total + loss)

    fresh = (solver.optimizer.init(params), solver.optimizer.init(state.own))
    of_shared, of_own = state.optimizers if solver.keep_optimizer else fresh
    start = _Walk(params, state.own, state.alpha, of_shared, of_own, jnp.zeros(()))
    return for_each_batch(step, start, client, solver.plan, key)


def _kept(training: AdaptiveTraining, end: _Walk) -> APFLClientState:
    optimizers = (end.shared_optimizer, end.own_optimizer)
    return APFLClientState(end.own, end.alpha, optimizers if training.solver.keep_optimizer else ())


def _update_client(
    training: AdaptiveTraining,
    params: PyTree,
    state: APFLClientState,
    client: ClientView,
    key: jax.Array,
) -> ClientResult:
    end, done = _train(training, params, state, client, key)
    metrics = {"loss": mean_over_steps(end.total, done), "num_steps": done, "alpha": end.alpha}
    return ClientResult(optax.tree.sub(params, end.shared), _kept(training, end), metrics)


def _predict_interpolated(
    training: AdaptiveTraining, params: PyTree, state: APFLClientState, inputs: jax.Array
) -> jax.Array:
    return training.model.apply(interpolate(state.alpha, state.own, params), inputs, None)


def _adapt_client(
    training: AdaptiveTraining, params: PyTree, client: ClientView, key: jax.Array
) -> APFLClientState:
    start = _init_client(training, params)
    return _kept(training, _train(training, params, start, client, key)[0])
