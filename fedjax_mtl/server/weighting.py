"""Weights that follow training: gradient normalisation over clients (GradNorm, FedGradNorm)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.server.facts import who_is_there
from fedjax_mtl.server.reports import Report

PyTree = Any


# --- How fast clients learn.


class FirstLosses(NamedTuple):
    """What the training rates of clients are measured against.

    Attributes:
        values: the first loss of each client, ``[clients]``; 0 before there is one.
        seen: bool ``[clients]``; whether there is one. A loss of 0 is no measure: the first loss
            that is not 0 counts.
    """

    values: jax.Array
    seen: jax.Array

    def observe(self, losses: jax.Array, there: jax.Array) -> "FirstLosses":
        """With the losses of clients that are there (bool ``[clients]``) and had none before."""
        new = there & ~self.seen
        values = jnp.where(new, losses, self.values).astype(self.values.dtype)
        return FirstLosses(values, self.seen | (new & (losses != 0)))


def first_losses(values: jax.Array) -> FirstLosses:
    """First losses that are known from the start, ``[clients]``, where they are not 0."""
    return FirstLosses(values, values != 0)


def training_rates(losses: jax.Array, first: jax.Array) -> jax.Array:
    """GradNorm's inverse training rates, never negative: small for a client that has learned much.

    ``[clients]``. For a positive first loss it is ``loss / first``, the papers' rate, or 0 once the
    loss is negative. The papers know positive losses only, but that of a density may be negative. A
    negative first loss is halved, so to speak, where it doubles: the rate is ``first / loss`` for a
    loss that is not above the first one, and ``2 - loss / first`` above it, which continues it with
    the same slope. Without a first loss (0) a client has nothing left to learn: its rate is 0.

    Args:
        losses: ``[clients]``.
        first: the first losses, ``[clients]``.
    """
    ratio = losses / jnp.where(first != 0, first, 1)
    learned = first / jnp.where(losses != 0, losses, 1)
    of_negative = jnp.where(losses <= first, learned, 2 - ratio)
    of_positive = jnp.maximum(ratio, 0)
    return jnp.where(first > 0, of_positive, jnp.where(first < 0, of_negative, 0))


# --- The weights' step.


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
    """One step of GradNorm's weights (Chen et al., arXiv 1711.02257, algorithm 1), ``[clients]``.

    As FedGradNorm (arXiv 2203.13663) takes it over clients:

        G_i = p_i norm_i,  target_i = mean(G) (rate_i / mean(rate))^exponent
        p_i <- p_i - learning_rate sign(G_i - target_i) norm_i

    then clamped to ``minimum`` and scaled so that the present clients' weights keep their sum. The
    target is a constant of the differentiation.

    Args:
        weights: p, the current weights, ``[clients]``.
        norms: of the unweighted gradients, ``[clients]``.
        rates: inverse training rates, ``[clients]``; see :func:`training_rates`.
        present: bool ``[clients]``; the others' weights stay, and they enter no mean.
        learning_rate: of the weights (the paper's alpha).
        exponent: of the relative training rate (its gamma, GradNorm's alpha).
        minimum: weights never fall below.
        renormalise: keep the weights' sum.
    """
    number = jnp.maximum(jnp.sum(present), 1)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(present, values, 0)) / number

    weighted = weights * norms
    relative = rates / jnp.maximum(mean(rates), jnp.finfo(rates.dtype).tiny)
    target = mean(weighted) * relative**exponent
    moved = jnp.maximum(weights - learning_rate * jnp.sign(weighted - target) * norms, minimum)
    if renormalise:
        total = jnp.sum(jnp.where(present, weights, 0))
        moved = moved * total / jnp.maximum(jnp.sum(jnp.where(present, moved, 0)), minimum)
    return jnp.where(present, moved, weights)


# --- The transformation.


class NormalizeGradientsState(NamedTuple):
    """What GradNorm remembers of all clients.

    Attributes:
        weights: the loss weights, ``[population]`` (``[clusters, cluster size]`` where clients
            stand in clusters).
        initial_losses: the first observed losses, of the same shape; 0 before there is one.
        seen: bool, of the same shape; whether there is one.
        report: ``loss_weights`` ``[population]``.
    """

    weights: jax.Array
    initial_losses: jax.Array
    seen: jax.Array
    report: Report

    @property
    def first(self) -> FirstLosses:
        """The first losses and which of them there are."""
        return FirstLosses(self.initial_losses, self.seen)


def gradnorm_state(weights: jax.Array, first: FirstLosses) -> NormalizeGradientsState:
    """The state with these weights and first losses, and its report."""
    report = Report({"loss_weights": weights.reshape(-1)})
    return NormalizeGradientsState(weights, first.values, first.seen, report)


def check_measured(params: PyTree, measured: trees.PathPredicate) -> None:
    """Raises InputError if the leaves whose norms are to be taken are not there."""
    if not jax.tree.leaves(trees.partition(params, measured)[0]):
        raise InputError("measured selects no leaf of the shared parameters; name a shared layer")


def _measured_norms(
    norms: str,
    measured: trees.PathPredicate,
    updates: PyTree,
    reports: dict[str, jax.Array] | None,
) -> jax.Array:
    """The norms of the clients' updates, or those that they report, ``[clients]``."""
    if norms == "update":
        return jax.vmap(optax.tree.norm)(trees.partition(updates, measured)[0])
    if reports is None or norms not in reports:
        known = ", ".join(sorted(reports or {})) or "nothing"
        raise InputError(f"norms={norms!r} is no metric of the clients, who report {known}")
    return reports[norms]


def normalize_gradients(
    num_clients: int,
    *,
    learning_rate: float | jax.Array,
    exponent: float | jax.Array = 0.6,
    measured: trees.PathPredicate = trees.everything,
    norms: str = "update",
    initial_losses: Sequence[float] | jax.Array | None = None,
    minimum: float = 1e-3,
    renormalise: bool = True,
    already_weighted: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """FedGradNorm's dynamic weights (arXiv 2203.13663), ``[clients, ...] -> [clients, ...]``.

    Every client's update is multiplied by its weight, which moves by :func:`gradnorm_weights` so
    that the norms of the weighted updates approach a common scale, larger for clients that have
    learned little (GradNorm, arXiv 1711.02257). Weights start at 1. Those of absent clients are
    frozen. A client whose loss or measured norm is not finite, because it made no step or diverged,
    counts as absent: it enters no rate and no mean.

    Args:
        num_clients: clients in the population.
        learning_rate: of the weights (the paper's alpha).
        exponent: of the relative training rate (its gamma, GradNorm's alpha).
        measured: path predicate of the leaves whose norm is taken; GradNorm: the last shared layer.
        norms: ``update``, of the updates as they arrive; otherwise the name of a metric that
            clients report, e.g. ``first_step_norm`` or ``mean_step_norm`` of
            ``local_trainer(watched=...)``.
        initial_losses: ``[num_clients]``; default each client's first observed loss. For
            classification GradNorm allows ``log(classes)``. Losses may be negative, see
            :func:`training_rates`.
        minimum: weights never fall below.
        renormalise: keep their sum.
        already_weighted: clients have multiplied their own loss by the weight they were sent; only
            the change is applied here.

    Extra arguments used: ``losses``, ``client_ids``, ``present``, and ``reports`` (the clients'
    metrics) unless ``norms`` is ``update``. Reports ``loss_weights`` ``[num_clients]``.

    Raises:
        InputError: (at init) ``measured`` selects nothing, or ``initial_losses`` has another shape;
            (when traced) the clients do not report ``norms``.
    """

    def init(params: PyTree) -> NormalizeGradientsState:
        check_measured(params, measured)
        given = jnp.zeros(num_clients) if initial_losses is None else initial_losses
        first = first_losses(jnp.asarray(given, float))
        if first.values.shape != (num_clients,):
            raise InputError(
                f"initial_losses has shape {first.values.shape} for {num_clients} clients; "
                "give one a client"
            )
        return gradnorm_state(jnp.ones_like(first.values), first)

    def update(
        updates, state, params=None, *, losses, client_ids, present=None, reports=None, **extra_args
    ):
        del params, extra_args
        measure = _measured_norms(norms, measured, updates, reports)
        there = who_is_there(updates, present) & jnp.isfinite(measure) & jnp.isfinite(losses)
        losses, measure = jnp.where(there, losses, 0), jnp.where(there, measure, 0)
        old = state.weights[client_ids]
        first = trees.take_clients(state.first, client_ids).observe(losses, there)
        new = gradnorm_weights(
            old,
            measure / old if already_weighted else measure,
            training_rates(losses, first.values),
            there,
            learning_rate=learning_rate,
            exponent=exponent,
            minimum=minimum,
            renormalise=renormalise,
        ).astype(old.dtype)
        kept = trees.put_clients((state.weights, state.first), client_ids, (new, first), there)
        factors = new / old if already_weighted else new
        return trees.scale_clients(factors, trees.mask_clients(updates, there)), gradnorm_state(
            *kept
        )

    return optax.GradientTransformationExtraArgs(init, update)
