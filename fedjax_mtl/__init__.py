"""Federated multi-task learning as compositions of pure functions: see the README for the tour."""

from fedjax_mtl import algorithms, models, relations, server, tasks
from fedjax_mtl.clients.training import loss_gradient, proximal
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate, Phase, local_trainer
from fedjax_mtl.core import batching, sampling
from fedjax_mtl.core.batching import Batch, BatchPlan
from fedjax_mtl.core.federation import (
    ClientView,
    Cohort,
    Federation,
    Population,
    Splits,
    make_federation,
)
from fedjax_mtl.evaluation import evaluate_clients, evaluate_population, summarise_clients
from fedjax_mtl.execution import Execution, default_execution, make_execution, map_clients
from fedjax_mtl.models import Model
from fedjax_mtl.rounds.federated import Algorithm, decentralized, federated
from fedjax_mtl.rounds.population import Group, client_offsets, heterogeneous
from fedjax_mtl.rounds.relational import relational
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
    "relations",
    "sampling",
    "server",
    "simulate",
    "simulate_blocks",
    "summarise_clients",
    "tasks",
]
