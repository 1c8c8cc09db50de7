"""Names that a config may say, and the library functions they stand for.

A new algorithm, data set or model is one line here; its settings are the parameters of its own
function, see :mod:`experiments.binding`.
"""

import functools
from collections.abc import Callable
from typing import Any

import optax

from experiments.binding import Makers, Tables
from fedjax_mtl import algorithms, models, server
from fedjax_mtl.clients import solvers
from fedjax_mtl.core import trees
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.data import (
    classification_problems,
    language_problems,
    linear_problems,
    task_problems,
)
from fedjax_mtl.models import cut, entries, pretrained, transformer
from fedjax_mtl.relations import covariance, gossip, graphs
from fedjax_mtl.relations.covariance import Relationship
from fedjax_mtl.relations.graphs import TaskGraph

DATA: Makers = {
    "chains": language_problems.chains_problem,
    "conflicting_tasks": task_problems.conflicting_tasks_problem,
    "digits": classification_problems.digits_problem,
    "families": language_problems.families_problem,
    "human_activity": linear_problems.human_activity_problem,
    "images": classification_problems.images_problem,
    "instruction_files": language_problems.instruction_files_problem,
    "related_tasks": linear_problems.related_tasks_problem,
    "scaled_tasks": task_problems.scaled_tasks_problem,
    "scenes": task_problems.scenes_problem,
    "shakespeare": classification_problems.shakespeare_problem,
    "synthetic": classification_problems.synthetic_mixture_problem,
    "task_table": linear_problems.task_table_problem,
}

MODELS: Makers = {
    "body_and_head": models.body_and_head,
    "checkpoint": pretrained.checkpoint_model,
    "cnn": models.cnn,
    "cut": cut.cut_model,
    "linear": models.linear,
    "lstm": models.lstm,
    "many_heads": models.many_heads,
    "mlp": models.mlp,
    "multi_decoder": models.multi_decoder,
    "task_conditioned": models.task_conditioned,
    "transformer": transformer.small_language_model,
}
"""Of one group's clients, or (``cut``) of all groups together."""

ADAPTERS: Makers = {"lora": models.lora, "prompt_tuning": models.prompt_tuning}

ADAPTERS_OF = {
    "fedit": "lora",
    "fedptuning": "prompt_tuning",
    "local_adapters": "lora",
    "mira": "lora",
}
"""Systems that train adapters on a frozen language model, and which."""

ALGORITHMS: Makers = {
    "agnostic": algorithms.agnostic,
    "apfl": algorithms.apfl,
    "clustered": algorithms.clustered,
    "cocoa": algorithms.cocoa,
    "decentralized_fedem": algorithms.decentralized_fedem,
    "ditto": algorithms.ditto,
    "equal_weights": functools.partial(algorithms.fedgradnorm, dynamic=False),
    "fedadam": algorithms.fedadam,
    "fedamp": algorithms.fedamp,
    "fedavg": algorithms.fedavg,
    "fedavg_tuned": algorithms.fedavg_tuned,
    "fedbn": algorithms.fedbn,
    "fedbone": algorithms.fedbone,
    "feddea": algorithms.feddea,
    "fedem": algorithms.fedem,
    "fedgradnorm": algorithms.fedgradnorm,
    "fedhca2": algorithms.fedhca2,
    "fedit": algorithms.fedit,
    "fedmtl": algorithms.fedmtl,
    "fedper": algorithms.fedper,
    "fedprox": algorithms.fedprox,
    "fedptuning": algorithms.fedit,
    "fedrep": algorithms.fedrep,
    "fedu": algorithms.fedu,
    "global_model": algorithms.global_model,
    "hota_equal_weights": functools.partial(algorithms.hota_fedgradnorm, dynamic=False),
    "hota_fedgradnorm": algorithms.hota_fedgradnorm,
    "l2sgd": algorithms.l2sgd,
    "lg_fedavg": algorithms.lg_fedavg,
    "local": algorithms.local,
    "local_adapters": algorithms.local_adapters,
    "local_models": algorithms.local_models,
    "matfl": algorithms.matfl,
    "minibatch_sdca": algorithms.minibatch_sdca,
    "minibatch_sgd": algorithms.minibatch_sgd,
    "mira": algorithms.mira,
    "mocha": algorithms.mocha,
    "pfedme": algorithms.pfedme,
    "q_ffl": algorithms.q_ffl,
    "sheaf_fmtl": algorithms.sheaf_fmtl,
}
"""A name means one thing, whatever the data. A partial function is a variant of a system."""

