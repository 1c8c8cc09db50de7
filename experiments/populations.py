"""From a config to an algorithm for a heterogeneous population: models of the groups, local trainers, server."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from experiments import build
from experiments.parts import make_optimizer, make_schedule
from experiments.problems.base import PopulationProblem
from experiments.settings import call, choose
from fedjax_mtl import (
    Algorithm,
    Execution,
    Group,
    Phase,
    algorithms,
    default_execution,
    heterogeneous,
    local_trainer,
    make_execution,
    models,
    server,
)
from fedjax_mtl.clients import split
from fedjax_mtl.core import batching, trees


class SplitParts(NamedTuple):
    """A model in three parts: the groups' common embedding and trunk, and each group's upper part."""

    lower: split.Part
    trunk: split.Part
    uppers: dict[str, split.Part]


class GroupModels(NamedTuple):
    """The models of the groups, which of their leaves are a group's own decoder, and their parts if they can be cut."""

    models: dict[str, models.Model]
    decoder: trees.PathPredicate
    parts: SplitParts | None = None


def _many_heads(problem: PopulationProblem, *, hidden: tuple[int, ...]) -> GroupModels:
    num_heads = next(iter(problem.outputs.values()))["heads"]
    one = models.many_heads(problem.input_shape[0], 6, num_heads, hidden)
    return GroupModels({name: one for name in problem.outputs}, trees.under("heads"))


def _multi_decoder(problem: PopulationProblem, *, size: str) -> GroupModels:
    made = {
        name: models.multi_decoder(problem.input_shape, own, size)
        for name, own in problem.outputs.items()
    }
    return GroupModels(made, trees.under("decoders"))


def _task_conditioned(problem: PopulationProblem, *, size: str) -> GroupModels:
    blocks = tuple(sorted({task for own in problem.outputs.values() for task in own}))
    made = {
        name: models.task_conditioned(problem.input_shape, own, size, blocks)
        for name, own in problem.outputs.items()
    }
    return GroupModels(made, trees.under("decoder", "task_embedding"))


def _cut(
    problem: PopulationProblem,
    *,
    trunk: str,
    patch: int,
    width: int,
    depth: int,
    heads: int,
    adaptation_width: int,
    head_width: int,
) -> GroupModels:
    """Patch embedding, trunk (``vit`` or ``conv``, of ``depth`` blocks or stages), and a task adaptation for each group's one task."""
    trunks = {
        "vit": lambda: models.vit_trunk(depth, heads),
        "conv": lambda: models.conv_trunk([width * 2**i for i in range(depth)]),
    }
    lower, body = (
        models.patch_embedding(patch, width),
        choose(trunks, trunk, "config.model.trunk")(),
    )
    uppers = {}
    for name, own in problem.outputs.items():
        if len(own) != 1:
            raise ValueError(
                f"config.model.name 'cut' is for single-task clients, group {name!r} has tasks {', '.join(own)}"
            )
        (task, channels), *_ = own.items()
        part = models.task_adaptation(
            adaptation_width, channels, problem.input_shape[:2], heads=heads, head_width=head_width
        )
        uppers[name] = split.Part(
            part.init, lambda p, f, part=part, task=task: {task: part.apply(p, f)}
        )
    parts = SplitParts(lower, body, uppers)
    made = {name: _uncut(problem, parts, name) for name in uppers}
    return GroupModels(made, trees.under("uppers"), parts)


def _uncut(problem: PopulationProblem, parts: SplitParts, name: str) -> models.Model:
    """A group's whole model; parameters ``lower``, ``trunk``, ``uppers/<group>``."""
    example = jax.ShapeDtypeStruct((1, *problem.input_shape), jnp.float32)
    whole = split.composed(parts.lower, parts.trunk, parts.uppers[name])
    number = sorted(parts.uppers).index(name)

    def init(key):
        trunk_key, lower_key, upper_key = jax.random.split(key, 3)
        keys = (lower_key, trunk_key, jax.random.fold_in(upper_key, number))
        made = split.init_parts(parts.lower, parts.trunk, parts.uppers[name], example, keys)
        return {"lower": made["lower"], "trunk": made["trunk"], "uppers": {name: made["upper"]}}

    def apply(params, inputs, key=None):
        del key
        own = {"lower": params["lower"], "trunk": params["trunk"], "upper": params["uppers"][name]}
        return whole(own, inputs)

    return models.Model(init, apply)


