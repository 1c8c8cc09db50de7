"""FedHCA2: conflict-averse help for encoders, attention over everybody's decoders."""

from collections.abc import Sequence
from typing import Any

import jax

from fedjax_mtl.algorithms._matfl import ENCODER
from fedjax_mtl.algorithms._partial import DECODERS
from fedjax_mtl.algorithms._related import mixed_clients
from fedjax_mtl.clients.training import Solver
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.groups import Counts, Models, Server, Tasks, group_shapes
from fedjax_mtl.server.hyper import RELEASED, HyperOptimizer, hyper_attention, hyper_conflict_averse
from fedjax_mtl.server.mixing import only

PyTree = Any


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
