"""Averages that mind the worst-off clients: agnostic FL and q-FedAvg."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees


class AgnosticState(NamedTuple):
    """The mixture over the population's clients, ``[population]``, on the simplex."""

    mixture: jax.Array


def agnostic_average(
    initial_mixture: jax.Array, learning_rate: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
    """Agnostic FL (Mohri, Sivek, Suresh, arXiv 1902.00146, section 4): descent in the model, ascent in the mixture of clients.

    ``[clients, ...] -> [...]``: the sum of the clients' gradients with the mixture's weights; then
    ``mixture <- projection onto the simplex of (mixture + learning_rate * losses)``. An absent client keeps its mixture weight before the
    projection and adds nothing to the sum.

    Args:
        initial_mixture: ``[population]``; the paper's choice is each client's share of the examples.
        learning_rate: the ascent step.

    Extra arguments used: ``losses`` ``[clients]`` (of the received model), ``client_ids`` and ``present`` ``[clients]``.
    """

    def init(params):
        del params
        return AgnosticState(jnp.asarray(initial_mixture))

    def update(updates, state, params=None, *, losses, client_ids, present, **extra_args):
        del params, extra_args
        weights = jnp.where(present, state.mixture[client_ids], 0)
        ascent = jnp.where(present, learning_rate * losses, 0).astype(state.mixture.dtype)
        mixture = state.mixture.at[client_ids].add(ascent)
        mixture = optax.projections.projection_simplex(mixture)
        return trees.weighted_sum(weights, updates), AgnosticState(mixture)

    return optax.GradientTransformationExtraArgs(init, update)


def q_fair_average(
    q: float | jax.Array, learning_rate: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
    """q-FedAvg (Li, Sanjabi, Beirami, Smith, arXiv 1905.10497, algorithm 2), ``[clients, ...] -> [...]``.

    With ``Delta_t = (w - w_t) / learning_rate`` and ``F_t`` the loss of the received model on client t,
    the result is ``sum_t F_t^q Delta_t / sum_t (q F_t^(q-1) ||Delta_t||^2 + F_t^q / learning_rate)``: q = 0 is the plain mean (FedAvg over equal
    clients), large q approaches agnostic FL. Follow it with ``optax.sgd(1.0)``.

    Extra arguments used: ``losses`` and ``present`` ``[clients]``.
    """

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, *, losses, present, **extra_args):
        del params, extra_args
        losses = jnp.maximum(losses, 1e-10)  # as the authors' code: 0 ** (q - 1) is infinite
        loss_to_q = jnp.where(present, losses**q, 0)
        gradients = optax.tree.scale(1.0 / learning_rate, updates)
        squared_norms = jax.vmap(lambda g: optax.tree.norm(g, squared=True))(gradients)
        curvature = jnp.where(present, q * losses ** (q - 1) * squared_norms, 0)
        total = jnp.sum(curvature + loss_to_q / learning_rate)
        weights = loss_to_q / jnp.maximum(total, jnp.finfo(total.dtype).tiny)
        return trees.weighted_sum(weights, gradients), state

    return optax.GradientTransformationExtraArgs(init, update)
