"""FedEM and the baselines it is compared with."""

from collections.abc import Callable

import jax.numpy as jnp

from experiments.parts import Parts
from experiments.settings import choose
from fedjax_mtl import Algorithm, algorithms
from fedjax_mtl.core import batching, trees
from fedjax_mtl.relations import gossip


def _fedavg(parts: Parts, *, learning_rate: float, weighting: str = "samples") -> Algorithm:
    return algorithms.fedavg(
        **parts.training(learning_rate), keep_optimizer=parts.keep_optimizer, weighting=weighting
    )


def _fedavg_tuned(parts: Parts, *, learning_rate: float, adaptation_epochs: int = 1) -> Algorithm:
    adaptation = batching.epochs(adaptation_epochs, parts.plan.batch_size)
    return algorithms.fedavg_tuned(
        **parts.training(learning_rate), keep_optimizer=parts.keep_optimizer, adaptation=adaptation
    )


def _fedprox(parts: Parts, *, learning_rate: float, proximal_strength: float) -> Algorithm:
    # The proximal optimiser has no momentum, whatever the other algorithms' has.
    settings = parts.training(learning_rate) | {
        "optimizer": parts.optimizer(learning_rate, momentum=0.0)
    }
    return algorithms.fedprox(**settings, proximal_strength=proximal_strength)


def _local(parts: Parts, *, learning_rate: float) -> Algorithm:
    return algorithms.local(**parts.training(learning_rate), keep_optimizer=parts.keep_optimizer)


def _fedem(
    parts: Parts,
    *,
    learning_rate: float,
    num_components: int,
    adaptation_iterations: int = 10,
    weighting: str = "population",
    fidelity: str = "paper",
) -> Algorithm:
    return algorithms.fedem(
        **parts.training(learning_rate),
        num_components=num_components,
        adaptation_iterations=adaptation_iterations,
        weighting=weighting,
        fidelity=fidelity,
        keep_optimizer=parts.keep_optimizer or fidelity == "released",
    )


GRAPHS = {
    "complete": lambda clients, probability, seed: gossip.complete(clients),
    "ring": lambda clients, probability, seed: gossip.ring(clients),
    "erdos_renyi": gossip.erdos_renyi,
}


def _decentralized_fedem(
    parts: Parts,
    *,
    learning_rate: float,
    num_components: int,
    graph: str = "erdos_renyi",
    edge_probability: float = 0.5,
    weights: str = "fastest",
    graph_seed: int = 0,
    self_loops: bool = True,
) -> Algorithm:
    make = choose(GRAPHS, graph, "config.algorithm graph")
    weigh = {"fastest": gossip.fastest_mixing_weights, "metropolis": gossip.metropolis_weights}
    matrix = choose(weigh, weights, "config.algorithm weights")(
        make(parts.num_clients, edge_probability, graph_seed)
    )
    if not self_loops:
        matrix = gossip.without_self_loops(matrix)
    settings = parts.training(learning_rate)
    del settings["num_clients"]
    return algorithms.decentralized_fedem(
        **settings,
        mixing_matrix=jnp.asarray(matrix, jnp.float32),
        num_components=num_components,
        keep_optimizer=parts.keep_optimizer,
    )


def _clustered(
    parts: Parts,
    *,
    learning_rate: float,
    mean_below: float = 0.4,
    largest_above: float = 1.6,
    fidelity: str = "paper",
) -> Algorithm:
    return algorithms.clustered(
        **parts.training(learning_rate),
        keep_optimizer=parts.keep_optimizer or fidelity == "released",
        fidelity=fidelity,
        mean_below=mean_below,
        largest_above=largest_above,
    )


def _pfedme(
    parts: Parts,
    *,
    learning_rate: float,
    penalty: float,
    inner_learning_rate: float = 0.05,
    inner_steps: int = 5,
    server_step: float = 1.0,
    fidelity: str = "paper",
) -> Algorithm:
    settings = parts.training(learning_rate)
    # The inner problem is solved by plain SGD; the released form trains by the proximal optimiser, without momentum.
    inner = learning_rate if fidelity == "released" else inner_learning_rate
    settings["optimizer"] = parts.optimizer(inner, momentum=0.0)
    return algorithms.pfedme(
        **settings,
        penalty=penalty,
        learning_rate=learning_rate,
        inner_steps=inner_steps,
        server_step=server_step,
        fidelity=fidelity,
    )


def _apfl(
    parts: Parts, *, learning_rate: float, alpha: float = 0.5, alpha_learning_rate: float = 0.0
) -> Algorithm:
    return algorithms.apfl(
        **parts.training(learning_rate), alpha=alpha, alpha_learning_rate=alpha_learning_rate
    )


def _l2sgd(
    parts: Parts,
    *,
    learning_rate: float,
    penalty: float,
    probability: float = 0.1,
    fidelity: str = "paper",
) -> Algorithm:
    # Plain SGD by definition: the client's momentum and weight decay do not apply.
    return algorithms.l2sgd(
        **parts.common(),
        fidelity=fidelity,
        learning_rate=learning_rate,
        penalty=penalty,
        probability=probability,
        batch_size=parts.plan.batch_size,
        schedule=parts.schedule,
    )


def _agnostic(
    parts: Parts, *, learning_rate: float, mixture_learning_rate: float = 0.001
) -> Algorithm:
    # One minibatch gradient a round: local epochs and the local schedule do not apply.
    sizes = parts.problem.splits.train.sizes
    return algorithms.agnostic(
        **parts.common(),
        mixture=sizes / jnp.sum(sizes),
        optimizer=parts.optimizer(learning_rate),
        mixture_learning_rate=mixture_learning_rate,
        batch_size=parts.plan.batch_size,
    )


def _q_ffl(
    parts: Parts, *, learning_rate: float, q: float = 1.0, fidelity: str = "paper"
) -> Algorithm:
    # Plain SGD, whose step size is the method's Lipschitz estimate: momentum and weight decay do not apply.
    return algorithms.q_ffl(
        **parts.common(),
        plan=parts.plan,
        schedule=parts.schedule,
        learning_rate=learning_rate,
        q=q,
        fidelity=fidelity,
    )


def _fedrep(parts: Parts, *, learning_rate: float, head_steps: int = 5) -> Algorithm:
    return algorithms.fedrep(
        **parts.training(learning_rate),
        head=trees.under("decoder"),
        head_plan=batching.steps(head_steps, parts.plan.batch_size),
    )


def _fedper(parts: Parts, *, learning_rate: float) -> Algorithm:
    return algorithms.fedper(**parts.training(learning_rate), head=trees.under("decoder"))


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "agnostic": _agnostic,
    "apfl": _apfl,
    "clustered": _clustered,
    "decentralized_fedem": _decentralized_fedem,
    "fedavg": _fedavg,
    "fedavg_tuned": _fedavg_tuned,
    "fedem": _fedem,
    "fedper": _fedper,
    "fedprox": _fedprox,
    "fedrep": _fedrep,
    "l2sgd": _l2sgd,
    "local": _local,
    "pfedme": _pfedme,
    "q_ffl": _q_ffl,
}
