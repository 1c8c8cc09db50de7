"""From a config to the objects of a run: data, model, algorithm, sampler, execution.

The only place that reads configs; everything built here takes plain arguments. Fields that a factory does not know are refused by name.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from experiments.datasets import DATASETS, PopulationProblem, Problem
from fedjax_mtl import (
    Algorithm,
    Execution,
    algorithms,
    batching,
    default_execution,
    make_execution,
    models,
    sampling,
    topology,
    trees,
)


def call(factory: Callable, settings: dict[str, Any], where: str) -> Any:
    """``factory(**settings)``, after checking the names.

    Raises:
        ValueError: a setting the factory does not take, or one it needs that is missing, naming the config field.
    """
    parameters = inspect.signature(factory).parameters
    unknown = sorted(set(settings) - set(parameters))
    if unknown:
        raise ValueError(f"unknown field {where}.{unknown[0]}; known fields: {', '.join(sorted(parameters))}")
    missing = sorted(
        name
        for name, p in parameters.items()
        if p.default is inspect.Parameter.empty and name not in settings
    )
    if missing:
        raise ValueError(f"missing field {where}.{missing[0]}")
    return factory(**settings)


def choose(table: dict[str, Any], name: str, where: str) -> Any:
    """``table[name]``, or a ValueError that lists what there is."""
    if name not in table:
        raise ValueError(f"unknown {where} {name!r}; expected one of {', '.join(sorted(table))}")
    return table[name]


def make_problem(config: ml_collections.ConfigDict) -> Problem | PopulationProblem:
    """Loads and federates ``config.data``."""
    settings = dict(config.data)
    return call(choose(DATASETS, settings.pop("name"), "config.data.name"), settings, "config.data")


def _linear(problem: Problem) -> models.Model:
    return models.linear(problem.input_shape, problem.num_outputs)


def _mlp(problem: Problem, *, hidden: tuple[int, ...]) -> models.Model:
    return models.mlp(problem.input_shape, problem.num_outputs, hidden)


def _cnn(problem: Problem, *, channels: tuple[int, ...], kernel: int, hidden: int) -> models.Model:
    return models.cnn(
        problem.input_shape, problem.num_outputs, channels=channels, kernel=kernel, hidden=hidden
    )


def _lstm(problem: Problem, *, embedding: int, hidden: int, layers: int) -> models.Model:
    return models.lstm(
        problem.input_shape[0], problem.num_outputs, embedding=embedding, hidden=hidden, layers=layers
    )


def _body_and_head(problem: Problem, *, hidden: tuple[int, ...]) -> models.Model:
    return models.body_and_head(problem.input_shape[0], problem.num_outputs, hidden)


MODELS = {"body_and_head": _body_and_head, "linear": _linear, "mlp": _mlp, "cnn": _cnn, "lstm": _lstm}


def make_model(config: ml_collections.ConfigDict, problem: Problem) -> models.Model:
    """The model of ``config.model`` for this problem."""
    settings = dict(config.model)
    factory = choose(MODELS, settings.pop("name"), "config.model.name")
    return call(factory, {"problem": problem, **settings}, "config.model")


def make_optimizer(
    *, learning_rate: float, momentum: float = 0.0, weight_decay: float = 0.0, name: str = "sgd"
) -> optax.GradientTransformation:
    """SGD or Adam with L2 regularisation in the gradient, as PyTorch's weight decay."""
    table = {
        "sgd": lambda: optax.sgd(learning_rate, momentum=momentum or None),
        "adam": lambda: optax.adam(learning_rate),
    }
    optimizer = choose(table, name, "optimizer")()
    if weight_decay:
        return optax.chain(optax.add_decayed_weights(weight_decay), optimizer)
    return optimizer


def make_schedule(name: str, num_rounds: int) -> Callable[[jax.Array], jax.Array]:
    """The factor on the local learning rate by round: ``constant``, ``multi_step``, ``cosine``, ``sqrt`` or ``linear``, FedEM's five."""
    half, later = num_rounds // 2, 3 * (num_rounds // 4)
    table = {
        "constant": lambda r: jnp.ones(()),
        "multi_step": lambda r: jnp.where(r < half, 1.0, jnp.where(r < later, 0.1, 0.01)),
        "cosine": optax.cosine_decay_schedule(1.0, max(num_rounds, 1)),
        "sqrt": lambda r: jax.lax.rsqrt(r + 1.0),
        "linear": lambda r: 1.0 / (r + 1.0),
    }
    return choose(table, name, "config.client.schedule")