# What makes the objects that settings name.


def then(last: Callable[[Any], Any], first: Callable[..., Any]) -> Callable[..., Any]:
    """``last(first(...))``, with the parameters of the first."""

    @functools.wraps(first)
    def both(*positional: Any, **named: Any) -> Any:
        return last(first(*positional, **named))

    return both


GRAPHS: Makers = {
    "complete": gossip.complete_graph,
    "erdos_renyi": gossip.erdos_renyi,
    "ring": gossip.ring,
}

ADJACENCIES: Makers = {
    "complete": graphs.complete_weights,
    "erdos_renyi": then(gossip.adjacency_of, gossip.erdos_renyi),
    "group": graphs.within_groups,
    "labels": graphs.by_labels,
    "random": graphs.random,
    "ring": then(gossip.adjacency_of, gossip.ring),
}

TASK_GRAPHS: Makers = {
    "learned": graphs.learned,
    "updates": graphs.by_updates,
    **{name: then(graphs.fixed, adjacency) for name, adjacency in ADJACENCIES.items()},
}

MIXING_MATRICES: Makers = {
    "fastest": functools.partial(gossip.mixing_matrix, weights="fastest"),
    "metropolis": functools.partial(gossip.mixing_matrix, weights="metropolis"),
}

RELATIONSHIPS: Makers = {
    "clustered": covariance.clustered_tasks,
    "independent": covariance.independent,
    "learned": covariance.task_relationship,
    "mean": covariance.mean_regularised,
    "sparse": covariance.sparse_precision,
}

PATHS: Makers = {
    "everything": lambda: trees.everything,
    "nothing": lambda: trees.nothing,
    "head": lambda: entries.in_head,
    "body": lambda: entries.in_body,
    "entries": entries.under_entries,
    "last_body_kernel": entries.last_body_kernel,
}

OPTIMIZERS: Makers = {"adam": optax.adam, "sgd": optax.sgd}

SERVER_STEPS: Makers = {
    **OPTIMIZERS,
    "average": server.average_clients,
    "clip": server.clip_clients,
    "decouple": server.decouple_updates,
    "gp_aggregation": server.gp_aggregation,
    "median": server.coordinate_median,
    "trimmed_mean": server.trimmed_mean,
}
"""A server is a chain of these, for instance ``average, adam(learning_rate=0.03)``."""

TABLES = Tables(
    names={
        "adjacency": ADJACENCIES,
        "mixing_matrix": MIXING_MATRICES,
        "server": SERVER_STEPS,
    },
    annotations={
        "nx.Graph": GRAPHS,
        BatchPlan: {"plan": solvers.make_plan},
        linear_problems.Preparation: {"preparation": linear_problems.Preparation},
        optax.GradientTransformation: OPTIMIZERS,
        Relationship: RELATIONSHIPS,
        server.HyperOptimizer: {"sgd": server.HyperOptimizer},
        TaskGraph: TASK_GRAPHS,
        trees.PathPredicate: PATHS,
    },
    joins={"server": optax.chain},
    provided={
        "batch_size",
        "federation",
        "groups",
        "model",
        "num_classes",
        "num_clients",
        "penalty",
    },
    needs={
        "features": "inputs that are vectors",
        "groups": "data that know which clients are alike",
        "length": "inputs that are sequences",
        "loss": "data with a dual loss; use one of the data sets related_tasks, task_table, "
        "human_activity",
        "lower": "a model that can be cut; use --config.model.name=cut",
        "num_heads": "data for a model with a head for each client; use "
        "--config.data.name=conflicting_tasks",
        "outputs": "data with one kind of output; use a model with a decoder for each task",
        "outputs_by_group": "clients that come in groups by task",
        "tasks": "data with outputs by task; use --config.data.name=scenes",
    },
)
"""How the objects are made that settings only name."""
