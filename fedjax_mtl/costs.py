"""Bytes and FLOPs: what a round moves and computes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

PyTree = Any


def tree_bytes(tree: PyTree) -> int:
    """The bytes of all leaves (arrays or shapes)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def flops(fn: Callable, *args: PyTree) -> float:
    """The floating-point operations of ``fn(*args)`` as XLA counts them; loops with traced trip counts count once.

    Args:
        fn: a function of arrays. args: arrays or ``jax.ShapeDtypeStruct``.
    """
    return float(jax.jit(fn).lower(*args).compile().cost_analysis()["flops"])


class SplitTraffic(NamedTuple):
    """Bytes of a round of split learning for one client, and where it breaks even.

    Attributes:
        up, down: bytes of the messages of all steps and of the embedding's synchronisation.
        federated: bytes, both ways, of averaging embedding and trunk instead; ``federated_full``: of the whole model.
        break_even_steps: steps a round at which split learning moves as much as averaging embedding and trunk.
    """

    up: int
    down: int
    federated: int
    federated_full: int
    break_even_steps: float


def split_traffic(
    *,
    batch_size: int,
    embedding_values: int,
    feature_values: int,
    num_steps: int,
    embedding_parameters: int,
    trunk_parameters: int,
    upper_parameters: int,
    bytes_per_value: int = 4,
    synchronised: bool = True,
) -> SplitTraffic:
    """The traffic of FedBone (arXiv 2306.17465) against FedAvg, for one client and round.

    Every step sends embeddings up and their gradients down, features down and their gradients up. ``embedding_values`` and ``feature_values`` count one example's (all stages
    of a hierarchical trunk); parameters are counts.
    """
    per_step = batch_size * (embedding_values + feature_values)
    shared = embedding_parameters if synchronised else 0
    one_way = bytes_per_value * (num_steps * per_step + shared)
    encoder = embedding_parameters + trunk_parameters
    return SplitTraffic(
        one_way,
        one_way,
        2 * bytes_per_value * encoder,
        2 * bytes_per_value * (encoder + upper_parameters),
        (encoder - shared) / per_step,
    )


def sparse_upload_bytes(
    parameters: int, kept: int, *, bytes_per_value: int = 4, positions: str = "bits"
) -> int:
    """Bytes of an update of which ``kept`` entries are sent (FedDEA on the client, top-k compression): values and positions.

    Positions as a ``bits`` mask of all parameters, or as 4-byte ``indices``.
    """
    if positions not in ("bits", "indices"):
        raise ValueError(f"unknown positions {positions!r}; expected 'bits' or 'indices'")
    where = -(-parameters // 8) if positions == "bits" else 4 * kept
    return kept * bytes_per_value + where