class Parts(NamedTuple):
    """What the factories below compose."""

    problem: Problem
    model: models.Model
    execution: Execution
    plan: batching.BatchPlan
    schedule: Callable[[jax.Array], jax.Array]
    constant_rate: bool
    optimizer_settings: dict[str, Any]
    keep_optimizer: bool

    @property
    def num_clients(self) -> int:
        return self.problem.splits.train.num_clients

    def optimizer(self, learning_rate: float, **changes: Any) -> optax.GradientTransformation:
        return make_optimizer(**{**self.optimizer_settings, "learning_rate": learning_rate, **changes})

    def common(self) -> dict[str, Any]:
        """Arguments of every algorithm around a server."""
        return {
            "model": self.model,
            "task": self.problem.task,
            "num_clients": self.num_clients,
            "execution": self.execution,
        }

    def training(self, learning_rate: float) -> dict[str, Any]:
        """Arguments of every algorithm that trains locally by ``client``."""
        return {
            **self.common(),
            "plan": self.plan,
            "schedule": self.schedule,
            "optimizer": self.optimizer(learning_rate),
        }


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
    settings = parts.training(learning_rate) | {"optimizer": parts.optimizer(learning_rate, momentum=0.0)}
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
    "complete": lambda clients, probability, seed: topology.complete(clients),
    "ring": lambda clients, probability, seed: topology.ring(clients),
    "erdos_renyi": topology.erdos_renyi,
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
    weigh = {"fastest": topology.fastest_mixing_weights, "metropolis": topology.metropolis_weights}
    matrix = choose(weigh, weights, "config.algorithm weights")(
        make(parts.num_clients, edge_probability, graph_seed)
    )
    if not self_loops:
        matrix = topology.without_self_loops(matrix)
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
    parts: Parts, *, learning_rate: float, penalty: float, probability: float = 0.1, fidelity: str = "paper"
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


def _agnostic(parts: Parts, *, learning_rate: float, mixture_learning_rate: float = 0.001) -> Algorithm:
    # One minibatch gradient a round: local epochs and the local schedule do not apply.
    sizes = parts.problem.splits.train.sizes
    return algorithms.agnostic(
        **parts.common(),
        mixture=sizes / jnp.sum(sizes),
        optimizer=parts.optimizer(learning_rate),
        mixture_learning_rate=mixture_learning_rate,
        batch_size=parts.plan.batch_size,
    )


def _q_ffl(parts: Parts, *, learning_rate: float, q: float = 1.0, fidelity: str = "paper") -> Algorithm:
    # Plain SGD, whose step size is the method's Lipschitz estimate: momentum and weight decay do not apply.
    return algorithms.q_ffl(
        **parts.common(),
        plan=parts.plan,
        schedule=parts.schedule,
        learning_rate=learning_rate,
        q=q,
        fidelity=fidelity,
    )


def _gradnorm_settings(
    parts: Parts,
    *,
    learning_rate: float,
    head_learning_rate: float,
    head_steps: int,
    server_learning_rate: float,
    weight_learning_rate: float,
    exponent: float,
    minimum: float,
    dynamic: bool,
) -> dict[str, Any]:
    """Of FedGradNorm on a body and a head: norms at the body's last layer, Adam on the server, plain SGD on the clients."""
    plain = make_optimizer.__kwdefaults__
    changed = [name for name, value in plain.items() if parts.optimizer_settings[name] != value]
    changed += ["keep_optimizer"] * parts.keep_optimizer + ["schedule"] * (not parts.constant_rate)
    if changed:
        raise ValueError(
            f"FedGradNorm's clients train by plain SGD at a constant rate; leave config.client.{changed[0]} as it is"
        )
    last = f"dense_{len(_layers(parts)) - 1}"
    return {
        "model": parts.model,
        "task": parts.problem.task,
        "head": trees.under("decoder"),
        "head_plan": batching.steps(head_steps, parts.plan.batch_size),
        "plan": parts.plan,
        "head_learning_rate": head_learning_rate,
        "learning_rate": learning_rate,
        "server_optimizer": optax.adam(server_learning_rate),
        "weight_learning_rate": weight_learning_rate,
        "exponent": exponent,
        "measured": lambda path: last in path and path[-1] == "kernel",
        "dynamic": dynamic,
        "minimum": minimum,
        "execution": parts.execution,
    }


