"""MIRA: federated multi-task fine-tuning of language models with a task graph over adapters.

Elbakary, Ben Issaid, ElBatt, Seddik, Bennis, arXiv 2410.15524 (IEEE Networking Letters 2025), and
what it is compared with. All take a model whose parameters are ``{"adapters", "base"}``:
:func:`fedjax_mtl.models.lora`, or :func:`fedjax_mtl.models.prompt_tuning` for FedPTuning. The base
is frozen and held once.
"""

import jax

from fedjax_mtl.algorithms._fedavg import fedavg
from fedjax_mtl.algorithms._fedu import fedu
from fedjax_mtl.algorithms._related import mixed_clients
from fedjax_mtl.clients.training import Solver
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.core.model import Model
from fedjax_mtl.execution import Execution
from fedjax_mtl.models import adapters
from fedjax_mtl.relations.graphs import TaskGraph
from fedjax_mtl.rounds.engine import Weighting
from fedjax_mtl.rounds.groups import Counts, Models, Server, Tasks


def mira(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    graph: TaskGraph,
    strength: float | jax.Array,
    neighbours: str = "sampled",
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """MIRA (algorithm 1): clients tune their own adapters, those of similar tasks pull together.

        A_k, B_k <- A_k, B_k - strength * sum_l a_kl (A_k - A_l, B_k - B_l)

    A and B are regularised each for itself, not their product. There is no averaging and no weight
    by sample counts.

    Args:
        model: with adapters; of clients that come in groups, by group.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: R local rounds (epochs in the released code) of Adam, fresh every round.
        graph: the letter's is ``graphs.random``, which means nothing; ``graphs.within_groups`` or a
            learned one does.
        strength: the letter's eta x lambda, whose values it does not give;
            :func:`released_strength` is its code's.
        neighbours: ``sampled`` in this round (released code) or ``all`` (the letter's sum, with the
            server's copies of those not sampled).
        adaptation: tuning of a newcomer, from the mean of all; None leaves that.
        execution: as for :func:`fedavg`.
    """
    return fedu(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        graph=graph,
        strength=strength,
        neighbours=neighbours,
        frozen=adapters.base,
        adaptation=adaptation,
        execution=execution,
    )


def released_strength(learning_rate: float, local_rounds: int, penalty: float) -> float:
    """The strength of MIRA's released code, after FedU: ``learning rate x local rounds x lambda``.

    It is e.g. 3e-4 x 5 x 0.5 on Natural Instructions.
    """
    return learning_rate * local_rounds * penalty


def local_adapters(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """Every client tunes its own adapters alone: MIRA without strength.

    Args:
        model: as for :func:`mira`.
        task: as for :func:`mira`.
        num_clients: as for :func:`mira`.
        solver: as for :func:`mira`.
        adaptation: as for :func:`mira`.
        execution: as for :func:`mira`.
    """
    return mixed_clients(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        frozen=adapters.base,
        adaptation=adaptation,
        execution=execution,
    )


def fedit(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    server: Server | None = None,
    weighting: Weighting = "samples",
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """FedIT (Zhang et al., arXiv 2305.05644): FedAvg of the adapters, A and B each for itself.

    With a prompt encoder it is FedPTuning.

    Args:
        model: as for :func:`mira`.
        task: as for :func:`mira`.
        num_clients: as for :func:`mira`.
        solver: as for :func:`mira`.
        server: as for :func:`fedavg`.
        weighting: as for :func:`fedavg`.
        adaptation: tuning of a newcomer, from the average; None leaves that.
        execution: as for :func:`fedavg`.
    """
    return fedavg(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        server=server,
        weighting=weighting,
        frozen=adapters.base,
        adaptation=adaptation,
        execution=execution,
    )


def adapter_traffic(model: Model, bytes_per_value: int = 4) -> tuple[int, int]:
    """The trained parameters of a client, and their bytes one way.

    MIRA, FedIT and FedPTuning send them once up and once down a round.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(trees.partition(shapes, adapters.trained)[0]))
    return count, count * bytes_per_value


def server_memory(model: Model, num_clients: int, bytes_per_value: int = 4) -> dict[str, int]:
    """The bytes of adapters that the server holds: one copy a client in MIRA, one in FedIT."""
    _, size = adapter_traffic(model, bytes_per_value)
    return {"mira": num_clients * size, "fedit": size}


def tuning_memory(model: Model, *, optimizer_moments: int = 2, bytes_per_value: int = 4) -> int:
    """The bytes that one client holds, without activations.

    They are the base, the adapters, their gradient and the optimiser's moments (Adam: 2).
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    everything = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    trained, _ = adapter_traffic(model)
    return bytes_per_value * (everything + trained * (1 + optimizer_moments))
