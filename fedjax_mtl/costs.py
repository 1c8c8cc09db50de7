"""Bytes and FLOPs: what a round moves and computes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_mtl.core.checks import InputError

PyTree = Any


def tree_bytes(tree: PyTree) -> int:
    """Returns the bytes of all leaves (arrays or shapes)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def flops(fn: Callable[..., Any], *args: PyTree) -> float:
    """Returns the floating-point operations of ``fn(*args)`` as XLA counts them.

    Loops with traced trip counts count once.

    Args:
        fn: a function of arrays.
        args: arrays or ``jax.ShapeDtypeStruct``.
    """
    counted = jax.jit(fn).lower(*args).compile().cost_analysis() or {}
    return float(counted["flops"])


class SplitTraffic(NamedTuple):
    """Bytes of a round of split learning for one client, and where it breaks even.

    Attributes:
        up: bytes that the client sends: the messages of all steps and of the embedding's
            synchronisation.
        down: bytes that it receives, for the same.
        federated: bytes, both ways, of averaging embedding and trunk instead.
        federated_full: bytes, both ways, of averaging the whole model instead.
        break_even_steps: steps a round at which split learning moves as much as averaging embedding
            and trunk.
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
    """Returns the traffic of FedBone (arXiv 2306.17465) against FedAvg, for one client and round.

    Every step sends embeddings up and their gradients down, features down and their gradients up.

    Args:
        batch_size: examples in a step.
        embedding_values: values of one example's embedding.
        feature_values: values of one example's features, of all stages of a hierarchical trunk.
        num_steps: steps in the round.
        embedding_parameters: how many parameters the embedding has.
        trunk_parameters: how many the trunk has, which the server holds.
        upper_parameters: how many the client's layers above the trunk have.
        bytes_per_value: of every value and parameter.
        synchronised: whether the clients' embeddings are averaged in the round.
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
    """Returns the bytes of an update of which some entries are sent: values and positions.

    FedDEA on the client sends such updates, and so does top-k compression.

    Args:
        parameters: how many entries the update has.
        kept: how many of them are sent.
        bytes_per_value: of a value that is sent.
        positions: ``bits``, a mask of all parameters, or ``indices`` of 4 bytes each.

    Raises:
        InputError: unknown positions.
    """
    if positions not in ("bits", "indices"):
        raise InputError(f"unknown positions {positions!r}; expected 'bits' or 'indices'")
    where = -(-parameters // 8) if positions == "bits" else 4 * kept
    return kept * bytes_per_value + where


NETWORKS = {"wifi": 10.0, "lte": 100.0, "3g": 1000.0}
"""What the communication of a round costs in MOCHA's released code, in its arbitrary units.

A unit is about one flop of a coordinate step without its number of features.
"""

_FLOPS_A_STEP = {"mocha": 8, "cocoa": 8, "minibatch_sdca": 6, "minibatch_sgd": 4}


def estimated_round_time(
    method: str, *, steps: Any, slowest: Any, num_tasks: int, network: str
) -> Any:
    """Estimates the time of a round as MOCHA's released code does, in its arbitrary units.

    It is ``flops * steps + communication`` where nodes make what they can in the time there is
    (MOCHA, and the mini-batch methods' fixed batches). It is
    ``flops * tasks * slowest + communication`` for CoCoA, where all wait for the slowest. The
    number of features does not enter (arXiv 1705.10467, section 5). Under stragglers the code
    charges the largest possible budget; give that as ``steps``.

    Args:
        method: ``mocha``, ``cocoa``, ``minibatch_sdca`` or ``minibatch_sgd``.
        steps: coordinate steps (gradients) of all nodes, a number or an array.
        slowest: coordinate steps of the node that made most, a number or an array.
        num_tasks: how many tasks there are.
        network: ``wifi``, ``lte`` or ``3g``.

    Raises:
        InputError: unknown method or network.
    """
    if method not in _FLOPS_A_STEP or network not in NETWORKS:
        raise InputError(
            f"no estimate for {method!r} over {network!r}; expected one of "
            f"{', '.join(_FLOPS_A_STEP)} over {', '.join(NETWORKS)}"
        )
    work = num_tasks * slowest if method == "cocoa" else steps
    return _FLOPS_A_STEP[method] * work + NETWORKS[network]


def synchronous_round_time(
    steps: Any, rates: Any, *, features: int, present: Any = True, seconds_per_message: float = 0.0
) -> Any:
    """Returns the seconds of a synchronous round, which lasts as long as the slowest node present.

    One message of ``features`` numbers goes up and one comes down.

    Args:
        steps: coordinate steps ``[..., nodes]`` of 8 flops a feature.
        rates: flops per second, ``[nodes]`` or ``[..., nodes]``.
        features: how many features an example has.
        present: bool, ``[nodes]`` or ``[..., nodes]``.
        seconds_per_message: of both messages of a round.
    """
    seconds = 8.0 * features * np.asarray(steps) / np.asarray(rates)
    return np.max(np.where(present, seconds, 0.0), axis=-1) + seconds_per_message