MODELS = {
    "cut": _cut,
    "many_heads": _many_heads,
    "multi_decoder": _multi_decoder,
    "task_conditioned": _task_conditioned,
}


class Parts(NamedTuple):
    """What the factories below compose."""

    problem: PopulationProblem
    group_models: GroupModels
    execution: Execution | None
    plan: batching.BatchPlan
    schedule: Callable[[jax.Array], jax.Array]
    constant_rate: bool
    optimizer: Callable[[float], optax.GradientTransformation]

    def groups(
        self, learning_rate: float, personal: trees.PathPredicate, **trainer: Any
    ) -> dict[str, Group]:
        """Every group's local trainer."""
        return {
            name: Group(
                model.init,
                local_trainer(
                    model,
                    self.problem.tasks[name],
                    self.optimizer(learning_rate),
                    self.plan,
                    personal=personal,
                    schedule=self.schedule,
                    **trainer,
                ),
                self.problem.splits.train[name].num_clients,
            )
            for name, model in self.group_models.models.items()
        }

    def around(
        self, groups: dict[str, Group], chain: optax.GradientTransformation, weighting: str
    ) -> Algorithm:
        return heterogeneous(groups, chain, weighting=weighting, execution=self.execution)


def _personal(parts: Parts, shared: str) -> trees.PathPredicate:
    table = {"all": trees.nothing, "encoder": parts.group_models.decoder}
    return choose(table, shared, "config.algorithm shared")


def _chain(
    keep: float, rescale: str, denominator: str, scope: str, optimizer: str, server_step: float
):
    """A server: FedDEA unless ``keep`` is 1 and nothing is rescaled, the average, then SGD or Adam."""
    steps = {"sgd": optax.sgd, "adam": optax.adam}
    step = choose(steps, optimizer, "config.algorithm server_optimizer")(server_step)
    if keep == 1.0 and rescale in ("l1", "l2", "density", "none"):
        return server.step_from(step)
    decouple = server.decouple_updates(keep, rescale=rescale, denominator=denominator, scope=scope)
    return optax.chain(decouple, server.step_from(step))


def _fedavg(
    parts: Parts,
    *,
    learning_rate: float,
    shared: str = "all",
    keep: float = 1.0,
    rescale: str = "l1",
    denominator: str = "all",
    scope: str = "global",
    server_optimizer: str = "sgd",
    server_step: float = 1.0,
    proximal_strength: float = 0.0,
    weighting: str = "uniform",
) -> Algorithm:
    """FedAvg, FedProx, FedAdam and FedDEA: ``keep`` < 1 decouples, ``proximal_strength`` pulls, ``shared`` is ``all`` or ``encoder``."""
    groups = parts.groups(
        learning_rate, _personal(parts, shared), proximal_strength=proximal_strength
    )
    chain = _chain(keep, rescale, denominator, scope, server_optimizer, server_step)
    return parts.around(groups, chain, weighting)


def _local(parts: Parts, *, learning_rate: float) -> Algorithm:
    groups = parts.groups(learning_rate, trees.everything)
    return parts.around(groups, server.average_clients(), "uniform")


def _fedrep(
    parts: Parts, *, learning_rate: float, head_steps: int = 5, weighting: str = "uniform"
) -> Algorithm:
    head = parts.group_models.decoder
    phases = [
        Phase(head, batching.steps(head_steps, parts.plan.batch_size)),
        Phase(trees.negate(head), parts.plan),
    ]
    groups = parts.groups(learning_rate, head, phases=phases)
    return parts.around(groups, server.step_from(optax.sgd(1.0)), weighting)


