"""From a config to the objects of a run: data, model, algorithm, sampler, execution.

The only place that reads configs; everything built here takes plain arguments. Fields that a factory does not know are refused by name.
"""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax

from experiments.factories import ALGORITHMS
from experiments.parts import Parts, make_schedule
from experiments.problems import DATASETS
from experiments.problems.base import PopulationProblem, Problem
from experiments.settings import call, choose
from fedjax_mtl import Algorithm, Execution, default_execution, make_execution, models
from fedjax_mtl.clients.central import train_centrally
from fedjax_mtl.core import batching, sampling
from fedjax_mtl.models.pretrained import load_safetensors

PyTree = Any


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
        problem.input_shape[0],
        problem.num_outputs,
        embedding=embedding,
        hidden=hidden,
        layers=layers,
    )


def _body_and_head(problem: Problem, *, hidden: tuple[int, ...]) -> models.Model:
    return models.body_and_head(problem.input_shape[0], problem.num_outputs, hidden)


def _transformer(
    problem: Problem,
    *,
    width: int,
    num_layers: int,
    num_heads: int,
    mlp_width: int,
    max_length: int,
    pretraining_steps: int,
    pretraining_learning_rate: float,
) -> models.LanguageModel:
    del pretraining_steps, pretraining_learning_rate  # see make_base
    shape = models.tiny_transformer(
        problem.num_outputs, width, num_layers, num_heads, mlp_width, max_length=max_length
    )
    return models.language_model(shape)


def _checkpoint(problem: Problem, *, directory: str) -> models.LanguageModel:
    if not directory:
        raise ValueError(
            "config.model.directory is empty; name the folder of a GPT-2 or Llama checkpoint (config.json, model.safetensors)"
        )
    shape = models.from_hugging_face_config(directory)
    if shape.vocabulary < problem.num_outputs:
        raise ValueError(
            f"the tokenizer has {problem.num_outputs} tokens but the model in {directory} {shape.vocabulary}; use its own tokenizer"
        )
    return models.language_model(shape)


MODELS = {
    "body_and_head": _body_and_head,
    "checkpoint": _checkpoint,
    "cnn": _cnn,
    "linear": _linear,
    "lstm": _lstm,
    "mlp": _mlp,
    "transformer": _transformer,
}


def make_model(config: ml_collections.ConfigDict, problem: Problem) -> models.Model:
    """The model of ``config.model`` for this problem."""
    settings = dict(config.model)
    factory = choose(MODELS, settings.pop("name"), "config.model.name")
    return call(factory, {"problem": problem, **settings}, "config.model")


def make_base(
    config: ml_collections.ConfigDict, problem: Problem | PopulationProblem
) -> PyTree | None:
    """The frozen weights under adapters: of the checkpoint, or trained here on the problem's own pre-training data; None without adapters."""
    name = config.model.name
    if name == "checkpoint":
        return load_safetensors(
            config.model.directory, models.from_hugging_face_config(config.model.directory)
        )
    if name != "transformer" or not config.model.pretraining_steps:
        return None
    if problem.pretraining is None:
        raise ValueError(
            "these data have nothing to pre-train on; set config.model.pretraining_steps=0"
        )
    trained = train_centrally(
        make_model(config, problem),
        problem.task,
        problem.pretraining,
        optimizer=optax.adam(config.model.pretraining_learning_rate),
        plan=batching.steps(config.model.pretraining_steps, 64),
        key=jax.random.key(config.data.seed),
    )
    return trained.params


def make_plan(*, batch_size: int, epochs: int, steps: int) -> batching.BatchPlan:
    """Local epochs, or (epochs 0) local steps; batch size 0 is the whole local set."""
    if (epochs > 0) == (steps > 0):
        raise ValueError(
            f"config.client has epochs={epochs} and steps={steps}; exactly one of them must be positive"
        )
    size = batch_size or None
    return batching.epochs(epochs, size) if epochs else batching.steps(steps, size)


def execution_of(config: ml_collections.ConfigDict, model: models.Model) -> Execution:
    """``config.execution``; mode ``auto`` picks by platform and the size of the model, all components and a frozen base included."""
    settings = dict(config.execution)
    del settings["precision"]
    if settings["mode"] != "auto":
        return make_execution(settings["mode"], settings["chunk"] or None, settings["num_devices"])
    components = dict(config.algorithm.get(config.algorithm.name, {})).get("num_components", 1)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), max(components, 1)))
    chosen = default_execution(jax.eval_shape(jax.vmap(model.init), keys))
    return make_execution(chosen.mode, chosen.chunk, settings["num_devices"])


FIELDS = {
    "": {
        *(
            "data",
            "model",
            "algorithm",
            "client",
            "execution",
            "cohort_size",
            "num_rounds",
            "eval_every",
        ),
        *("systems", "checkpoint_every", "evaluation_batch_size", "seeds"),
    },
    "execution": {"mode", "chunk", "num_devices", "precision"},
    "systems": {"drop_probability", "low", "high", "of_smallest"},
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
    config: ml_collections.ConfigDict,
    problem: Problem | PopulationProblem,
    finish: Callable[[Any], Any] = lambda model: model,
) -> tuple[Algorithm, Execution]:
    """The algorithm ``config.algorithm.name`` with its settings, ``config.algorithm.<name>``, and how it maps clients; for ``finish`` see Parts."""
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
        {name: client.pop(name) for name in ("name", "momentum", "weight_decay", "max_norm")},
        client.pop("keep_optimizer"),
        finish,
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
    """Everybody, or ``config.cohort_size`` clients a round, uniformly, with the failures and budgets of ``config.systems``; of a heterogeneous population everybody."""
    size, systems = config.cohort_size, config.systems
    limited = (systems.low, systems.high) != (1.0, 1.0)
    if systems.of_smallest and not limited:
        raise ValueError(
            "config.systems.of_smallest says whose share a budget is; set low and high below 1 too"
        )
    if isinstance(num_clients, dict):
        if limited or systems.drop_probability:
            raise ValueError(
                "config.systems is not offered for heterogeneous populations; leave it as it is"
            )
        if size:
            raise ValueError(
                f"config.cohort_size is {size}, but all clients of a heterogeneous population take part; give 0"
            )
        return sampling.by_group(sampling.full_participation())
    if not 0 <= size <= num_clients:
        raise ValueError(
            f"config.cohort_size is {size} but {num_clients} clients train; give 1..{num_clients}, or 0 for all"
        )
    sampler = sampling.uniform(size) if size else sampling.full_participation()
    if limited:
        budget = sampling.fraction_of_data(
            systems.low, systems.high, of_smallest=systems.of_smallest
        )
        sampler = sampling.straggling(sampler, budget)
    return (
        sampling.dropping(sampler, systems.drop_probability)
        if systems.drop_probability
        else sampler
    )


def cohort_size(config: ml_collections.ConfigDict, num_clients: int | dict[str, int]) -> int:
    """Clients in a round."""
    if isinstance(num_clients, dict):
        return sum(num_clients.values())
    return config.cohort_size or num_clients
