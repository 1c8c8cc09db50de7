"""Over-the-air aggregation of clusters on a fading channel (HOTA-FedGradNorm).

Inside each cluster gradients are normalised as in :mod:`fedjax_mtl.server.weighting`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.server.facts import who_is_there
from fedjax_mtl.server.weighting import (
    FirstLosses,
    NormalizeGradientsState,
    check_measured,
    gradnorm_state,
    gradnorm_weights,
    training_rates,
)

PyTree = Any


# --- The channel.


class Channel(NamedTuple):
    """A fading channel; the fields are arguments of :func:`over_the_air_gradnorm`."""

    threshold: float
    fading: float | jax.Array
    noise: float | jax.Array
    transmit_scale: float
    power: float | None

    def is_clear(self, gain: jax.Array) -> jax.Array:
        """Where a cluster transmits: bool, of the gain's shape."""
        return jnp.square(gain) >= self.threshold


def rayleigh_gains(key: jax.Array, like: PyTree, spread: jax.Array) -> PyTree:
    """Magnitudes of ``CN(0, spread_l^2)``, independent in every entry.

    Args:
        key: of the draw.
        like: leaves ``[clusters, ...]`` of the shapes that are wanted.
        spread: ``[clusters]``.
    """
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
    """One analog aggregation by truncated channel inversion, ``[clusters, ...] -> [...]``.

    As in HOTA-FedGradNorm (arXiv 2212.07414), every cluster transmits ``scale * gradient / gain``
    where its power gain reaches the threshold; the sum arrives with noise and is divided by the
    scale and by how many transmitted. An entry on which nobody transmits is 0.

    Args:
        gradients: leaves ``[clusters, ...]``.
        gains: the channels' magnitudes, leaves ``[clusters, ...]``.
        noise: what the receiver adds, leaves ``[...]``.
        threshold: on the power gain.
        transmit_scale: common power scaling.
        active: bool ``[clusters]``; the others are silent. Default all.
    """

    def receive(gradient: jax.Array, gain: jax.Array, noise: jax.Array) -> jax.Array:
        clear = jnp.square(gain) >= threshold
        if active is not None:
            clear = clear & trees.along_first_axis(active, gain)
        sent = jnp.where(clear, transmit_scale * gradient / jnp.where(clear, gain, 1), 0)
        count = jnp.sum(clear, axis=0)
        received = jnp.sum(gain * sent, axis=0) + noise
        return jnp.where(count > 0, received / (transmit_scale * jnp.maximum(count, 1)), 0)

    return jax.tree.map(receive, gradients, gains, noise)


def _power_scale(channel: Channel, power: float, gradients: PyTree, gains: PyTree) -> jax.Array:
    """The largest common scale at which no cluster transmits more than ``power``.

    The energy of a cluster is the sum over all its entries.
    """

    def energy(gradient: jax.Array, gain: jax.Array) -> jax.Array:
        clear = channel.is_clear(gain)
        sent = jnp.where(clear, gradient / jnp.where(clear, gain, 1), 0)
        return jnp.sum(jnp.square(sent).reshape(sent.shape[0], -1), axis=1)

    energies = jax.tree.reduce(jnp.add, jax.tree.map(energy, gradients, gains))
    return jnp.sqrt(power / jnp.maximum(jnp.max(energies), jnp.finfo(energies.dtype).tiny))


def _draw_gains(channel: Channel, key: jax.Array, updates: PyTree) -> PyTree:
    """Each cluster's channel, leaves ``[clusters, ...]``, for updates ``[clusters, size, ...]``."""
    one_each = jax.tree.map(lambda x: x[:, 0], updates)
    num_clusters = jax.tree.leaves(one_each)[0].shape[0]
    spread = jnp.broadcast_to(jnp.asarray(channel.fading, jnp.float32), (num_clusters,))
    return rayleigh_gains(key, one_each, spread)


def _transmit(
    channel: Channel, key: jax.Array, clusters: PyTree, gains: PyTree, active: jax.Array
) -> PyTree:
    """All clusters' gradients over the air, ``[clusters, ...] -> [...]``."""
    scale: jax.Array | float = channel.transmit_scale
    if channel.power is not None:
        scale = _power_scale(channel, channel.power, clusters, gains)
    drawn = optax.tree.random_like(key, jax.tree.map(lambda x: x[0], clusters))
    noise = optax.tree.scale(channel.noise, drawn)
    return over_the_air_sum(clusters, gains, noise, channel.threshold, scale, active)


# --- GradNorm inside the clusters.


