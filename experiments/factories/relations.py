"""Systems whose clients keep related models: FedU, FedAMP, MaT-FL, FedHCA2, Sheaf-FMTL, Ditto, FedMTL."""

from collections.abc import Callable

import networkx as nx
import numpy as np

from experiments.parts import Parts
from experiments.settings import choose
from fedjax_mtl import Algorithm, algorithms, server
from fedjax_mtl.core import trees
from fedjax_mtl.relations import gossip, graphs
from fedjax_mtl.relations.graphs import TaskGraph

_ENCODER, _DECODER = trees.under("encoder"), trees.under("decoder")


def make_adjacency(
    parts: Parts, *, graph: str, seed: int = 0, edge_probability: float = 0.2
) -> np.ndarray:
    """A fixed graph of the clients: ``complete``, ``random`` weights, ``erdos_renyi``, by ``group`` (where the data have groups) or by ``labels``' similarity."""
    problem, clients = parts.problem, parts.num_clients

    def by_group():
        if problem.groups is None:
            raise ValueError(
                "graph 'group' needs data whose clients come in groups; use random, labels or learned"
            )
        return graphs.by_group(problem.groups)

    def by_labels():
        return graphs.by_similarity(
            graphs.label_frequencies(problem.splits.train, problem.num_outputs)
        )

    table = {
        "complete": lambda: graphs.complete(clients),
        "random": lambda: graphs.random(clients, seed),
        "erdos_renyi": lambda: nx.to_numpy_array(
            gossip.erdos_renyi(clients, edge_probability, seed)
        ),
        "group": by_group,
        "labels": by_labels,
    }
    return choose(table, graph, "graph")()


def make_graph(parts: Parts, *, graph: str, seed: int = 0, smoothness: float = 0.5) -> TaskGraph:
    """A graph for Laplacian mixing: one of :func:`make_adjacency`'s, ``learned`` from the models, or by the ``updates``' cosines."""
    if graph == "learned":
        return graphs.learned(smoothness=smoothness)
    if graph == "updates":
        return graphs.by_updates(decay=0.5)
    return graphs.fixed(make_adjacency(parts, graph=graph, seed=seed))


def _fedu(
    parts: Parts,
    *,
    learning_rate: float,
    graph: str,
    strength: float,
    graph_seed: int = 0,
    smoothness: float = 0.5,
    neighbours: str = "sampled",
) -> Algorithm:
    return algorithms.fedu(
        **parts.training(learning_rate),
        keep_optimizer=parts.keep_optimizer,
        graph=make_graph(parts, graph=graph, seed=graph_seed, smoothness=smoothness),
        strength=strength,
        neighbours=neighbours,
    )


def _sheaf_fmtl(
    parts: Parts,
    *,
    learning_rate: float,
    graph: str,
    strength: float,
    map_step: float,
    compression: float,
    edge_probability: float = 0.2,
    graph_seed: int = 0,
) -> Algorithm:
    return algorithms.sheaf_fmtl(
        **parts.training(learning_rate),
        adjacency=make_adjacency(
            parts, graph=graph, seed=graph_seed, edge_probability=edge_probability
        ),
        strength=strength,
        map_step=map_step,
        compression=compression,
        map_seed=graph_seed,
    )


def _matfl(
    parts: Parts,
    *,
    learning_rate: float,
    num_clusters: int = 2,
    soft: bool = False,
    threshold: float = 0.0,
    whole_model: bool = False,
) -> Algorithm:
    return algorithms.matfl(
        **parts.training(learning_rate),
        encoder=trees.everything if whole_model else _ENCODER,
        num_clusters=num_clusters,
        soft=soft,
        threshold=threshold,
    )


def _fedhca2(
    parts: Parts,
    *,
    learning_rate: float,
    alpha: float = 0.4,
    initial: float = 0.1,
    hyper_learning_rate: float = 0.01,
) -> Algorithm:
    return algorithms.fedhca2(
        **parts.training(learning_rate),
        encoder=_ENCODER,
        decoder=_DECODER,
        alpha=alpha,
        hyper=server.HyperOptimizer(initial=initial, learning_rate=hyper_learning_rate),
    )


def _ditto(parts: Parts, *, learning_rate: float, penalty: float) -> Algorithm:
    return algorithms.ditto(**parts.training(learning_rate), penalty=penalty)


def _fedamp(
    parts: Parts,
    *,
    learning_rate: float,
    penalty: float,
    scale: float,
    bandwidth: float | str,
    clip: bool = False,
    fidelity: str = "paper",
) -> Algorithm:
    return algorithms.fedamp(
        **parts.training(learning_rate),
        keep_optimizer=parts.keep_optimizer,
        penalty=penalty,
        scale=scale,
        bandwidth=bandwidth,
        clip=clip,
        parts=("encoder", "decoder"),
        fidelity=fidelity,
    )


def _fedmtl(
    parts: Parts,
    *,
    learning_rate: float,
    penalty: float = 0.0,
    regulariser: str = "sum",
    fidelity: str = "paper",
) -> Algorithm:
    # 0 in a config is the method's own factor.
    return algorithms.fedmtl(
        **parts.training(learning_rate),
        keep_optimizer=parts.keep_optimizer,
        penalty=penalty or None,
        regulariser=regulariser,
        fidelity=fidelity,
    )


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "ditto": _ditto,
    "fedamp": _fedamp,
    "fedhca2": _fedhca2,
    "fedmtl": _fedmtl,
    "fedu": _fedu,
    "matfl": _matfl,
    "sheaf_fmtl": _sheaf_fmtl,
}
