"""MIRA: federated multi-task fine-tuning of language models with a task graph over LoRA adapters, and what it is compared with.

Elbakary, Ben Issaid, ElBatt, Seddik, Bennis, arXiv 2410.15524 (IEEE Networking Letters 2025). All take a model whose parameters are ``{"adapters", "base"}``:
:func:`fedjax_mtl.models.lora.lora`, or :func:`fedjax_mtl.models.prompt_tuning.prompt_tuning` for FedPTuning. The base is frozen and held once.
"""

from typing import Any

import jax
import optax

from fedjax_mtl.algorithms._fedavg import fedavg
from fedjax_mtl.algorithms._related import mixed_clients
from fedjax_mtl.core import trees
from fedjax_mtl.models import Model, adapters
from fedjax_mtl.relations.graphs import TaskGraph
from fedjax_mtl.rounds.federated import Algorithm
from fedjax_mtl.server.mixing import laplacian_mixing
from fedjax_mtl.tasks import Task


def mira(
    model: Model,
    task: Task,
    *,
    graph: TaskGraph,
    strength: float | jax.Array,
    neighbours: str = "sampled",
    **settings: Any,
) -> Algorithm:
    """MIRA (algorithm 1): every client tunes adapters of its own, the server pulls those of similar tasks together.

        A_k, B_k <- A_k, B_k - strength * sum_l a_kl (A_k - A_l, B_k - B_l)

    A and B are regularised each for itself, not their product. There is no averaging and no weight by sample counts.

    Args:
        model: with adapters. graph: the letter's is ``task_graphs.random``, which means nothing; ``by_group`` or a learned one does.
        strength: the letter's eta x lambda, whose values it does not give; :func:`released_strength` are its code's.
        neighbours: ``sampled`` in this round (released code) or ``all`` (the letter's sum, with the server's copies of those not sampled).
        settings: ``num_clients``, ``plan`` (R local rounds: epochs in the released code), ``optimizer`` (Adam, fresh every round), ``execution``, ``schedule``, ``adaptation``.
    """
    mixing = laplacian_mixing(graph, strength, neighbours=neighbours)
    return mixed_clients(model, task, mixing, frozen=adapters.base, **settings)


def released_strength(learning_rate: float, local_rounds: int, penalty: float) -> float:
    """The strength of MIRA's released code, after FedU: ``learning rate x local rounds x lambda``, e.g. 3e-4 x 5 x 0.5 on Natural Instructions."""
    return learning_rate * local_rounds * penalty


def local_adapters(model: Model, task: Task, **settings: Any) -> Algorithm:
    """Every client tunes its own adapters alone: MIRA without strength. Settings as for :func:`mira`."""
    return mixed_clients(model, task, frozen=adapters.base, **settings)


def fedit(
    model: Model,
    task: Task,
    *,
    num_clients: int,
    server: optax.GradientTransformation | None = None,
    weighting: str = "samples",
    **settings: Any,
) -> Algorithm:
    """FedIT (Zhang et al., arXiv 2305.05644): FedAvg of the adapters, A and B each for itself; with a prompt encoder it is FedPTuning.

    Args:
        server, weighting: as for ``fedavg``. settings: as for :func:`mira`.
    """
    return fedavg(
        model,
        task,
        num_clients=num_clients,
        server=server,
        weighting=weighting,
        frozen=adapters.base,
        **settings,
    )


def adapter_traffic(model: Model, bytes_per_value: int = 4) -> tuple[int, int]:
    """Trained parameters of a client, and their bytes one way; MIRA, FedIT and FedPTuning send them once up and once down a round."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(trees.partition(shapes, adapters.trained)[0]))
    return count, count * bytes_per_value


def server_memory(model: Model, num_clients: int, bytes_per_value: int = 4) -> dict[str, int]:
    """Bytes of adapters that the server holds: one copy a client in MIRA, one in FedIT."""
    _, size = adapter_traffic(model, bytes_per_value)
    return {"mira": num_clients * size, "fedit": size}


def tuning_memory(model: Model, *, optimizer_moments: int = 2, bytes_per_value: int = 4) -> int:
    """Bytes that one client holds, without activations: the base, the adapters, their gradient and the optimiser's moments (Adam: 2)."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    everything = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    trained, _ = adapter_traffic(model)
    return bytes_per_value * (everything + trained * (1 + optimizer_moments))
