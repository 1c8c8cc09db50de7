"""HOTA-FedGradNorm: FedGradNorm in clusters that transmit at once over a fading channel.

Mortaheb, Vahapoglu, Ulukus, arXiv 2212.07414, reconstructed like FedGradNorm.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl.algorithms._fedgradnorm import (
    SERVER_STEP,
    alternating_client,
    check_plan,
    mean_gradients,
)
from fedjax_mtl.algorithms._partial import DECODERS
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.model import Model
from fedjax_mtl.core.task import Task
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import Server, each_group
from fedjax_mtl.server.wireless import over_the_air_gradnorm


def hota_fedgradnorm(
    model: Model,
    task: Task,
    *,
    num_clients: int,
    num_clusters: int,
    plan: BatchPlan,
    learning_rate: float | jax.Array,
    head: trees.PathPredicate = DECODERS,
    head_plan: BatchPlan | None = None,
    head_learning_rate: float | jax.Array = 0.02,
    server_optimizer: Server | None = None,
    weight_learning_rate: float | jax.Array = 0.02,
    exponent: float | jax.Array = 0.6,
    measured: trees.PathPredicate = trees.everything,
    minimum: float = 1e-3,
    dynamic: bool = True,
    threshold: float = 0.032,
    fading: float | Sequence[float] | jax.Array = 1.0,
    noise: float | jax.Array = 1e-3,
    transmit_scale: float = 1.0,
    power: float | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """HOTA-FedGradNorm: clusters that transmit at once over a fading channel.

    With ``dynamic=False`` it is the twin with equal weights. Client ``l * cluster_size + i`` does
    task i in cluster l, for clusters of ``num_clients / num_clusters`` clients each. It needs
    everybody in every round.

    Args:
        model: as for :func:`fedavg`, of one group of clients.
        task: as for :func:`fedavg`, of one group of clients.
        num_clients: clients in the population.
        num_clusters: clusters of clients, all of one size.
        plan: as for :func:`fedgradnorm`.
        learning_rate: as for :func:`fedgradnorm`.
        head: as for :func:`fedgradnorm`.
        head_plan: as for :func:`fedgradnorm`.
        head_learning_rate: as for :func:`fedgradnorm`.
        server_optimizer: on what the server received; default Adam at 0.01.
        weight_learning_rate: as for :func:`fedgradnorm`.
        exponent: as for :func:`fedgradnorm`.
        measured: as for :func:`fedgradnorm`.
        minimum: as for :func:`fedgradnorm`.
        dynamic: as for :func:`fedgradnorm`.
        threshold: of the channel's power gain, see :func:`fedjax_mtl.server.over_the_air_gradnorm`.
        fading: spread of each cluster's channel, one number or ``[num_clusters]``.
        noise: standard deviation at the receiver.
        transmit_scale: power scaling that all clusters have in common.
        power: instead of ``transmit_scale``, the power that no cluster may exceed; the largest
            scale that keeps to it is chosen each round.
        execution: as for :func:`fedavg`.

    Raises:
        InputError: clusters that do not divide the clients, fading of another length, or a plan
            that does not count steps.
    """
    check_plan(plan)
    _check_clusters(num_clients, num_clusters, fading)
    make_client = functools.partial(
        alternating_client,
        head=head,
        head_plan=head_plan or plan,
        plan=plan,
        head_optimizer=optax.sgd(head_learning_rate),
        optimizer=optax.sgd(learning_rate),
        measured=measured,
    )
    air = over_the_air_gradnorm(
        num_clusters,
        num_clients // num_clusters,
        learning_rate=weight_learning_rate if dynamic else 0.0,
        exponent=exponent,
        measured=measured,
        threshold=threshold,
        fading=jnp.asarray(fading, jnp.float32),
        noise=noise,
        transmit_scale=transmit_scale,
        power=power,
        minimum=minimum,
    )
    return federated(
        each_group(model, task, num_clients, make_client),
        optax.chain(mean_gradients(learning_rate), air, server_optimizer or SERVER_STEP),
        weighting="uniform",
        execution=execution,
        full_participation=True,
    )


def _check_clusters(
    num_clients: int, num_clusters: int, fading: float | Sequence[float] | jax.Array
) -> None:
    if num_clusters < 1 or num_clients % num_clusters:
        raise InputError(
            f"{num_clusters} clusters do not divide {num_clients} clients; make all of one size"
        )
    shape = np.shape(fading)
    if shape != () and shape not in ((1,), (num_clusters,)):
        raise InputError(
            f"fading has shape {shape} for {num_clusters} clusters; give one number, "
            "or one a cluster"
        )
