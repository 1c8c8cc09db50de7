"""Bytes and FLOPs: what a round moves and computes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

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


NETWORKS = {"wifi": 10.0, "lte": 100.0, "3g": 1000.0}
"""What the communication of a round costs in MOCHA's released code, in its arbitrary units: about one flop of a coordinate step without its number of features."""

_FLOPS_A_STEP = {"mocha": 8, "cocoa": 8, "minibatch_sdca": 6, "minibatch_sgd": 4}


def estimated_round_time(
    method: str, *, steps: Any, slowest: Any, num_tasks: int, network: str
) -> Any:
    """The time of a round as MOCHA's released code estimates it (arXiv 1705.10467, section 5), in its arbitrary units.

    ``flops * steps + communication`` where nodes make what they can in the time there is (MOCHA, and the mini-batch methods' fixed batches), and ``flops * tasks * slowest + communication`` for CoCoA, where all wait for the slowest. The
    number of features does not enter. Under stragglers the code charges the largest possible budget; give that as ``steps``.

    Args:
        method: ``mocha``, ``cocoa``, ``minibatch_sdca`` or ``minibatch_sgd``. steps: coordinate steps (gradients) of all nodes; slowest: of the one that made most. Numbers or arrays.
        network: ``wifi``, ``lte`` or ``3g``.
    """
    if method not in _FLOPS_A_STEP or network not in NETWORKS:
        raise ValueError(
            f"no estimate for {method!r} over {network!r}; expected one of {', '.join(_FLOPS_A_STEP)} over {', '.join(NETWORKS)}"
        )
    work = num_tasks * slowest if method == "cocoa" else steps
    return _FLOPS_A_STEP[method] * work + NETWORKS[network]


def synchronous_round_time(
    steps: Any, rates: Any, *, features: int, present: Any = True, seconds_per_message: float = 0.0
) -> Any:
    """Seconds of a synchronous round: the slowest of the nodes present, and one message of ``features`` numbers up and down.

    Args:
        steps: coordinate steps ``[..., nodes]`` of 8 flops a feature. rates: flops per second ``[nodes]`` or ``[..., nodes]``. present: bool, the same.
        seconds_per_message: of both messages of a round.
    """
    seconds = 8.0 * features * np.asarray(steps) / np.asarray(rates)
    return np.max(np.where(present, seconds, 0.0), axis=-1) + seconds_per_message
