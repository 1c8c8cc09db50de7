"""Weights that follow training: gradient normalisation over clients (GradNorm, FedGradNorm)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees


class NormalizeGradientsState(NamedTuple):
    """Loss weights and first observed losses of all clients, ``[population]`` each; a first loss of 0 means not yet observed."""

    weights: jax.Array
    initial_losses: jax.Array


def gradnorm_weights(
    weights: jax.Array,
    norms: jax.Array,
    rates: jax.Array,
    present: jax.Array,
    *,
    learning_rate: float | jax.Array,
    exponent: float | jax.Array,
    minimum: float = 1e-3,
    renormalise: bool = True,
) -> jax.Array:
    """One step of GradNorm's weights (Chen et al., arXiv 1711.02257, algorithm 1; FedGradNorm, arXiv 2203.13663), ``[clients]``.

        G_i = p_i norm_i,  target_i = mean(G) (rate_i / mean(rate))^exponent,  p_i <- p_i - learning_rate sign(G_i - target_i) norm_i

    then clamped to ``minimum`` and scaled so that the present clients' weights keep their sum. The target is a constant of the differentiation.

    Args:
        weights, norms, rates: ``[clients]``; current weights, norms of the unweighted gradients, inverse training rates (loss over first loss).
        present: bool ``[clients]``; the others' weights stay, and they enter no mean.
    """
    number = jnp.maximum(jnp.sum(present), 1)

    def mean(values):
        return jnp.sum(jnp.where(present, values, 0)) / number

    weighted = weights * norms
    relative = rates / jnp.maximum(mean(rates), jnp.finfo(rates.dtype).tiny)
    target = mean(weighted) * relative**exponent
    moved = jnp.maximum(weights - learning_rate * jnp.sign(weighted - target) * norms, minimum)
    if renormalise:
        total = jnp.sum(jnp.where(present, weights, 0))
        moved = moved * total / jnp.maximum(jnp.sum(jnp.where(present, moved, 0)), minimum)
    return jnp.where(present, moved, weights)


def normalize_gradients(
    num_clients: int,
    *,
    learning_rate: float | jax.Array,
    exponent: float | jax.Array = 0.6,
    measured: trees.PathPredicate = trees.everything,
    norms: str = "update",
    initial_losses: jax.Array | None = None,
    minimum: float = 1e-3,
    renormalise: bool = True,
    already_weighted: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """FedGradNorm's dynamic weights (arXiv 2203.13663; GradNorm, arXiv 1711.02257), ``[clients, ...] -> [clients, ...]``.

    Every client's update is multiplied by its weight, which moves so that the norms of the weighted updates approach a common scale, larger for clients that
    have learned little. Weights start at 1. Those of absent clients are frozen; a client whose loss or measured norm is not finite counts as absent.

    Args:
        num_clients: clients in the population.
        learning_rate: of the weights (the paper's alpha). exponent: of the relative training rate (its gamma, GradNorm's alpha).
        measured: path predicate of the leaves whose norm is taken; GradNorm: the last shared layer.
        norms: ``update``, of the updates as they arrive; otherwise the name of a metric that clients report, e.g. ``first_step_norm`` or
            ``mean_step_norm`` of ``local_trainer(watched=...)``.
        initial_losses: ``[num_clients]``; default each client's first observed loss. For classification GradNorm allows ``log(classes)``.
        minimum: weights never fall below. renormalise: keep their sum.
        already_weighted: clients have multiplied their own loss by the weight they were sent; only the change is applied here.

    Extra arguments used: ``losses``, ``client_ids``, ``present``, and ``reports`` (the clients' metrics) unless ``norms`` is ``update``.

    Raises:
        ValueError: ``measured`` selects nothing, or the clients do not report ``norms``.
    """

    def init(params):
        if not jax.tree.leaves(trees.partition(params, measured)[0]):
            raise ValueError(
                "measured selects no leaf of the shared parameters; name a shared layer"
            )
        first = (
            jnp.zeros(num_clients) if initial_losses is None else jnp.asarray(initial_losses, float)
        )
        if first.shape != (num_clients,):
            raise ValueError(
                f"initial_losses has shape {first.shape} for {num_clients} clients; give one a client"
            )
        return NormalizeGradientsState(jnp.ones_like(first), first)

    def update(
        updates, state, params=None, *, losses, client_ids, present=None, reports=None, **extra_args
    ):
        del params, extra_args
        there = jnp.ones(client_ids.shape, bool) if present is None else present
        updates = trees.mask_clients(updates, there)
        if norms == "update":
            measure = jax.vmap(optax.tree.norm)(trees.partition(updates, measured)[0])
        elif reports is None or norms not in reports:
            known = ", ".join(sorted(reports or {})) or "nothing"
            raise ValueError(f"norms={norms!r} is no metric of the clients, who report {known}")
        else:
            measure = reports[norms]
        there = there & jnp.isfinite(measure) & jnp.isfinite(losses)
        losses, measure = jnp.where(there, losses, 0), jnp.where(there, measure, 0)
        old, first = state.weights[client_ids], state.initial_losses[client_ids]
        measure = measure / old if already_weighted else measure
        first = jnp.where(there & (first <= 0), losses, first)
        # A client that starts at a loss of 0 has nothing left to learn: its rate counts as 0.
        rates = jnp.where(first > 0, losses / jnp.where(first > 0, first, 1), 0)
        new = gradnorm_weights(
            old,
            measure,
            rates,
            there,
            learning_rate=learning_rate,
            exponent=exponent,
            minimum=minimum,
            renormalise=renormalise,
        ).astype(old.dtype)
        kept = NormalizeGradientsState(
            trees.put_clients(state.weights, client_ids, new, there),
            trees.put_clients(state.initial_losses, client_ids, first, there),
        )
        factors = new / old if already_weighted else new
        return trees.scale_clients(factors, trees.mask_clients(updates, there)), kept

    return optax.GradientTransformationExtraArgs(init, update)
