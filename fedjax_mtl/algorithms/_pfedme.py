"""pFedMe: personalised models as Moreau envelopes of the local losses.

Dinh, Tran, Nguyen, NeurIPS 2020, arXiv 2006.08848, algorithm 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.training import Schedule, loss_gradient, proximal, quadratic_pull
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate, anchored_trainer
from fedjax_mtl.core.batching import BatchPlan, for_each_batch
from fedjax_mtl.execution import Execution
from fedjax_mtl.models import Model
from fedjax_mtl.rounds.federated import Algorithm, federated
from fedjax_mtl.server import step_from
from fedjax_mtl.tasks import Task, example_losses

PyTree = Any


class PersonalState(NamedTuple):
    """What a pFedMe client keeps: its personalised model."""

    personal: PyTree


def _moreau_client(
    model: Model,
    task: Task,
    optimizer: optax.GradientTransformation,
    plan: BatchPlan,
    penalty: float | jax.Array,
    learning_rate: float | jax.Array,
    inner_steps: int,
    schedule: Schedule | None,
) -> ClientUpdate:
    """The published client: each local step solves the proximal problem of a batch, then moves the local copy of w."""
    gradient = loss_gradient(example_losses(model, task))

    def solve(anchor, theta, batch, key):
        """theta(w) ~ argmin f(theta; batch) + penalty / 2 ||theta - w||^2, by ``inner_steps`` optimiser steps (line 7)."""
        pulled = proximal(gradient, penalty, anchor)

        def step(_, carry):
            theta, state, _ = carry
            loss, grads = pulled(theta, batch, key)
            updates, state = optimizer.update(grads, state, theta)
            return optax.apply_updates(theta, updates), state, loss

        carry = (theta, optimizer.init(theta), jnp.zeros(()))
        theta, _, loss = jax.lax.fori_loop(0, inner_steps, step, carry)
        return theta, loss

    def run(w, theta, client, key):
        scale = 1.0 if schedule is None else schedule(client.round)

        def step(carry, batch, step_key):
            w, theta, total = carry
            theta, loss = solve(w, theta, batch, step_key)
            moved = jax.tree.map(
                lambda a, b: a - (scale * learning_rate * penalty * (a - b)).astype(a.dtype),
                w,
                theta,
            )
            return moved, theta, total + loss

        (w, theta, total), done = for_each_batch(step, (w, theta, jnp.zeros(())), client, plan, key)
        return w, theta, {"loss": total / jnp.maximum(done, 1), "num_steps": done}

    def init(params):
        return PersonalState(params)

    def update(params, state, client, key):
        w, theta, metrics = run(params, state.personal, client, key)
        return ClientResult(optax.tree.sub(params, w), PersonalState(theta), metrics)

    def predict(params, state, inputs):
        del params
        return model.apply(state.personal, inputs, None)

    def adapt(params, client, key):
        return PersonalState(run(params, params, client, key)[1])

    return ClientUpdate(init, update, predict, adapt)


def pfedme(
    model: Model,
    task: Task,
    *,
    num_clients: int,
    plan: BatchPlan,
    optimizer: optax.GradientTransformation,
    penalty: float = 15.0,
    learning_rate: float = 0.005,
    inner_steps: int = 5,
    server_step: float = 1.0,
    schedule: Schedule | None = None,
    fidelity: str = "paper",
    execution: Execution | None = None,
) -> Algorithm:
    """pFedMe.

    Paper (algorithm 1): every local step draws a batch, finds ``theta ~ argmin f(theta; batch) + penalty / 2 ||theta - w||^2`` in
    ``inner_steps`` steps of ``optimizer``, then ``w <- w - learning_rate * penalty * (w - theta)``; the server sets
    ``w <- (1 - server_step) w + server_step * mean of the clients' w`` (unweighted). Clients predict with theta. As in the authors' code, theta
    is warm-started from the previous batch's.

    ``fidelity="released"`` is what FedEM's code runs under this name: each client keeps a model of its own, trained with the gradient of
    ``penalty / 2 ||theta_t - w||^2`` added, w being the example-weighted mean of all clients' models, recomputed every round (the objective of
    Hanzely and Richtarik); ``learning_rate``, ``inner_steps`` and ``server_step`` are not used. It needs full participation.

    Args:
        num_clients, model, task, plan, schedule, execution: as for ``fedavg``.
        optimizer: the solver of the inner problem (released: the local optimiser, kept from round to round).
        penalty: lambda (released: mu).
        learning_rate: eta, of the local w. inner_steps: K. server_step: beta.
    """
    if fidelity not in ("paper", "released"):
        raise ValueError(f"fidelity must be 'paper' or 'released', got {fidelity!r}")
    if fidelity == "released":
        # With a plain average at the server the anchor is the mean of the personal models.
        pull = quadratic_pull(penalty)
        client = anchored_trainer(
            model, task, optimizer, plan, pull, schedule=schedule, keep_optimizer=True
        )
        server, weighting = step_from(optax.sgd(1.0)), "population"
    else:
        client = _moreau_client(
            model, task, optimizer, plan, penalty, learning_rate, inner_steps, schedule
        )
        server, weighting = step_from(optax.sgd(server_step)), "uniform"
    return federated(
        model.init,
        client,
        server,
        num_clients=num_clients,
        weighting=weighting,
        execution=execution,
        full_participation=fidelity == "released",
    )