def _layers(parts: Parts) -> list[str]:
    params = jax.eval_shape(parts.model.init, jax.random.key(0))
    if "encoder" not in params or "decoder" not in params:
        raise ValueError(
            "FedGradNorm needs a model with encoder and decoder; use --config.model.name=body_and_head"
        )
    return sorted(params["encoder"])


def _fedgradnorm(
    parts: Parts,
    *,
    learning_rate: float,
    head_learning_rate: float = 0.02,
    head_steps: int = 5,
    server_learning_rate: float = 0.01,
    weight_learning_rate: float = 0.02,
    exponent: float = 0.6,
    minimum: float = 0.01,
    dynamic: bool = True,
    norms: str = "update",
    loss_point: str = "shared",
    local_weighting: bool = False,
) -> Algorithm:
    settings = _gradnorm_settings(
        parts,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        head_steps=head_steps,
        server_learning_rate=server_learning_rate,
        weight_learning_rate=weight_learning_rate,
        exponent=exponent,
        minimum=minimum,
        dynamic=dynamic,
    )
    return algorithms.fedgradnorm(
        **settings,
        num_clients=parts.num_clients,
        norms=norms,
        loss_point=loss_point,
        local_weighting=local_weighting,
    )


def _hota_fedgradnorm(
    parts: Parts,
    *,
    learning_rate: float,
    num_clusters: int,
    threshold: float = 0.032,
    fading: tuple[float, ...] = (1.0,),
    noise: float = 0.001,
    head_learning_rate: float = 0.02,
    head_steps: int = 5,
    server_learning_rate: float = 0.01,
    weight_learning_rate: float = 0.02,
    exponent: float = 0.6,
    minimum: float = 0.01,
    dynamic: bool = True,
) -> Algorithm:
    if parts.num_clients % num_clusters or len(fading) not in (1, num_clusters):
        raise ValueError(
            f"config.algorithm.hota_fedgradnorm has num_clusters={num_clusters} and fading of {len(fading)} for "
            f"{parts.num_clients} clients; clusters must divide clients, fading be one number or one a cluster"
        )
    settings = _gradnorm_settings(
        parts,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        head_steps=head_steps,
        server_learning_rate=server_learning_rate,
        weight_learning_rate=weight_learning_rate,
        exponent=exponent,
        minimum=minimum,
        dynamic=dynamic,
    )
    return algorithms.hota_fedgradnorm(
        **settings,
        num_clusters=num_clusters,
        cluster_size=parts.num_clients // num_clusters,
        threshold=threshold,
        fading=jnp.asarray(fading if len(fading) > 1 else fading[0]),
        noise=noise,
    )


def _equal(factory: Callable[..., Algorithm]) -> Callable[..., Algorithm]:
    """The twin with equal static weights, of the same settings."""

    @functools.wraps(factory)
    def make(parts: Parts, **settings: Any) -> Algorithm:
        return factory(parts, **settings | {"dynamic": False})

    return make


def _fedrep(parts: Parts, *, learning_rate: float, head_steps: int = 5) -> Algorithm:
    return algorithms.fedrep(
        **parts.training(learning_rate),
        head=trees.under("decoder"),
        head_plan=batching.steps(head_steps, parts.plan.batch_size),
    )


def _fedper(parts: Parts, *, learning_rate: float) -> Algorithm:
    return algorithms.fedper(**parts.training(learning_rate), head=trees.under("decoder"))


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "equal_weights": _equal(_fedgradnorm),
    "fedgradnorm": _fedgradnorm,
    "fedper": _fedper,
    "fedrep": _fedrep,
    "hota_equal_weights": _equal(_hota_fedgradnorm),
    "hota_fedgradnorm": _hota_fedgradnorm,
    "agnostic": _agnostic,
    "apfl": _apfl,
    "clustered": _clustered,
    "decentralized_fedem": _decentralized_fedem,
    "fedavg": _fedavg,
    "fedavg_tuned": _fedavg_tuned,
    "fedem": _fedem,
    "fedprox": _fedprox,
    "l2sgd": _l2sgd,
    "local": _local,
    "pfedme": _pfedme,
    "q_ffl": _q_ffl,
}


