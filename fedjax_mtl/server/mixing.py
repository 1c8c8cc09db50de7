"""Server transformations after which every client's new model is a mixture of the cohort's.

They keep the client axis. ``updates`` are pseudo-gradients and ``params`` the cohort's parameters
before the round, both ``[cohort, ...]``, as in ``federated(..., models="own")``; the models that
came back are ``params - updates``. Each transformation returns the pseudo-gradients that lead to
the mixed models, so ``optax.sgd(1.0)`` at the end arrives there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError, check_choice
from fedjax_mtl.relations import graphs
from fedjax_mtl.relations.graphs import TaskGraph
from fedjax_mtl.server.facts import num_rows, numbers_of, who_is_there
from fedjax_mtl.server.reports import Report

PyTree = Any


class Models(NamedTuple):
    """A cohort's models after local training.

    Attributes:
        results: the models, leaves ``[cohort, ...]``.
        client_ids: the clients' numbers, ``[cohort]``.
        present: bool ``[cohort]``; who is there.
    """

    results: PyTree
    client_ids: jax.Array
    present: jax.Array


def returned_models(
    updates: PyTree,
    params: PyTree | None,
    client_ids: jax.Array | None,
    present: jax.Array | None,
) -> Models:
    """The models that came back; those of absent clients are their old ones.

    Args:
        updates: pseudo-gradients, leaves ``[cohort, ...]``.
        params: what the clients started from, leaves ``[cohort, ...]``.
        client_ids: ``[cohort]``; default 0, 1, 2, ...
        present: bool ``[cohort]``; default everybody.

    Raises:
        InputError: no ``params``, or one copy for all: mixing works where each client has a model.
    """
    if params is None:
        raise InputError(
            "mixing models needs the clients' parameters as `params`; use it in relational(...), "
            "where each client has its own"
        )
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        if update.shape != param.shape:
            raise InputError(
                f"updates of shape {update.shape} meet parameters of shape {param.shape}; mixing "
                "needs a model for each client, use relational(...)"
            )
    there = who_is_there(updates, present)
    results = optax.tree.sub(params, trees.mask_clients(updates, there))
    return Models(results, numbers_of(updates, client_ids), there)


def moves_towards(params: PyTree, mixed: PyTree, present: jax.Array) -> PyTree:
    """The pseudo-gradients that lead from ``params`` to the mixed models; absent clients stay."""
    moves = jax.tree.map(lambda p, m: p - m.astype(p.dtype), params, mixed)
    return trees.mask_clients(moves, present)


class Told(NamedTuple):
    """A value of every client that a mixture reports, as ``[population]``.

    Attributes:
        value: ``(models, coefficients [cohort, cohort]) -> [cohort]``.
        otherwise: what is reported of clients that are not there.
    """

    value: Callable[[Models, jax.Array], jax.Array]
    otherwise: int | float


def _own_weights(models: Models, coefficients: jax.Array) -> jax.Array:
    del models
    return jnp.diagonal(coefficients)


def _smallest_members(models: Models, coefficients: jax.Array) -> jax.Array:
    """A cluster's name, ``[cohort]``: the lowest number of the clients that its mean is over."""
    last = jnp.iinfo(models.client_ids.dtype).max
    return jnp.min(jnp.where(coefficients > 0, models.client_ids, last), axis=1)


OWN_WEIGHT = {"own_weight": Told(_own_weights, 1.0)}
CLUSTER = {"cluster": Told(_smallest_members, -1)}


