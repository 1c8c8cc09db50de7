"""APFL: adaptive personalised federated learning.

Deng, Kamani, Mahdavi, arXiv 2003.13461, algorithm 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.training import Schedule, loss_gradient
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate
from fedjax_mtl.core.batching import BatchPlan, for_each_batch
from fedjax_mtl.execution import Execution
from fedjax_mtl.models import Model
from fedjax_mtl.rounds.federated import Algorithm, Weighting, federated
from fedjax_mtl.server import step_from
from fedjax_mtl.tasks import Task, example_losses

PyTree = Any


class APFLClientState(NamedTuple):
    """What an APFL client keeps: its own model v, and the share alpha of v in its personalised model."""

    own: PyTree
    alpha: jax.Array


def interpolate(alpha: jax.Array, own: PyTree, shared: PyTree) -> PyTree:
    """``alpha * own + (1 - alpha) * shared`` on every leaf: the personalised model."""
    return jax.tree.map(lambda v, w: (alpha * v + (1 - alpha) * w).astype(w.dtype), own, shared)


def apfl(
    model: Model,
    task: Task,
    *,
    num_clients: int,
    plan: BatchPlan,
    optimizer: optax.GradientTransformation,
    alpha: float = 0.5,
    alpha_learning_rate: float = 0.0,
    weighting: Weighting = "samples",
    schedule: Schedule | None = None,
    fidelity: str = "paper",
    execution: Execution | None = None,
) -> Algorithm:
    """APFL.

    Every local step, on one batch: ``w <- w - eta grad f(w)`` and ``v <- v - eta grad_v f(alpha v + (1 - alpha) w)``; if adaptive,
    ``alpha <- clip(alpha - eta_alpha <v - w, grad f(alpha v + (1 - alpha) w)>, 0, 1)`` (equation 9). The server averages w. Clients predict with the
    interpolated model; a newcomer trains v for one round.

    Args:
        optimizer: the solver of both w and v, fresh every round.
        alpha: initial share of the own model: 0 is FedAvg, 1 is training alone.
        alpha_learning_rate: eta_alpha; 0 keeps alpha fixed.
        fidelity: only ``paper``; FedEM's released code lists APFL but cannot start it.

    Raises:
        ValueError: ``fidelity="released"``, or alpha outside [0, 1].
    """
    if fidelity != "paper":
        raise ValueError(
            f"apfl has fidelity 'paper' only, got {fidelity!r}: FedEM's released code raises NotImplementedError for APFL"
        )
    if not isinstance(alpha, jax.core.Tracer) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it is a share, give 0..1")
    gradient = loss_gradient(example_losses(model, task))

    def personal_gradient(own, shared, alpha, batch, key):
        loss, grads = gradient(interpolate(alpha, own, shared), batch, key)
        # d(alpha v + (1 - alpha) w) / dv = alpha
        alpha_gradient = optax.tree.vdot(optax.tree.sub(own, shared), grads)
        return loss, optax.tree.scale(alpha, grads), alpha_gradient

    def run(params, state, client, key):
        scale = 1.0 if schedule is None else schedule(client.round)

        def move(grads, optimizer_state, params):
            updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
            updates = jax.tree.map(lambda u: u * jnp.asarray(scale, u.dtype), updates)
            return optax.apply_updates(params, updates), optimizer_state

        def step(carry, batch, step_key):
            w, v, alpha, w_state, v_state, total = carry
            _, w_grads = gradient(w, batch, step_key)
            loss, v_grads, alpha_grad = personal_gradient(v, w, alpha, batch, step_key)
            w, w_state = move(w_grads, w_state, w)
            v, v_state = move(v_grads, v_state, v)
            alpha = jnp.clip(alpha - alpha_learning_rate * alpha_grad, 0, 1).astype(alpha.dtype)
            return w, v, alpha, w_state, v_state, total + loss

        w, v = params, state.own
        carry = (w, v, state.alpha, optimizer.init(w), optimizer.init(v), jnp.zeros(()))
        (w, v, new_alpha, _, _, total), done = for_each_batch(step, carry, client, plan, key)
        metrics = {
            "loss": total / jnp.maximum(done, 1),
            "num_steps": done,
            "alpha": new_alpha,
        }
        return w, APFLClientState(v, new_alpha), metrics

    def init(params):
        return APFLClientState(params, jnp.asarray(alpha, jnp.float32))

    def update(params, state, client, key):
        w, kept, metrics = run(params, state, client, key)
        return ClientResult(optax.tree.sub(params, w), kept, metrics)

    def predict(params, state, inputs):
        return model.apply(interpolate(state.alpha, state.own, params), inputs, None)

    def adapt(params, client, key):
        return run(params, init(params), client, key)[1]

    return federated(
        model.init,
        ClientUpdate(init, update, predict, adapt),
        step_from(optax.sgd(1.0)),
        num_clients=num_clients,
        weighting=weighting,
        execution=execution,
    )