class ClusterWeights(NamedTuple):
    """How weights move in clusters; the fields are arguments of :func:`over_the_air_gradnorm`."""

    learning_rate: float | jax.Array
    exponent: float | jax.Array
    minimum: float

    def move(
        self, weights: jax.Array, norms: jax.Array, rates: jax.Array, present: jax.Array
    ) -> jax.Array:
        """Every cluster's weights by :func:`gradnorm_weights`, ``[clusters, size]`` each."""

        def of_cluster(weights, norms, rates, present):
            return gradnorm_weights(weights, norms, rates, present, **self._asdict())

        return jax.vmap(of_cluster)(weights, norms, rates, present)


def _received_norms(
    channel: Channel, measured: trees.PathPredicate, updates: PyTree, gains: PyTree
) -> jax.Array:
    """Norms of the updates where their cluster's channel is clear, ``[clusters, size]``."""
    masked = jax.tree.map(
        lambda u, h: jnp.where(channel.is_clear(h)[:, None], u, 0), updates, gains
    )
    return jax.vmap(jax.vmap(optax.tree.norm))(trees.partition(masked, measured)[0])


def _sum_in_clusters(weights: jax.Array, there: jax.Array, updates: PyTree) -> PyTree:
    """Each cluster's mean over those present, ``[clusters, size, ...] -> [clusters, ...]``."""
    number = jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1)
    return jax.vmap(trees.weighted_sum)(jnp.where(there, weights, 0) / number, updates)


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
    """HOTA-FedGradNorm's server (arXiv 2212.07414; Algorithms 15(11):421).

    ``[clients, ...] -> [...]``. Client ``l * cluster_size + i`` does task i in cluster l. Each
    cluster weighs its clients by GradNorm on gradients masked by its channel of the round, sums
    them without error, and all clusters transmit at once over fading channels
    (:func:`over_the_air_sum`). The structure follows the paper as recalled, the formulas are a
    reconstruction. Of absent clients, and of those without a finite loss, the weights are frozen,
    and their cluster's mean is over the others.

    Args:
        num_clusters: how many clusters; all clients stand in one.
        cluster_size: clients in a cluster.
        learning_rate: of the weights; 0 is the twin with equal static weights.
        exponent: as for :func:`fedjax_mtl.server.normalize_gradients`.
        measured: as for :func:`fedjax_mtl.server.normalize_gradients`.
        threshold: on the power gain.
        fading: spread of each cluster's channel, a scalar or ``[num_clusters]``.
        noise: standard deviation at the receiver.
        transmit_scale: common power scaling.
        power: chooses the scaling each round as the largest at which no cluster's transmission,
            summed over its entries, exceeds this.
        minimum: as for :func:`fedjax_mtl.server.normalize_gradients`.

    Extra arguments used: ``losses``, ``client_ids``, ``present``, ``key``. Reports ``loss_weights``
    ``[clients]``.

    Raises:
        InputError: (at init) ``measured`` selects nothing; (when traced) a cohort that is not all
            clients.
    """
    shape = (num_clusters, cluster_size)
    channel = Channel(threshold, fading, noise, transmit_scale, power)
    rule = ClusterWeights(learning_rate, exponent, minimum)

    def init(params: PyTree) -> NormalizeGradientsState:
        check_measured(params, measured)
        return gradnorm_state(
            jnp.ones(shape), FirstLosses(jnp.zeros(shape), jnp.zeros(shape, bool))
        )

    def update(updates, state, params=None, *, losses, client_ids, key, present=None, **extra_args):
        del params, extra_args
        _check_everybody(client_ids, shape)
        there = who_is_there(updates, present) & jnp.isfinite(losses)
        facts = (trees.mask_clients(updates, there), there, jnp.where(there, losses, 0))
        updates, there, losses = _by_cluster(facts, client_ids, shape)
        gain_key, noise_key = jax.random.split(key)
        gains = _draw_gains(channel, gain_key, updates)
        first = state.first.observe(losses, there)
        norms = _received_norms(channel, measured, updates, gains)
        rates = training_rates(losses, first.values)
        weights = rule.move(state.weights, norms, rates, there)
        clusters = _sum_in_clusters(weights, there, updates)
        received = _transmit(channel, noise_key, clusters, gains, jnp.any(there, axis=1))
        return received, gradnorm_state(weights, first)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_everybody(client_ids: jax.Array, shape: tuple[int, int]) -> None:
    if client_ids.shape[0] != shape[0] * shape[1]:
        raise InputError(
            f"{shape[0]} clusters of {shape[1]} are {shape[0] * shape[1]} clients, the cohort has "
            f"{client_ids.shape[0]}; use full participation"
        )


def _by_cluster(tree: PyTree, client_ids: jax.Array, shape: tuple[int, int]) -> PyTree:
    """Rows by the clients' numbers, ``[clients, ...] -> [clusters, cluster size, ...]``."""
    order = jnp.argsort(client_ids)
    return jax.tree.map(lambda x: x[order].reshape(*shape, *x.shape[1:]), tree)