def mix_models(
    coefficients: Callable[[Models], jax.Array], tells: dict[str, Told] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Every client's new model is a linear combination of the cohort's.

    Args:
        coefficients: ``models -> [cohort, cohort]``; columns of absent clients must be 0.
        tells: what is reported of every client, by name.
    """
    tells = {} if tells is None else tells

    def init(params: PyTree) -> Report:
        shape = (num_rows(params),)
        return Report({name: jnp.full(shape, told.otherwise) for name, told in tells.items()})

    def update(updates, state, params=None, *, client_ids=None, present=None, **extra_args):
        del extra_args
        models = returned_models(updates, params, client_ids, present)
        weights = coefficients(models)
        mixed = trees.mix_clients(weights, models.results)
        values = {}
        for name, told in tells.items():
            absent = jnp.full_like(state.values[name], told.otherwise)
            news = told.value(models, weights)
            values[name] = trees.put_clients(absent, models.client_ids, news, models.present)
        return moves_towards(params, mixed, models.present), Report(values)

    return optax.GradientTransformationExtraArgs(init, update)


# --- Laplacian mixing.


class LaplacianState(NamedTuple):
    """What Laplacian mixing remembers.

    Attributes:
        graph: the task graph's own state.
        report: ``adjacency`` ``[clients, clients]`` of the last round, if the graph is learned.
    """

    graph: PyTree
    report: Report


def _adjacency_report(graph_state: PyTree, adjacency: jax.Array) -> Report:
    """Only a graph that learns has something to tell; its state is as large anyway."""
    learned = bool(jax.tree.leaves(graph_state))
    return Report({"adjacency": adjacency.astype(jnp.float32)} if learned else {})


def _pulls(
    models: Models, adjacency: jax.Array, neighbours: str, population: PyTree | None
) -> tuple[PyTree, PyTree]:
    """For each client ``sum_l a_kl`` times its own model, and ``sum_l a_kl w_l``."""
    ids, there = models.client_ids, models.present
    if neighbours == "sampled":
        edges, others = jnp.where(there, adjacency[ids][:, ids], 0), models.results
    elif population is None:
        raise InputError("neighbours='all' needs `population_params`; use it in relational(...)")
    else:
        edges = adjacency[ids]
        others = trees.put_clients(population, ids, models.results, there)
    own = trees.scale_clients(jnp.sum(edges, axis=1), models.results)
    return own, trees.mix_clients(edges, others)


def laplacian_mixing(
    graph: TaskGraph, strength: float | jax.Array, *, neighbours: str = "sampled"
) -> optax.GradientTransformationExtraArgs:
    """A gradient step on ``1/2 sum a_kl ||w_k - w_l||^2`` between the clients' models.

        w_k <- w_k - strength * sum_l a_kl (w_k - w_l)

    from one snapshot of them all. It is the server of FedU (arXiv 2102.07148, algorithm 1; strength
    = local learning rate x local steps x its eta) and of MIRA (arXiv 2410.15524, algorithm 1;
    strength = its eta x lambda). It contracts if ``strength <
    graphs.largest_stable_step(adjacency)``, and stays in the models' convex hull up to ``1 / max_k
    sum_l a_kl``. With everybody there and a symmetric graph the mean model does not move.

    Args:
        graph: see :mod:`fedjax_mtl.relations.graphs`.
        strength: of the step.
        neighbours: ``sampled``, those present in this round (MIRA's and FedU's released codes); or
            ``all``, of the others the server's copy (MIRA's formula, read literally).

    Extra arguments used: ``client_ids``, ``present``, and ``population_params`` with all
    neighbours. Reports ``adjacency`` ``[clients, clients]`` if the graph is learned.
    """
    check_choice("neighbours", neighbours, ("sampled", "all"))

    def init(params: PyTree) -> LaplacianState:
        count = num_rows(params)
        state = graph.init(count)
        return LaplacianState(state, _adjacency_report(state, jnp.zeros((count, count))))

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
        graph_state, adjacency = graph.update(
            state.graph, updates, models.results, models.client_ids, models.present
        )
        own, pulled = _pulls(models, adjacency, neighbours, population_params)
        mixed = jax.tree.map(lambda w, d, p: w - strength * (d - p), models.results, own, pulled)
        moves = moves_towards(params, mixed, models.present)
        return moves, LaplacianState(graph_state, _adjacency_report(graph_state, adjacency))

    return optax.GradientTransformationExtraArgs(init, update)


# --- Attention.


def attention_coefficients(
    distances: jax.Array,
    present: jax.Array,
    scale: float | jax.Array,
    bandwidth: float | jax.Array,
    clip: bool = False,
) -> jax.Array:
    """FedAMP's message weights, ``[cohort, cohort]``.

    They are ``scale exp(-d_ij / bandwidth) / bandwidth`` off the diagonal, and 1 less their sum on
    it.

    Args:
        distances: d, squared distances of the models, ``[cohort, cohort]``.
        present: bool ``[cohort]``.
        scale: see :func:`attention_mixing`.
        bandwidth: see :func:`attention_mixing`.
        clip: see :func:`attention_mixing`.
    """
    count = distances.shape[0]
    others = present[:, None] & present & ~jnp.eye(count, dtype=bool)
    weights = jnp.where(others, scale * jnp.exp(-distances / bandwidth) / bandwidth, 0)
    sums = jnp.sum(weights, axis=1)
    if clip:
        weights = weights / jnp.maximum(sums, 1)[:, None]
        sums = jnp.minimum(sums, 1)
    return weights + jnp.diag(1 - sums)


def _median_distance(distances: jax.Array, present: jax.Array) -> jax.Array:
    """Of the pairs of different clients present, ``[]``; 1 where there is no pair."""
    pairs = present[:, None] & present & ~jnp.eye(len(distances), dtype=bool)
    median = jnp.maximum(jnp.nanmedian(jnp.where(pairs, distances, jnp.nan)), 1e-30)
    return jnp.where(jnp.isnan(median), 1.0, median)


def attention_mixing(
    *,
    scale: float = 1.0,
    bandwidth: float | str = 1.0,
    per_parameter: bool = False,
    clip: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """FedAMP's attentive message passing: close models attract each other.

        u_i = sum_j xi_ij w_j

    Huang et al., arXiv 2007.03797, equation 4, as FMTL-Bench (arXiv 2402.12876) runs it; the
    weights are :func:`attention_coefficients` of squared distances over all leaves given. Put it
    under :func:`only` to take parts apart.

    Args:
        scale: alpha_K.
        bandwidth: sigma; or ``median``, of the pairwise distances of the round, where ``scale`` is
            counted in bandwidths, so that neither has a unit. At the published 1 and millions of
            parameters every weight underflows and nobody meets anybody.
        per_parameter: divides distances by the number of parameters, for the same reason.
        clip: keeps a client's own weight from going negative, which happens for
            ``scale (clients - 1) > bandwidth`` and which the released codes let happen.

    Extra arguments used: ``client_ids``, ``present``. Reports ``own_weight`` ``[clients]``, the
    part ``xi_ii`` of its own model in what a client is sent: 1 where it met nobody.
    """
    if isinstance(bandwidth, str):
        check_choice("bandwidth", bandwidth, ("median",))

    def coefficients(models: Models) -> jax.Array:
        distances = graphs.squared_distances(models.results)
        if per_parameter:
            distances /= sum(leaf[0].size for leaf in jax.tree.leaves(models.results))
        if not isinstance(bandwidth, str):
            return attention_coefficients(distances, models.present, scale, bandwidth, clip)
        width = _median_distance(distances, models.present)
        return attention_coefficients(distances, models.present, scale * width, width, clip)

    return mix_models(coefficients, OWN_WEIGHT)


# --- Clusters.


def deviation_cosines(models: PyTree, present: jax.Array) -> jax.Array:
    """Cosines of the clients' deviations from the mean model, ``[cohort, cohort]``.

    They are 0 for a client without deviation or absent.

    Args:
        models: leaves ``[cohort, ...]``.
        present: bool ``[cohort]``.
    """
    count = jnp.maximum(jnp.sum(present), 1)
    mean = trees.weighted_sum(present / count, models)
    deviations = trees.mask_clients(jax.tree.map(lambda w, m: w - m, models, mean), present)
    gram = trees.inner_products(deviations, deviations)
    norms = jnp.sqrt(jnp.diagonal(gram))
    scale = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    return scale[:, None] * gram * scale


def average_linkage(distances: jax.Array, present: jax.Array, num_clusters: int) -> jax.Array:
    """Agglomerative clustering down to ``num_clusters``.

    The two clusters of smallest mean pairwise distance merge, again and again.

    Args:
        distances: ``[clients, clients]``.
        present: bool ``[clients]``; absent clients stay alone and do not count.
        num_clusters: how many are left.

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