def _fedbone(
    parts: Parts,
    *,
    learning_rate: float,
    trunk_learning_rate: float,
    trunk_optimizer: str = "adam",
    drift_learning_rate: float = 0.001,
    attention: str = "softmax_cosine",
    project: bool = True,
    order: str = "index",
    schedule: str = "step",
    embedding_sync: str = "fedavg",
    weighting: str = "uniform",
) -> Algorithm:
    cut = parts.group_models.parts
    if cut is None:
        raise ValueError(
            "config.algorithm.name 'fedbone' needs a model that can be cut; use --config.model.name=cut"
        )
    if parts.plan.num_steps is None:
        raise ValueError(
            "fedbone goes in lock step: set config.client.steps, and config.client.epochs to 0"
        )
    if parts.execution is not None or not parts.constant_rate or not parts.plan.batch_size:
        raise ValueError(
            "fedbone goes in lock step with all clients at once: leave config.execution.mode auto and config.client.schedule constant, and give a "
            "positive config.client.batch_size"
        )
    groups = {
        name: algorithms.SplitGroup(
            upper, parts.problem.tasks[name], parts.problem.splits.train[name].num_clients
        )
        for name, upper in cut.uppers.items()
    }
    steps = {"sgd": optax.sgd, "adam": optax.adam}
    optimizer = choose(steps, trunk_optimizer, "config.algorithm.fedbone.trunk_optimizer")(
        trunk_learning_rate
    )
    return algorithms.fedbone(
        cut.lower,
        cut.trunk,
        groups,
        jax.ShapeDtypeStruct((1, *parts.problem.input_shape), jnp.float32),
        num_steps=parts.plan.num_steps,
        batch_size=parts.plan.batch_size,
        client_optimizer=parts.optimizer(learning_rate),
        server=optax.chain(
            server.gp_aggregation(attention=attention, project=project, order=order), optimizer
        ),
        schedule=schedule,
        trunk_learning_rate=drift_learning_rate,
        embedding_sync=embedding_sync,
        weighting=weighting,
    )


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "fedadam": _fedavg,
    "fedavg": _fedavg,
    "fedbone": _fedbone,
    "feddea": _fedavg,
    "fedper": _fedavg,
    "fedprox": _fedavg,
    "fedrep": _fedrep,
    "local": _local,
}


def make_algorithm(
    config: ml_collections.ConfigDict, problem: PopulationProblem
) -> tuple[Algorithm, Execution]:
    """The algorithm ``config.algorithm.name`` around the groups' models, and how it maps (and judges) clients."""
    settings = dict(config.model)
    factory = choose(MODELS, settings.pop("name"), "config.model.name")
    group_models = call(factory, {"problem": problem, **settings}, "config.model")
    client = dict(config.client)
    plan = build.make_plan(**{name: client.pop(name) for name in ("batch_size", "epochs", "steps")})
    schedule_name = client.pop("schedule")
    schedule = make_schedule(schedule_name, config.num_rounds)
    if client.pop("keep_optimizer"):
        raise ValueError(
            "config.client.keep_optimizer is not offered for heterogeneous populations; leave it False"
        )
    chosen = dict(config.execution)
    execution = None
    if chosen["mode"] != "auto":
        execution = make_execution(chosen["mode"], chosen["chunk"] or None, chosen["num_devices"])
    parts = Parts(
        problem,
        group_models,
        execution,
        plan,
        schedule,
        schedule_name == "constant",
        lambda rate: make_optimizer(learning_rate=rate, **client),
    )
    name = config.algorithm.name
    factory = choose(ALGORITHMS, name, "config.algorithm.name")
    settings = dict(config.algorithm[name]) if name in config.algorithm else {}
    algorithm = call(factory, {"parts": parts, **settings}, f"config.algorithm.{name}")
    largest = max(
        (jax.eval_shape(m.init, jax.random.key(0)) for m in group_models.models.values()),
        key=lambda params: sum(leaf.size for leaf in jax.tree.leaves(params)),
    )
    return algorithm, execution or default_execution(largest)