def make_plan(*, batch_size: int, epochs: int, steps: int) -> batching.BatchPlan:
    """Local epochs, or (epochs 0) local steps; batch size 0 is the whole local set."""
    if (epochs > 0) == (steps > 0):
        raise ValueError(
            f"config.client has epochs={epochs} and steps={steps}; exactly one of them must be positive"
        )
    size = batch_size or None
    return batching.epochs(epochs, size) if epochs else batching.steps(steps, size)


def execution_of(config: ml_collections.ConfigDict, model: models.Model) -> Execution:
    """``config.execution``; mode ``auto`` picks by platform and the size of what a client trains, all components of it."""
    settings = dict(config.execution)
    if settings["mode"] != "auto":
        return make_execution(settings["mode"], settings["chunk"] or None, settings["num_devices"])
    components = dict(config.algorithm.get(config.algorithm.name, {})).get("num_components", 1)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), max(components, 1)))
    chosen = default_execution(jax.eval_shape(jax.vmap(model.init), keys))
    return make_execution(chosen.mode, chosen.chunk, settings["num_devices"])


FIELDS = {
    "": {
        *("data", "model", "algorithm", "client", "execution", "cohort_size", "num_rounds", "eval_every"),
        *("checkpoint_every", "evaluation_batch_size", "seeds"),
    },
    "execution": {"mode", "chunk", "num_devices"},
}


def check_fields(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for a field that nothing would read, or one that is missing."""
    for name, known in FIELDS.items():
        section = set(config[name] if name else config)
        for field in sorted(section ^ known):
            where = f"config.{name}.{field}" if name else f"config.{field}"
            raise ValueError(
                f"{'unknown' if field in section else 'missing'} field {where}; known: {', '.join(sorted(known))}"
            )


def make_algorithm(
    config: ml_collections.ConfigDict, problem: Problem | PopulationProblem
) -> tuple[Algorithm, Execution]:
    """The algorithm ``config.algorithm.name`` with its settings, ``config.algorithm.<name>``, and how it maps clients."""
    if isinstance(problem, PopulationProblem):
        from experiments import populations

        return populations.make_algorithm(config, problem)
    model = make_model(config, problem)
    client = dict(config.client)
    parts = Parts(
        problem,
        model,
        execution_of(config, model),
        make_plan(**{name: client.pop(name) for name in ("batch_size", "epochs", "steps")}),
        make_schedule(client["schedule"], config.num_rounds),
        client.pop("schedule") == "constant",
        {name: client.pop(name) for name in ("name", "momentum", "weight_decay")},
        client.pop("keep_optimizer"),
    )
    if client:
        raise ValueError(f"unknown field config.client.{sorted(client)[0]}")
    name = config.algorithm.name
    factory = choose(ALGORITHMS, name, "config.algorithm.name")
    settings = dict(config.algorithm[name]) if name in config.algorithm else {}
    return call(factory, {"parts": parts, **settings}, f"config.algorithm.{name}"), parts.execution


def make_sampler(
    config: ml_collections.ConfigDict, num_clients: int | dict[str, int]
) -> sampling.Sampler | sampling.PopulationSampler:
    """Everybody, or ``config.cohort_size`` clients a round, uniformly; of a heterogeneous population everybody."""
    size = config.cohort_size
    if isinstance(num_clients, dict):
        if size:
            raise ValueError(
                f"config.cohort_size is {size}, but all clients of a heterogeneous population take part; give 0"
            )
        return sampling.by_group(sampling.full_participation())
    if not 0 <= size <= num_clients:
        raise ValueError(
            f"config.cohort_size is {size} but {num_clients} clients train; give 1..{num_clients}, or 0 for all"
        )
    return sampling.uniform(size) if size else sampling.full_participation()


def cohort_size(config: ml_collections.ConfigDict, num_clients: int | dict[str, int]) -> int:
    """Clients in a round."""
    if isinstance(num_clients, dict):
        return sum(num_clients.values())
    return config.cohort_size or num_clients
