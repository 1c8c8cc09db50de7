"""Federated multi-task learning as compositions of pure functions: see the README for the tour."""

from fedjax_mtl import algorithms, models, relations, server, tasks
from fedjax_mtl.clients.training import Solver, loss_gradient, proximal
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate, Phase, local_trainer
from fedjax_mtl.core import batching, sampling, trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import Batch, BatchPlan
from fedjax_mtl.core.federation import (
    ClientView,
    Cohort,
    Federation,
    Population,
    Splits,
    make_federation,
)
from fedjax_mtl.evaluation import evaluate_clients, summarise_clients
from fedjax_mtl.execution import Execution, default_execution, make_execution, map_clients
from fedjax_mtl.models import Model
from fedjax_mtl.rounds.composition import FederatedState
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import Group, client_offsets, each_group
from fedjax_mtl.rounds.wrappers import decentralized, heterogeneous, relational
from fedjax_mtl.simulation import Block, Simulation, Stage, simulate, simulate_blocks
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
    "FederatedState",
    "Federation",
    "Group",
    "Model",
    "Phase",
    "Population",
    "Simulation",
    "Solver",
    "Splits",
    "Stage",
    "Task",
    "algorithms",
    "batching",
    "client_offsets",
    "decentralized",
    "each_group",
    "default_execution",
    "evaluate_clients",
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
    "trees",
]
