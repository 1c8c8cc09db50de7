"""Systems whose clients train models of their own that the server mixes.

They are FedU, Sheaf-FMTL, MaT-FL and FedHCA2. Each is :func:`fedjax_mtl.federated` with own models,
around a local trainer and one transformation of :mod:`fedjax_mtl.server`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl.algorithms._partial import DECODERS
from fedjax_mtl.clients.training import Solver
from fedjax_mtl.clients.updates import local_trainer
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution
from fedjax_mtl.relations.graphs import TaskGraph
from fedjax_mtl.rounds.composition import Composition
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import (
    Counts,
    Models,
    OwnersServer,
    Server,
    Tasks,
    each_group,
    group_shapes,
    population_ids,
    population_size,
)
from fedjax_mtl.server.hyper import RELEASED, HyperOptimizer, hyper_attention, hyper_conflict_averse
from fedjax_mtl.server.mixing import cluster_mixing, laplacian_mixing, only
from fedjax_mtl.server.sheaf import sheaf_mixing, sheaf_traffic

PyTree = Any
ENCODER = trees.under("encoder")


def mixed_clients(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    mixing: Sequence[Server] = (),
    owners_mixing: OwnersServer | None = None,
    meeting: trees.PathPredicate = trees.nothing,
    personal: trees.PathPredicate = trees.nothing,
    frozen: trees.PathPredicate = trees.nothing,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """Local training from the client's own model, then the server mixes the models.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: local training of the client's own model.
        mixing: transformations that keep the client axis, one after the other.
        owners_mixing: the mixing of what only some groups of clients have, from the owners' numbers
            in the population; default ``mixing``.
        meeting: path predicate of leaves that some groups own and that ``mixing`` gets all the
            same, see :func:`fedjax_mtl.federated`.
        personal: path predicate of the leaves that stay with each client.
        frozen: path predicate of the leaves that nobody trains.
        adaptation: training of a newcomer, from the mean of all; None leaves that.
        execution: as for :func:`fedavg`.
    """

    def make_client(model, task):
        return local_trainer(
            model, task, solver, personal=personal, frozen=frozen, adaptation=adaptation
        )

    return federated(
        each_group(model, task, num_clients, make_client),
        optax.chain(*mixing, optax.sgd(1.0)),
        models="own",
        owners_server=None if owners_mixing is None else _with_step(owners_mixing),
        meeting=meeting,
        execution=execution,
    )


def _with_step(owners_mixing: OwnersServer) -> OwnersServer:
    """The same mixing, and the step that carries it out."""
    return lambda owners: optax.chain(owners_mixing(owners), optax.sgd(1.0))


def among(graph: TaskGraph, clients: np.ndarray, num_clients: int) -> TaskGraph:
    """The part of a population's graph between some of its clients.

    Args:
        graph: of the whole population.
        clients: int ``[part]``, their numbers in it.
        num_clients: of the whole population.
    """

    def init(count):
        del count
        return graph.init(num_clients)

    def update(state, updates, results, client_ids, present):
        own = jnp.asarray(clients)
        state, adjacency = graph.update(state, updates, results, own[client_ids], present)
        return state, adjacency[own][:, own]

    return TaskGraph(init, update)


def fedu(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    graph: TaskGraph,
    strength: float | jax.Array,
    neighbours: str = "sampled",
    personal: trees.PathPredicate = trees.nothing,
    frozen: trees.PathPredicate = trees.nothing,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """FedU (Dinh et al., arXiv 2102.07148, algorithm 1): a Laplacian pull between clients' models.

    The losses may be convex or not. Leaves that only some groups of clients have, e.g. their
    decoders, are pulled together along the graph's edges between the clients that have them.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: local training of the client's own model.
        graph: between the clients, those of one group after those of another by name; see
            :mod:`fedjax_mtl.relations.graphs`.
        strength: of the pull, see :func:`fedjax_mtl.server.laplacian_mixing`. The paper's is
            ``learning rate x local steps x eta``; its released code's
            ``learning rate x L_k x epochs / 2``. Clients move at once, from one snapshot (the
            paper); the released code moves them one after the other.
        neighbours: ``sampled`` or ``all``, see :func:`fedjax_mtl.server.laplacian_mixing`.
        personal: as for :func:`fedavg`.
        frozen: as for :func:`fedavg`.
        adaptation: training of a newcomer, from the mean of all; None leaves that.
        execution: as for :func:`fedavg`.
    """

    def mixing(own: TaskGraph) -> Server:
        return laplacian_mixing(own, strength, neighbours=neighbours)

    return mixed_clients(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        mixing=[mixing(graph)],
        owners_mixing=lambda owners: mixing(among(graph, owners, population_size(num_clients))),
        personal=personal,
        frozen=frozen,
        adaptation=adaptation,
        execution=execution,
    )


def sheaf_fmtl(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    adjacency: np.ndarray,
    strength: float,
    map_step: float,
    compression: float = 0.1,
    deviation: float = 0.01,
    map_seed: int = 0,
    personal: trees.PathPredicate = trees.nothing,
    frozen: trees.PathPredicate = trees.nothing,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """Sheaf-FMTL (Ben Issaid et al., arXiv 2502.01145): neighbours agree on learned projections.

    The projections of the models are low-dimensional, and each edge of the graph has its own
    (:func:`fedjax_mtl.server.sheaf_mixing`). Leaves that only some groups of clients have, have
    maps of their own, on the edges between the clients that have them. ``traffic`` is that of the
    busiest client.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: local training of the client's own model.
        adjacency: ``[clients, clients]``; an entry above 0 is an edge, its weight does not count.
        strength: of the step in the models; the released code's alpha x lambda.
        map_step: of the step in the maps; the released code's eta x lambda.
        compression: share of a model's parameters that an edge carries.
        deviation: standard deviation of the first maps.
        map_seed: of the first maps.
        personal: as for :func:`fedavg`.
        frozen: as for :func:`fedavg`.
        adaptation: training of a newcomer, from the mean of all; None leaves that.
        execution: as for :func:`fedavg`.
    """

    def mixing(edges: np.ndarray) -> Server:
        return sheaf_mixing(
            edges,
            key=jax.random.key(map_seed),
            strength=strength,
            map_step=map_step,
            compression=compression,
            deviation=deviation,
        )

    algorithm = mixed_clients(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        mixing=[mixing(adjacency)],
        owners_mixing=lambda owners: mixing(np.asarray(adjacency)[np.ix_(owners, owners)]),
        personal=personal,
        frozen=frozen,
        adaptation=adaptation,
        execution=execution,
    )
    size = _busiest_traffic(algorithm.parts, np.asarray(adjacency), compression)
    return algorithm._replace(traffic=lambda state: (size, size))


def _busiest_traffic(composition: Composition, adjacency: np.ndarray, compression: float) -> int:
    """The bytes that the client with most sends in a round, over all that it shares with others."""
    counts = {name: group.num_clients for name, group in composition.groups.items()}
    sent = np.zeros(sum(counts.values()), int)
    for section in composition.sections:
        first = section.members[0]
        shared = composition.groups[first].client.shared
        leaves = jax.tree.leaves(
            section.pick(trees.partition(composition.templates[first], shared)[0])
        )
        size = sum(leaf.size for leaf in leaves)
        owners = population_ids(section.members, counts)
        for owner, edges in zip(owners, adjacency[np.ix_(owners, owners)], strict=True):
            sent[owner] += sheaf_traffic(edges[None], size, compression)
    return int(sent.max())


def matfl(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    encoder: trees.PathPredicate = ENCODER,
    num_clusters: int = 2,
    soft: bool = False,
    threshold: float = 0.0,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """MaT-FL (Cai et al., CVPR workshops 2023): encoders are averaged in clusters, found anew.

    The clusters are those of the round, and all else is personal; see
    :func:`fedjax_mtl.server.cluster_mixing`. One cluster is FedPer, as
    many as clients is training alone.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: local training of the client's own model.
        encoder: path predicate of what is averaged.
        num_clusters: of hard clustering.
        soft: weights by similarity instead of clusters (in the authors' code only).
        threshold: of soft weights, see :func:`fedjax_mtl.server.cluster_mixing`.
        adaptation: training of a newcomer, from the mean encoder; None leaves that.
        execution: as for :func:`fedavg`.
    """
    return mixed_clients(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        mixing=[cluster_mixing(num_clusters, soft=soft, threshold=threshold)],
        personal=trees.negate(encoder),
        adaptation=adaptation,
        execution=execution,
    )


def fedhca2(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    encoder: trees.PathPredicate = ENCODER,
    decoder: trees.PathPredicate = DECODERS,
    last: trees.PathPredicate | None = None,
    decoders: Sequence[trees.Path] | None = None,
    owned: jax.Array | None = None,
    alpha: float = 0.4,
    groups: jax.Array | None = None,
    hyper: HyperOptimizer = RELEASED,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """FedHCA2 (Lu et al., arXiv 2311.13250): clients of different tasks help each other.

    Encoders get conflict-averse help and decoders cross attention over all decoders of the
    population, whichever group of clients owns them, both by learned weights. What is neither
    encoder nor decoder is personal.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: local training of the client's own model.
        encoder: path predicate of the encoder.
        decoder: path predicate of the decoders.
        last: path predicate of the decoders' leaves that stay personal, because attention needs
            decoders of one structure; default the layers that not all decoders have in the same
            shape (FMTL-Bench leaves the last convolution out).
        decoders: the decoders' path prefixes, see :func:`fedjax_mtl.server.hyper_attention`;
            default one for each entry below ``decoders`` if all of them stand there, else a
            client's decoder is one.
        owned: bool ``[population, decoders]``, which of the decoders in its model a client uses; by
            default all that it has.
        alpha: see :func:`fedjax_mtl.server.hyper_conflict_averse`.
        groups: int ``[population]``, see :func:`fedjax_mtl.server.hyper_conflict_averse`.
        hyper: the optimiser of the learned weights.
        adaptation: training of a newcomer, from the mean of all; None leaves that.
        execution: as for :func:`fedavg`.
    """
    shapes = group_shapes(model, num_clients)
    decoders = _named_decoders(shapes, decoder) if decoders is None else decoders
    last = _differing_layers(shapes, decoder, decoders) if last is None else last

    def attended(path: trees.Path) -> bool:
        return decoder(path) and not last(path)

    def averse(members: jax.Array | None) -> Server:
        return hyper_conflict_averse(alpha=alpha, groups=members, hyper=hyper)

    return mixed_clients(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        mixing=[
            only(encoder, averse(groups)),
            only(attended, hyper_attention(decoders=decoders, owned=owned, hyper=hyper)),
        ],
        # Decoders meet, so that what is left to some owners is a part of the encoder.
        owners_mixing=lambda owners: averse(None if groups is None else groups[owners]),
        meeting=attended,
        personal=lambda path: not encoder(path) and not attended(path),
        adaptation=adaptation,
        execution=execution,
    )


def _decoder_leaves(
    shapes: dict[str, PyTree], decoder: trees.PathPredicate
) -> list[dict[trees.Path, jax.ShapeDtypeStruct]]:
    """Each group's leaves that are a decoder's."""
    return [
        {path: leaf for path, leaf in trees.leaves_by_path(own).items() if decoder(path)}
        for own in shapes.values()
    ]


def _named_decoders(
    shapes: dict[str, PyTree], decoder: trees.PathPredicate
) -> list[trees.Path] | None:
    """The prefixes ``("decoders", name)`` of all groups, if no decoder stands anywhere else."""
    paths = [path for own in _decoder_leaves(shapes, decoder) for path in own]
    named = all(path[0] == "decoders" and len(path) > 2 for path in paths)
    return sorted({path[:2] for path in paths}) if paths and named else None


def _differing_layers(
    shapes: dict[str, PyTree],
    decoder: trees.PathPredicate,
    decoders: Sequence[trees.Path] | None,
) -> trees.PathPredicate:
    """Selects the decoders' layers that not all decoders have in the same shape."""
    prefixes = [()] if decoders is None else [tuple(prefix) for prefix in decoders]
    insides = [
        {path[len(prefix) :]: leaf.shape for path, leaf in own.items() if _below(prefix, path)}
        for own in _decoder_leaves(shapes, decoder)
        for prefix in prefixes
    ]
    insides = [inside for inside in insides if inside]
    odd = {
        path[:-1]
        for inside in insides
        for path in inside
        if any(other.get(path) != inside[path] for other in insides)
    }
    return lambda path: any(
        _below(prefix, path) and path[len(prefix) : -1] in odd for prefix in prefixes
    )


def _below(prefix: trees.Path, path: trees.Path) -> bool:
    return path[: len(prefix)] == prefix
