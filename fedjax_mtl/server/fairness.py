"""Averages that mind the worst-off clients: agnostic FL and q-FedAvg."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.server.reports import Report

PyTree = Any


class AgnosticState(NamedTuple):
    """What agnostic FL learns beside the model.

    Attributes:
        mixture: ``[population]``, on the simplex; the weights of the clients.
        report: ``mixture``.
    """

    mixture: jax.Array
    report: Report


def _agnostic_state(mixture: jax.Array) -> AgnosticState:
    return AgnosticState(mixture, Report({"mixture": mixture}))


def agnostic_average(
    initial_mixture: jax.Array, learning_rate: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
    """Agnostic FL: descent in the model, ascent in the mixture of clients.

    ``[clients, ...] -> [...]``. As Mohri, Sivek, Suresh (arXiv 1902.00146, section 4) have it, the
    result is the sum of the clients' gradients with the mixture's weights, and then

        mixture <- projection onto the simplex of (mixture + learning_rate * losses)

    An absent client keeps its mixture weight before the projection and adds nothing to the sum. A
    client without a loss (NaN: it made no step) does not ascend.

    Args:
        initial_mixture: ``[population]``; the paper's choice is each client's share of the
            examples.
        learning_rate: the ascent step.

    Extra arguments used: ``losses`` ``[clients]`` (of the received model), ``client_ids`` and
    ``present`` ``[clients]``. Reports ``mixture`` ``[population]``.
    """

    def init(params: PyTree) -> AgnosticState:
        del params
        return _agnostic_state(jnp.asarray(initial_mixture))

    def update(updates, state, params=None, *, losses, client_ids, present, **extra_args):
        del params, extra_args
        weights = jnp.where(present, state.mixture[client_ids], 0)
        ascends = present & jnp.isfinite(losses)
        ascent = jnp.where(ascends, learning_rate * losses, 0).astype(state.mixture.dtype)
        mixture = state.mixture.at[client_ids].add(ascent)
        mixture = optax.projections.projection_simplex(mixture)
        mean = trees.weighted_sum(weights, trees.mask_clients(updates, present))
        return mean, _agnostic_state(mixture)

    return optax.GradientTransformationExtraArgs(init, update)


def q_fair_average(
    q: float | jax.Array, learning_rate: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
    """q-FedAvg (Li, Sanjabi, Beirami, Smith, arXiv 1905.10497, algorithm 2).

    ``[clients, ...] -> [...]``. With ``Delta_t = (w - w_t) / learning_rate`` and ``F_t`` the loss
    of the received model on client t, the result is

        sum_t F_t^q Delta_t / sum_t (q F_t^(q-1) ||Delta_t||^2 + F_t^q / learning_rate)

    q = 0 is the plain mean (FedAvg over equal clients); large q approaches agnostic FL. Follow it
    with ``optax.sgd(1.0)``. A client without a loss (NaN: it made no step) counts in neither sum.

    Args:
        q: how much larger losses weigh.
        learning_rate: of the local steps; its inverse estimates the Lipschitz constant.

    Extra arguments used: ``losses`` and ``present`` ``[clients]``.
    """

    def update(updates, state, params=None, *, losses, present, **extra_args):
        del params, extra_args
        counts = present & jnp.isfinite(losses)
        updates = trees.mask_clients(updates, counts)
        losses = jnp.maximum(losses, 1e-10)  # as the authors' code: 0 ** (q - 1) is infinite
        loss_to_q = jnp.where(counts, losses**q, 0)
        gradients = optax.tree.scale(1.0 / learning_rate, updates)
        squared_norms = jax.vmap(lambda g: optax.tree.norm(g, squared=True))(gradients)
        curvature = jnp.where(counts, q * losses ** (q - 1) * squared_norms, 0)
        total = jnp.sum(curvature + loss_to_q / learning_rate)
        weights = loss_to_q / jnp.maximum(total, jnp.finfo(total.dtype).tiny)
        return trees.weighted_sum(weights, gradients), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
