"""Federated multi-task learning as compositions of pure functions: see the README for the tour."""

from fedjax_mtl import (
    algorithms,
    batching,
    models,
    relationships,
    sampling,
    server,
    task_graphs,
    tasks,
    topology,
)
from fedjax_mtl.algorithm import Algorithm, decentralized, federated
from fedjax_mtl.batching import Batch, BatchPlan
from fedjax_mtl.clients import ClientResult, ClientUpdate, Phase, local_trainer, loss_gradient, proximal
from fedjax_mtl.evaluation import evaluate_clients, evaluate_population, summarise_clients
from fedjax_mtl.execution import Execution, default_execution, make_execution, map_clients
from fedjax_mtl.federation import (
    ClientView,
    Cohort,
    Federation,
    Population,
    Splits,
    make_federation,
)
from fedjax_mtl.models import Model
from fedjax_mtl.population import Group, client_offsets, heterogeneous
from fedjax_mtl.relational import relational
from fedjax_mtl.simulate import Block, Simulation, simulate, simulate_blocks
from fedjax_mtl.tasks import Task

__all__ = [
    "Algorithm",
    "Batch",
    "BatchPlan",
    "Block",
    "ClientResult",
    "ClientUpdate",
    "ClientView",
    "Cohort",
    "Execution",
    "Federation",
    "Group",
    "Model",
    "Phase",
    "Population",
    "Simulation",
    "Splits",
    "Task",
    "algorithms",
    "batching",
    "client_offsets",
    "decentralized",
    "default_execution",
    "evaluate_clients",
    "evaluate_population",
    "federated",
    "heterogeneous",
    "local_trainer",
    "loss_gradient",
    "make_execution",
    "make_federation",
    "map_clients",
    "models",
    "proximal",
    "relational",
    "relationships",
    "sampling",
    "server",
    "simulate",
    "simulate_blocks",
    "summarise_clients",
    "task_graphs",
    "tasks",
    "topology",
]
