"""pFedMe: personalised models as Moreau envelopes of the local losses.

Dinh, Tran, Nguyen, NeurIPS 2020, arXiv 2006.08848, algorithm 1.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.training import (
    Gradient,
    Solver,
    loss_gradient,
    mean_over_steps,
    proximal,
    quadratic_pull,
)
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate, anchored_trainer
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import Batch, for_each_batch
from fedjax_mtl.core.checks import InputError, check_fidelity
from fedjax_mtl.core.federation import ClientView
from fedjax_mtl.core.model import Model
from fedjax_mtl.core.task import Task, example_losses
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import Counts, Models, Tasks, each_group
from fedjax_mtl.server import step_from

PyTree = Any


class PersonalState(NamedTuple):
    """What a pFedMe client keeps.

    Attributes:
        personal: its personalised model theta.
    """

    personal: PyTree


class MoreauTraining(NamedTuple):
    """What a client of the published pFedMe was asked for.

    The arguments of :func:`pfedme` explain each.
    """

    model: Model
    gradient: Gradient
    solver: Solver
    penalty: float | jax.Array
    learning_rate: float | jax.Array
    inner_steps: int


def pfedme(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    penalty: float | jax.Array = 15.0,
    learning_rate: float | jax.Array = 0.005,
    inner_steps: int = 5,
    server_step: float | jax.Array = 1.0,
    fidelity: str = "paper",
    execution: Execution | None = None,
) -> Algorithm:
    """pFedMe.

    Paper (algorithm 1): every local step draws a batch, finds ``theta ~ argmin f(theta; batch) +
    penalty / 2 ||theta - w||^2`` in ``inner_steps`` steps of the solver's optimiser, then ``w <- w
    - learning_rate * penalty * (w - theta)``. The server sets ``w <- (1 - server_step) w +
    server_step * mean of the clients' w`` (unweighted). Clients predict with theta. As in the
    authors' code, theta is warm-started from the previous batch's.

    ``fidelity="released"`` is what FedEM's code runs under this name: each client keeps a model of
    its own, trained with the gradient of ``penalty / 2 ||theta_t - w||^2`` added, w being the
    example-weighted mean of all clients' models, recomputed every round (the objective of Hanzely
    and Richtarik). ``learning_rate``, ``inner_steps`` and ``server_step`` are not used. It needs
    full participation.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: its plan gives the local batches. Its optimiser solves the inner problem of each
            batch, and starts afresh there; its schedule scales the steps of w. Released: local
            training, whose optimiser is kept from round to round.
        penalty: lambda (released: mu).
        learning_rate: eta, of the local w.
        inner_steps: K, optimiser steps on the problem of one batch.
        server_step: beta.
        fidelity: ``paper`` or ``released``.
        execution: as for :func:`fedavg`.

    Raises:
        InputError: an optimiser that is to be kept, with ``fidelity="paper"``.
    """
    check_fidelity(fidelity)
    if fidelity == "paper" and solver.keep_optimizer:
        raise InputError(
            "pfedme solves a new problem with each batch, for which its optimiser starts afresh; "
            "drop keep_optimizer, or take fidelity='released'"
        )

    def make_client(model, task):
        if fidelity == "released":
            # With a plain average at the server the anchor is the mean of the personal models.
            return anchored_trainer(model, task, solver.keeping(True), quadratic_pull(penalty))
        return _moreau_client(model, task, solver, penalty, learning_rate, inner_steps)

    published = fidelity == "paper"
    return federated(
        each_group(model, task, num_clients, make_client),
        step_from(optax.sgd(server_step if published else 1.0)),
        weighting="uniform" if published else "population",
        execution=execution,
        full_participation=not published,
    )


def _moreau_client(
    model: Model,
    task: Task,
    solver: Solver,
    penalty: float | jax.Array,
    learning_rate: float | jax.Array,
    inner_steps: int,
) -> ClientUpdate:
    """The published client.

    Each local step solves the proximal problem of a batch, then moves the local copy of w.
    """
    gradient = loss_gradient(example_losses(model, task))
    training = MoreauTraining(model, gradient, solver, penalty, learning_rate, inner_steps)
    return ClientUpdate(
        init=PersonalState,
        update=functools.partial(_update_client, training),
        predict=functools.partial(_predict_personally, training),
        adapt=functools.partial(_adapt_client, training),
    )


def _solve(
    training: MoreauTraining, w: PyTree, theta: PyTree, batch: Batch, key: jax.Array
) -> tuple[PyTree, jax.Array]:
    """``theta(w) ~ argmin f(theta; batch) + penalty / 2 ||theta - w||^2`` (line 7).

    The last loss comes with it.
    """
    pulled = proximal(training.gradient, training.penalty, w)
    optimizer = training.solver.optimizer

    def step(_, carry):
        theta, state, _ = carry
        loss, grads = pulled(theta, batch, key)
        updates, state = optimizer.update(grads, state, theta)
        return optax.apply_updates(theta, updates), state, loss

    carry = (theta, optimizer.init(theta), jnp.zeros(()))
    theta, _, loss = jax.lax.fori_loop(0, training.inner_steps, step, carry)
    return theta, loss


def _train(
    training: MoreauTraining, w: PyTree, theta: PyTree, client: ClientView, key: jax.Array
) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
    """A round's local steps: the new w, the new theta, and the metrics."""
    scale = training.solver.step_scale(client.round)
    rate = scale * training.learning_rate * training.penalty

    def step(carry, batch, step_key):
        w, theta, total = carry
        theta, loss = _solve(training, w, theta, batch, step_key)
        moved = jax.tree.map(lambda a, b: a - (rate * (a - b)).astype(a.dtype), w, theta)
        return moved, theta, total + loss

    start = (w, theta, jnp.zeros(()))
    (w, theta, total), done = for_each_batch(step, start, client, training.solver.plan, key)
    return w, theta, {"loss": mean_over_steps(total, done), "num_steps": done}


def _update_client(
    training: MoreauTraining,
    params: PyTree,
    state: PersonalState,
    client: ClientView,
    key: jax.Array,
) -> ClientResult:
    w, theta, metrics = _train(training, params, state.personal, client, key)
    return ClientResult(optax.tree.sub(params, w), PersonalState(theta), metrics)


def _predict_personally(
    training: MoreauTraining, params: PyTree, state: PersonalState, inputs: jax.Array
) -> jax.Array:
    del params
    return training.model.apply(state.personal, inputs, None)


def _adapt_client(
    training: MoreauTraining, params: PyTree, client: ClientView, key: jax.Array
) -> PersonalState:
    return PersonalState(_train(training, params, params, client, key)[1])