def cluster_coefficients(
    cosines: jax.Array, present: jax.Array, num_clusters: int, soft: bool, threshold: float
) -> jax.Array:
    """MaT-FL's mixture, ``[cohort, cohort]``; rows sum to 1.

    Args:
        cosines: :func:`deviation_cosines`, ``[cohort, cohort]``.
        present: bool ``[cohort]``.
        num_clusters: see :func:`cluster_mixing`.
        soft: see :func:`cluster_mixing`.
        threshold: see :func:`cluster_mixing`.
    """
    pairs = present[:, None] & present
    if soft:
        scores = jnp.where(pairs, jnp.maximum(cosines + threshold, 0), 0)
    else:
        labels = average_linkage(1 - cosines, present, num_clusters)
        scores = jnp.where(pairs & (labels[:, None] == labels), 1.0, 0.0)
    sums = jnp.sum(scores, axis=1, keepdims=True)
    # A client that resembles nobody, itself included (no deviation), keeps its model.
    return jnp.where(sums > 0, scores / jnp.where(sums > 0, sums, 1), jnp.eye(len(scores)))


def cluster_mixing(
    num_clusters: int = 2, *, soft: bool = False, threshold: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """MaT-FL's dynamic grouping (Cai et al., CVPR workshops 2023), anew in every round.

    Settings are those of the authors' and FMTL-Bench's codes. Hard: clients are clustered by the
    cosine distance of their deviations from the mean model, by average linkage, and each takes the
    plain mean of its cluster. Soft (in the authors' code only): ``S_ij = max(cos + threshold, 0)``,
    rows normalised.

    The paper shares the encoder: put it under ``only(trees.under("encoder"), ...)``. With two
    clients the deviations are opposite and, with two clusters, nothing is shared.

    Args:
        num_clusters: of the hard form.
        soft: the soft form.
        threshold: of the soft form.

    Extra arguments used: ``client_ids``, ``present``. Reports, hard: ``cluster``, int32
    ``[clients]``, the lowest number of a client in one's cluster, -1 for those who are not there;
    soft: ``own_weight`` ``[clients]``, the part of its own model in what a client is sent.

    Raises:
        InputError: fewer than one cluster.
    """
    if num_clusters < 1:
        raise InputError(f"num_clusters is {num_clusters}; give at least 1")

    def coefficients(models: Models) -> jax.Array:
        cosines = deviation_cosines(models.results, models.present)
        return cluster_coefficients(cosines, models.present, num_clusters, soft, threshold)

    return mix_models(coefficients, OWN_WEIGHT if soft else CLUSTER)


# --- Others.


def mean_of_others() -> optax.GradientTransformationExtraArgs:
    """Every client is sent the plain mean of the other clients' models; alone, its own."""

    def coefficients(models: Models) -> jax.Array:
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
    """The transformation applied to the leaves that a path predicate selects; the others pass.

    It is as ``optax.masked``, but what travels beside in the form of the parameters, the whole
    population's (``population_params``) and who owns what (``owned``), is cut to the same leaves.

    Args:
        selected: path predicate.
        transformation: what is applied.

    Raises:
        InputError: (at init) the predicate selects no leaf.
    """
    transformation = optax.with_extra_args_support(transformation)

    def cut(tree: PyTree | None) -> PyTree | None:
        return None if tree is None else trees.partition(tree, selected)[0]

    def init(params: PyTree) -> OnlyState:
        if not jax.tree.leaves(cut(params)):
            names = sorted({path[0] for path in trees.leaves_by_path(params) if path})
            raise InputError(
                f"only(...) selects none of the parameters; at the top they are {', '.join(names)}"
            )
        return OnlyState(transformation.init(cut(params)))

    def update(updates, state, params=None, *, population_params=None, owned=None, **extra_args):
        inside, outside = trees.partition(updates, selected)
        inside, inner = transformation.update(
            inside,
            state.inner,
            cut(params),
            population_params=cut(population_params),
            owned=cut(owned),
            **extra_args,
        )
        return trees.combine(inside, outside), OnlyState(inner)

    return optax.GradientTransformationExtraArgs(init, update)
