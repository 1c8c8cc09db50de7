"""Over-the-air aggregation of clusters on a fading channel, with gradient normalisation inside each cluster (HOTA-FedGradNorm)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.server.weighting import NormalizeGradientsState, gradnorm_weights

PyTree = Any


def rayleigh_gains(key: jax.Array, like: PyTree, spread: jax.Array) -> PyTree:
    """Magnitudes of ``CN(0, spread_l^2)``, independent in every entry: leaves like those of ``like`` ``[clusters, ...]``; ``spread`` ``[clusters]``."""
    exponential = optax.tree.random_like(key, like, sampler=jax.random.exponential)
    return trees.scale_clients(spread, jax.tree.map(jnp.sqrt, exponential))


def over_the_air_sum(
    gradients: PyTree,
    gains: PyTree,
    noise: PyTree,
    threshold: float,
    transmit_scale: jax.Array | float,
    active: jax.Array | None = None,
) -> PyTree:
    """One analog aggregation by truncated channel inversion, ``[clusters, ...] -> [...]`` (HOTA-FedGradNorm, arXiv 2212.07414).

    Every cluster transmits ``scale * gradient / gain`` where its power gain reaches the threshold; the sum arrives with noise and is divided by the
    scale and by how many transmitted. An entry on which nobody transmits is 0. Clusters that are not ``active`` (bool ``[clusters]``) are silent.
    """

    def receive(gradient, gain, noise):
        clear = jnp.square(gain) >= threshold
        if active is not None:
            clear = clear & trees.along_first_axis(active, gain)
        sent = jnp.where(clear, transmit_scale * gradient / jnp.where(clear, gain, 1), 0)
        count = jnp.sum(clear, axis=0)
        received = jnp.sum(gain * sent, axis=0) + noise
        return jnp.where(count > 0, received / (transmit_scale * jnp.maximum(count, 1)), 0)

    return jax.tree.map(receive, gradients, gains, noise)


def _power_scale(gradients: PyTree, gains: PyTree, threshold: float, power: float) -> jax.Array:
    """The largest common scale at which no cluster transmits more than ``power``."""

    def energy(gradient, gain):
        clear = jnp.square(gain) >= threshold
        sent = jnp.where(clear, gradient / jnp.where(clear, gain, 1), 0)
        return jnp.sum(jnp.square(sent).reshape(sent.shape[0], -1), axis=1)

    energies = sum(jax.tree.leaves(jax.tree.map(energy, gradients, gains)))
    return jnp.sqrt(power / jnp.maximum(jnp.max(energies), jnp.finfo(energies.dtype).tiny))


def over_the_air_gradnorm(
    num_clusters: int,
    cluster_size: int,
    *,
    learning_rate: float | jax.Array,
    exponent: float | jax.Array = 0.6,
    measured: trees.PathPredicate = trees.everything,
    threshold: float = 0.032,
    fading: float | jax.Array = 1.0,
    noise: float | jax.Array = 1e-3,
    transmit_scale: float = 1.0,
    power: float | None = None,
    minimum: float = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """HOTA-FedGradNorm's server (arXiv 2212.07414; Algorithms 15(11):421), ``[clients, ...] -> [...]``.

    Client ``l * cluster_size + i`` does task i in cluster l. Each cluster weighs its clients by GradNorm on gradients masked by its channel of the round, sums them without error, and all
    clusters transmit at once over fading channels (:func:`over_the_air_sum`). The structure follows the paper as recalled, the formulas are a reconstruction.

    Args:
        num_clusters, cluster_size: all clients, whole clusters.
        learning_rate: of the weights; 0 is the twin with equal static weights. exponent, measured, minimum: as for ``normalize_gradients``.
        threshold: on the power gain. fading: spread of each cluster's channel, a scalar or ``[num_clusters]``. noise: standard deviation at the receiver.
        transmit_scale: common power scaling; ``power`` chooses it each round as the largest that no cluster exceeds.

    Extra arguments used: ``losses``, ``client_ids``, ``present``, ``key``. Of absent clients the weights are frozen, and their cluster's mean is over those present.

    Raises:
        ValueError: (when traced) a cohort that is not all clients.
    """
    total = num_clusters * cluster_size

    def init(params):
        if not jax.tree.leaves(trees.partition(params, measured)[0]):
            raise ValueError(
                "measured selects no leaf of the shared parameters; name a shared layer"
            )
        shape = (num_clusters, cluster_size)
        return NormalizeGradientsState(jnp.ones(shape), jnp.zeros(shape))

    def update(updates, state, params=None, *, losses, client_ids, key, present=None, **extra_args):
        del params, extra_args
        if client_ids.shape[0] != total:
            raise ValueError(
                f"{num_clusters} clusters of {cluster_size} are {total} clients, the cohort has {client_ids.shape[0]}; use full participation"
            )
        there = jnp.ones(total, bool) if present is None else present
        order = jnp.argsort(client_ids)

        def by_cluster(x):
            return x[order].reshape(num_clusters, cluster_size, *x.shape[1:])

        updates = jax.tree.map(by_cluster, trees.mask_clients(updates, there))
        there, losses = by_cluster(there), by_cluster(jnp.where(there, losses, 0))
        one_each = jax.tree.map(lambda x: x[:, 0], updates)
        gain_key, noise_key = jax.random.split(key)
        spread = jnp.broadcast_to(jnp.asarray(fading, jnp.float32), (num_clusters,))
        gains = rayleigh_gains(gain_key, one_each, spread)

        masked = jax.tree.map(
            lambda u, h: jnp.where((jnp.square(h) >= threshold)[:, None], u, 0), updates, gains
        )
        norms = jax.vmap(jax.vmap(optax.tree.norm))(trees.partition(masked, measured)[0])
        first = jnp.where(there & (state.initial_losses <= 0), losses, state.initial_losses)
        rates = jnp.where(first > 0, losses / jnp.where(first > 0, first, 1), 0)

        def weigh(weights, norms, rates, there):
            return gradnorm_weights(
                weights,
                norms,
                rates,
                there,
                learning_rate=learning_rate,
                exponent=exponent,
                minimum=minimum,
            )

        weights = jax.vmap(weigh)(state.weights, norms, rates, there)
        shares = jnp.where(there, weights, 0) / jnp.maximum(
            jnp.sum(there, axis=1, keepdims=True), 1
        )
        clusters = jax.vmap(trees.weighted_sum)(shares, updates)
        scale = transmit_scale if power is None else _power_scale(clusters, gains, threshold, power)
        drawn = optax.tree.random_like(noise_key, jax.tree.map(lambda x: x[0], clusters))
        received = over_the_air_sum(
            clusters,
            gains,
            optax.tree.scale(noise, drawn),
            threshold,
            scale,
            jnp.any(there, axis=1),
        )
        return received, NormalizeGradientsState(weights, first)

    return optax.GradientTransformationExtraArgs(init, update)
