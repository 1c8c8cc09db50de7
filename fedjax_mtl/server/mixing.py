"""Server transformations that keep the client axis: every client's new model is a mixture of the cohort's.

``updates`` are pseudo-gradients and ``params`` the cohort's parameters before the round, both ``[cohort, ...]``, as in :func:`fedjax_mtl.rounds.relational.relational`; the models
that came back are ``params - updates``. Each transformation returns the pseudo-gradients that lead to the mixed models, so ``optax.sgd(1.0)`` at the end arrives there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.relations import graphs
from fedjax_mtl.relations.graphs import TaskGraph
from fedjax_mtl.server.projection import check_choice

PyTree = Any


class Models(NamedTuple):
    """A cohort's models after local training, leaves ``[cohort, ...]``, its clients' numbers and who is there, ``[cohort]``."""

    results: PyTree
    client_ids: jax.Array
    present: jax.Array


def returned_models(updates: PyTree, params: PyTree, client_ids, present) -> Models:
    """The models that came back; those of absent clients are their old ones.

    Raises:
        ValueError: no ``params``: these transformations work in :func:`fedjax_mtl.rounds.relational.relational`.
    """
    if params is None:
        raise ValueError(
            "mixing models needs the clients' parameters as `params`; use it in relational(...), where each client has its own"
        )
    count = jax.tree.leaves(updates)[0].shape[0]
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        if update.shape != param.shape:
            raise ValueError(
                f"updates of shape {update.shape} meet parameters of shape {param.shape}; mixing needs a model for each client, use relational(...)"
            )
    ids = jnp.arange(count) if client_ids is None else client_ids
    there = jnp.ones(count, bool) if present is None else present
    return Models(optax.tree.sub(params, trees.mask_clients(updates, there)), ids, there)


def _towards(params: PyTree, mixed: PyTree, present: jax.Array) -> PyTree:
    """The pseudo-gradients that lead from ``params`` to the mixed models; absent clients stay."""
    moves = jax.tree.map(lambda p, m: p - m.astype(p.dtype), params, mixed)
    return trees.mask_clients(moves, present)


def mix_models(
    coefficients: Callable[[Models], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """Every client's new model is a linear combination of the cohort's, ``coefficients(models) -> [cohort, cohort]``.

    Columns of absent clients must be 0.
    """

    def update(updates, state, params=None, *, client_ids=None, present=None, **extra_args):
        del extra_args
        models = returned_models(updates, params, client_ids, present)
        mixed = trees.mix_clients(coefficients(models), models.results)
        return _towards(params, mixed, models.present), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class LaplacianState(NamedTuple):
    """The task graph's own state."""

    graph: PyTree


def laplacian_mixing(
    graph: TaskGraph, strength: float | jax.Array, *, neighbours: str = "sampled"
) -> optax.GradientTransformationExtraArgs:
    """A gradient step on ``1/2 sum a_kl ||w_k - w_l||^2`` between the clients' models, from one snapshot of them all.

        w_k <- w_k - strength * sum_l a_kl (w_k - w_l)

    FedU (arXiv 2102.07148, algorithm 1; strength = local learning rate x local steps x its eta) and MIRA (arXiv 2410.15524, algorithm 1; strength = its eta x lambda). It contracts if
    ``strength < graphs.largest_stable_step(adjacency)`` and stays in the models' convex hull up to ``1 / max_k sum_l a_kl``. With everybody there and a symmetric graph
    the mean model does not move.

    Args:
        graph: see :mod:`fedjax_mtl.relations.graphs`. neighbours: ``sampled``, those present in this round (MIRA's and FedU's released codes); or ``all``, of the others the server's copy
            (MIRA's formula, read literally).
    """
    check_choice("neighbours", neighbours, ("sampled", "all"))

    def init(params):
        return LaplacianState(graph.init(jax.tree.leaves(params)[0].shape[0]))

    def update(
        updates,
        state,
        params=None,
        *,
        client_ids=None,
        present=None,
        population_params=None,
        **extra_args,
    ):
        del extra_args
        models = returned_models(updates, params, client_ids, present)
        ids, there = models.client_ids, models.present
        graph_state, adjacency = graph.update(state.graph, updates, models.results, ids, there)
        if neighbours == "sampled":
            edges = jnp.where(there, adjacency[ids][:, ids], 0)
            pulled = trees.mix_clients(edges, models.results)
        else:
            if population_params is None:
                raise ValueError(
                    "neighbours='all' needs `population_params`; use it in relational(...)"
                )
            edges = adjacency[ids]
            everybody = trees.put_clients(population_params, ids, models.results, there)
            pulled = trees.mix_clients(edges, everybody)
        degrees = trees.scale_clients(jnp.sum(edges, axis=1), models.results)
        mixed = jax.tree.map(
            lambda w, d, p: w - strength * (d - p), models.results, degrees, pulled
        )
        return _towards(params, mixed, there), LaplacianState(graph_state)

    return optax.GradientTransformationExtraArgs(init, update)


