"""Systems whose clients train models of their own that the server mixes: FedU, Sheaf-FMTL, MaT-FL, FedHCA2.

Each is :func:`fedjax_mtl.rounds.relational.relational` around a local trainer and one transformation of :mod:`fedjax_mtl.server`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from fedjax_mtl.clients.updates import local_trainer
from fedjax_mtl.core import trees
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution
from fedjax_mtl.models import Model
from fedjax_mtl.relations.graphs import TaskGraph
from fedjax_mtl.rounds.federated import Algorithm
from fedjax_mtl.rounds.relational import relational
from fedjax_mtl.server.hyper import RELEASED, HyperOptimizer, hyper_attention, hyper_conflict_averse
from fedjax_mtl.server.mixing import cluster_mixing, laplacian_mixing, only
from fedjax_mtl.server.sheaf import sheaf_mixing, sheaf_traffic
from fedjax_mtl.tasks import Task


def mixed_clients(
    model: Model,
    task: Task,
    *mixing: optax.GradientTransformation,
    num_clients: int,
    plan: BatchPlan,
    optimizer: optax.GradientTransformation,
    execution: Execution | None = None,
    **client: Any,
) -> Algorithm:
    """Local training from the client's own model, then the server's ``mixing``, transformations that keep the client axis.

    Args:
        model, task, plan, optimizer, client: local training, see :func:`local_trainer`.
        num_clients, execution: as for ``fedavg``.
    """
    trainer = local_trainer(model, task, optimizer, plan, **client)
    server = optax.chain(*mixing, optax.sgd(1.0))
    return relational(model.init, trainer, server, num_clients=num_clients, execution=execution)


def fedu(
    model: Model,
    task: Task,
    *,
    graph: TaskGraph,
    strength: float | jax.Array,
    neighbours: str = "sampled",
    **settings: Any,
) -> Algorithm:
    """FedU (Dinh et al., arXiv 2102.07148, algorithm 1): a Laplacian pull between the clients' models, convex or not.

    Args:
        graph, strength, neighbours: see :func:`laplacian_mixing`. The paper's strength is ``learning rate x local steps x eta``; its released code's ``learning rate x L_k x epochs / 2``. Clients move at
            once, from one snapshot (the paper); the released code moves them one after the other.
        settings: as for :func:`mixed_clients`.
    """
    mixing = laplacian_mixing(graph, strength, neighbours=neighbours)
    return mixed_clients(model, task, mixing, **settings)


def sheaf_fmtl(
    model: Model,
    task: Task,
    *,
    adjacency: np.ndarray,
    strength: float,
    map_step: float,
    compression: float = 0.1,
    deviation: float = 0.01,
    map_seed: int = 0,
    **settings: Any,
) -> Algorithm:
    """Sheaf-FMTL (Ben Issaid et al., arXiv 2502.01145): neighbours agree on learned low-dimensional projections of their models.

    Settings beyond :func:`sheaf_mixing`'s as for :func:`mixed_clients`. Bytes are those of the busiest client.
    """
    mixing = sheaf_mixing(
        adjacency,
        key=jax.random.key(map_seed),
        strength=strength,
        map_step=map_step,
        compression=compression,
        deviation=deviation,
    )
    algorithm = mixed_clients(model, task, mixing, **settings)
    parameters = sum(
        leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
    )
    size = sheaf_traffic(adjacency, parameters, compression)
    return algorithm._replace(traffic=lambda state: (size, size))


def matfl(
    model: Model,
    task: Task,
    *,
    encoder: trees.PathPredicate,
    num_clusters: int = 2,
    soft: bool = False,
    threshold: float = 0.0,
    **settings: Any,
) -> Algorithm:
    """MaT-FL: encoders are averaged in clusters found anew every round, the rest is personal; see :func:`cluster_mixing`.

    One cluster is FedPer, as many as clients is training alone. Settings as for :func:`mixed_clients`.
    """
    mixing = cluster_mixing(num_clusters, soft=soft, threshold=threshold)
    return mixed_clients(model, task, mixing, personal=trees.negate(encoder), **settings)


def fedhca2(
    model: Model,
    task: Task,
    *,
    encoder: trees.PathPredicate,
    decoder: trees.PathPredicate,
    decoders: Sequence[trees.Path] | None = None,
    owned: jax.Array | None = None,
    alpha: float = 0.4,
    groups: jax.Array | None = None,
    hyper: HyperOptimizer = RELEASED,
    **settings: Any,
) -> Algorithm:
    """FedHCA2 (Lu et al., arXiv 2311.13250): conflict-averse help for encoders, cross attention for decoders, both by learned weights.

    Args:
        encoder, decoder: path predicates of the two parts; what neither selects (the last layers, if they differ) is personal.
        decoders, owned: as for :func:`hyper_attention`; default: a client's decoder is one.
        alpha, groups: as for :func:`hyper_conflict_averse`. settings: as for :func:`mixed_clients`.
    """
    return mixed_clients(
        model,
        task,
        only(encoder, hyper_conflict_averse(alpha=alpha, groups=groups, hyper=hyper)),
        only(decoder, hyper_attention(decoders=decoders, owned=owned, hyper=hyper)),
        personal=lambda path: not encoder(path) and not decoder(path),
        **settings,
    )
