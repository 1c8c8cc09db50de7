"""Short names for common compositions: each is one call of ``federated``."""

from typing import Any

import jax
import numpy as np
import optax

from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.engine import Weighting
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import Group, OwnersServer, Server
from fedjax_mtl.server.gossip import check_mixing_matrix, gossip_mixing

PyTree = Any


def relational(
    groups: Group | dict[str, Group],
    server: Server,
    *,
    owners_server: Server | OwnersServer | None = None,
    weighting: Weighting = "uniform",
    execution: Execution | None = None,
    full_participation: bool = False,
) -> Algorithm:
    """Clients update, each from its own parameters, and the server mixes what comes back.

    It is :func:`federated` with ``models="own"``, whose arguments these are.
    """
    return federated(
        groups,
        server,
        models="own",
        owners_server=owners_server,
        weighting=weighting,
        execution=execution,
        full_participation=full_participation,
    )


def heterogeneous(
    groups: dict[str, Group],
    server: Server,
    *,
    owners_server: Server | OwnersServer | None = None,
    weighting: Weighting = "samples",
    execution: Execution | None = None,
) -> Algorithm:
    """Clients with different tasks around one server that holds one copy of what they share.

    It is :func:`federated` with a dict of groups, whose arguments these are.
    """
    return federated(
        groups,
        server,
        owners_server=owners_server,
        weighting=weighting,
        execution=execution,
    )


def decentralized(
    groups: Group | dict[str, Group],
    mixing_matrix: jax.Array,
    *,
    execution: Execution | None = None,
) -> Algorithm:
    """The serverless composition: each client updates its own copy, then averages with neighbours.

        params_s <- sum_t W[s, t] (params_t - pseudo-gradient_t)

    Works with every client update: D-SGD from ``local_trainer``, D-FedEM from FedEM's. All clients
    start from the same parameters and take part in every round; one that is absent or diverged
    neither sends nor receives (:func:`fedjax_mtl.server.gossip.gossip_mixing`).

    Args:
        groups: as for :func:`federated`.
        mixing_matrix: ``[clients, clients]``, whose rows sum to 1; see
            :mod:`fedjax_mtl.relations.gossip`.
        execution: as for :func:`federated`.

    Raises:
        InputError: the matrix is not square, or a row does not sum to 1. When traced: the cohort is
            not the whole population.
    """
    check_mixing_matrix(mixing_matrix)
    algorithm = federated(
        groups,
        optax.chain(gossip_mixing(mixing_matrix), optax.sgd(1.0)),
        models="own",
        execution=execution,
        full_participation=True,
    )
    num_clients = mixing_matrix.shape[0]
    there = algorithm.num_clients
    there = sum(there.values()) if isinstance(there, dict) else there
    if there != num_clients:
        raise InputError(
            f"the mixing matrix is for {num_clients} clients, but there are {there}; give one row "
            "and one column a client"
        )

    def traffic(state: PyTree) -> tuple[int, int]:
        edges = (np.asarray(mixing_matrix) > 0) & ~np.eye(num_clients, dtype=bool)
        one, _ = algorithm.traffic(state)
        size = int(round(np.mean(np.sum(edges, axis=1)) * one))
        return size, size

    return algorithm._replace(traffic=traffic)