def attention_coefficients(
    distances: jax.Array,
    present: jax.Array,
    scale: float | jax.Array,
    bandwidth: float | jax.Array,
    clip: bool = False,
) -> jax.Array:
    """FedAMP's message weights, ``[cohort, cohort]``: ``scale exp(-d_ij / bandwidth) / bandwidth`` off the diagonal, 1 less their sum on it."""
    count = distances.shape[0]
    others = present[:, None] & present & ~jnp.eye(count, dtype=bool)
    weights = jnp.where(others, scale * jnp.exp(-distances / bandwidth) / bandwidth, 0)
    sums = jnp.sum(weights, axis=1)
    if clip:
        weights = weights / jnp.maximum(sums, 1)[:, None]
        sums = jnp.minimum(sums, 1)
    return weights + jnp.diag(1 - sums)


def attention_mixing(
    *,
    scale: float = 1.0,
    bandwidth: float | str = 1.0,
    per_parameter: bool = False,
    clip: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """FedAMP's attentive message passing (Huang et al., arXiv 2007.03797, equation 4; as FMTL-Bench, arXiv 2402.12876, runs it): close models attract each other.

    ``u_i = sum_j xi_ij w_j`` with :func:`attention_coefficients` of squared distances, over all leaves given (put it under :func:`only` to take parts apart).

    Args:
        scale: alpha_K. bandwidth: sigma; or ``median``, of the pairwise distances of the round, where ``scale`` is counted in bandwidths, so that neither has a unit. At the published 1 and millions of parameters every weight underflows and nobody meets anybody.
        per_parameter: divides distances by the number of parameters, for the same reason.
        clip: keeps a client's own weight from going negative, which happens for ``scale (clients - 1) > bandwidth`` and which the released codes let happen.
    """
    if isinstance(bandwidth, str):
        check_choice("bandwidth", bandwidth, ("median",))

    def coefficients(models):
        distances = graphs.squared_distances(models.results)
        if per_parameter:
            distances /= sum(leaf[0].size for leaf in jax.tree.leaves(models.results))
        width, factor = bandwidth, scale
        if bandwidth == "median":
            pairs = models.present[:, None] & models.present & ~jnp.eye(len(distances), dtype=bool)
            width = jnp.maximum(jnp.nanmedian(jnp.where(pairs, distances, jnp.nan)), 1e-30)
            width = jnp.where(jnp.isnan(width), 1.0, width)
            factor = scale * width
        return attention_coefficients(distances, models.present, factor, width, clip)

    return mix_models(coefficients)


def deviation_cosines(models: PyTree, present: jax.Array) -> jax.Array:
    """Cosines of the clients' deviations from the mean model, ``[cohort, cohort]``; 0 for a client without deviation or absent."""
    count = jnp.maximum(jnp.sum(present), 1)
    mean = trees.weighted_sum(present / count, models)
    deviations = trees.mask_clients(jax.tree.map(lambda w, m: w - m, models, mean), present)
    gram = trees.inner_products(deviations, deviations)
    norms = jnp.sqrt(jnp.diagonal(gram))
    scale = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    return scale[:, None] * gram * scale


def average_linkage(distances: jax.Array, present: jax.Array, num_clusters: int) -> jax.Array:
    """Agglomerative clustering down to ``num_clusters``: the two clusters of smallest mean pairwise distance merge, again and again.

    Args:
        distances: ``[clients, clients]``. present: bool ``[clients]``; absent clients stay alone and do not count.

    Returns:
        int32 ``[clients]``, for each client the number of one member of its cluster.
    """
    count = distances.shape[0]
    upper = jnp.triu(jnp.ones((count, count), bool), 1)

    def merge(carry):
        between, sizes, labels = carry
        alive = sizes > 0
        candidates = jnp.where(upper & alive[:, None] & alive, between, jnp.inf)
        first, second = jnp.divmod(jnp.argmin(candidates), count)
        n, k = sizes[first], sizes[second]
        row = (n * between[first] + k * between[second]) / (n + k)
        between = between.at[first].set(row).at[:, first].set(row)
        sizes = sizes.at[first].set(n + k).at[second].set(0)
        return between, sizes, jnp.where(labels == second, first, labels).astype(jnp.int32)

    start = (distances, present.astype(distances.dtype), jnp.arange(count, dtype=jnp.int32))
    return jax.lax.while_loop(lambda carry: jnp.sum(carry[1] > 0) > num_clusters, merge, start)[2]


def cluster_mixing(
    num_clusters: int = 2, *, soft: bool = False, threshold: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """MaT-FL's dynamic grouping (Cai et al., CVPR workshops 2023; settings of the authors' and FMTL-Bench's codes), anew in every round.

    Hard: clients are clustered by the cosine distance of their deviations from the mean model, by average linkage, and each takes the plain mean of its cluster. Soft (in the authors' code only): ``S_ij =
    max(cos + threshold, 0)``, rows normalised. The paper shares the encoder: put it under ``only(trees.under("encoder"), ...)``. With two clients the deviations are opposite and, with two
    clusters, nothing is shared.
    """
    if num_clusters < 1:
        raise ValueError(f"num_clusters is {num_clusters}; give at least 1")

    def coefficients(models):
        cosines = deviation_cosines(models.results, models.present)
        others = models.present[:, None] & models.present
        if soft:
            scores = jnp.where(others, jnp.maximum(cosines + threshold, 0), 0)
        else:
            labels = average_linkage(1 - cosines, models.present, num_clusters)
            scores = jnp.where(others & (labels[:, None] == labels), 1.0, 0.0)
        sums = jnp.sum(scores, axis=1, keepdims=True)
        # A client that resembles nobody, itself included (no deviation), keeps its model.
        return jnp.where(sums > 0, scores / jnp.where(sums > 0, sums, 1), jnp.eye(scores.shape[0]))

    return mix_models(coefficients)


def mean_of_others() -> optax.GradientTransformationExtraArgs:
    """Every client is sent the plain mean of the other clients' models; alone, its own."""

    def coefficients(models):
        there = models.present.astype(jnp.float32)
        count = there.shape[0]
        others = there * (1 - jnp.eye(count))
        sums = jnp.sum(others, axis=1, keepdims=True)
        return jnp.where(sums > 0, others / jnp.maximum(sums, 1), jnp.eye(count))

    return mix_models(coefficients)


class OnlyState(NamedTuple):
    """The inner transformation's state."""

    inner: optax.OptState


def only(
    selected: trees.PathPredicate, transformation: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The transformation applied to the leaves that a path predicate selects; the others pass unchanged.

    As ``optax.masked``, but parameters of the whole population that travel beside are cut to the same leaves.

    Raises:
        ValueError: (at init) the predicate selects no leaf.
    """
    transformation = optax.with_extra_args_support(transformation)

    def cut(tree):
        return None if tree is None else trees.partition(tree, selected)[0]

    def init(params):
        if not jax.tree.leaves(cut(params)):
            names = sorted({path[0] for path in trees.leaves_by_path(params) if path})
            raise ValueError(
                f"only(...) selects none of the parameters; at the top they are {', '.join(names)}"
            )
        return OnlyState(transformation.init(cut(params)))

    def update(updates, state, params=None, *, population_params=None, **extra_args):
        inside, outside = trees.partition(updates, selected)
        inside, inner = transformation.update(
            inside, state.inner, cut(params), population_params=cut(population_params), **extra_args
        )
        return trees.combine(inside, outside), OnlyState(inner)

    return optax.GradientTransformationExtraArgs(init, update)
