"""What a config says: every field checked and completed by defaults, before anything is built.

:func:`make_plan` takes a config apart, each section for the library function that declares its
settings. :mod:`experiments.assembly` builds what the plan says.
"""

import copy
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from experiments import registry
from experiments.binding import Bound, Makers, bind, choose, parameters_of, plain_value
from fedjax_mtl import make_execution
from fedjax_mtl.clients.central import pretrain
from fedjax_mtl.clients.solvers import make_solver
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.models.cut import CutModel

PyTree = Any

PRECISIONS = {"single": False, "double": True}


class Course(NamedTuple):
    """The length of a run, and when it is looked at.

    Attributes:
        num_rounds: in all.
        eval_every: rounds between evaluations.
        checkpoint_every: rounds between checkpoints, a multiple of ``eval_every``; default as many.
        evaluation_batch_size: rows of a client that are judged at once.
        cohort_size: clients of a round; None takes everybody. Of clients that come in groups, those
            of each group.
        seeds: one run each, all in one program.
    """

    num_rounds: int
    eval_every: int
    checkpoint_every: int | None = None
    evaluation_batch_size: int = 256
    cohort_size: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)


class Systems(NamedTuple):
    """Failures and stragglers.

    Attributes:
        drop_probability: with which a client drops out of a round.
        low: the least share of its planned local steps that a client manages in a round; of methods
            in the dual, of one pass over single examples.
        high: the largest; shares are uniform in between.
        of_smallest: of methods in the dual, whether shares are of the smallest client's pass.
    """

    drop_probability: float = 0.0
    low: float = 1.0
    high: float = 1.0
    of_smallest: bool = False

    @property
    def limited(self) -> bool:
        """Whether anybody does less than was planned."""
        return (self.low, self.high) != (1.0, 1.0)


class Mapped(NamedTuple):
    """How clients are mapped, and in which precision.

    Attributes:
        mode: as for :class:`fedjax_mtl.Execution`, or ``auto``, by platform and model size.
        chunk: clients in a chunk, of mode ``chunk``.
        num_devices: over which the clients are split.
        precision: ``single``, or ``double`` for optimisation to small gaps.
    """

    mode: str = "auto"
    chunk: int | None = None
    num_devices: int = 1
    precision: str = "single"


# What an algorithm may take of the client's settings, by its own parameters.
OPTIMIZER_FIELDS = ("learning_rate", "name", "momentum", "weight_decay", "max_norm")
PLAN_FIELDS = ("batch_size", "epochs", "steps")
_TAKES = {
    "solver": (*OPTIMIZER_FIELDS, *PLAN_FIELDS, "schedule", "keep_optimizer"),
    "optimizer": OPTIMIZER_FIELDS,
    "plan": PLAN_FIELDS,
    "batch_size": ("batch_size",),
    "schedule": ("schedule",),
    "learning_rate": ("learning_rate",),
}

# What a run provides to the functions of its sections, by parameter.
TO_MODELS = frozenset(
    {
        "code_blocks",
        "features",
        "image_shape",
        "input_shape",
        "length",
        "num_heads",
        "outputs",
        "outputs_by_group",
        "tasks",
        "vocabulary",
    }
)
TO_ALGORITHMS = frozenset(
    {
        *("model", "task", "num_clients", "execution"),
        *("solver", "plan", "batch_size", "schedule", "optimizer"),
        *("head", "decoder", "encoder", "representation"),
        *("loss", "sizes", "capacity", "features", "dtype", "mixture"),
    }
)


class Plan(NamedTuple):
    """A config whose every field has been checked; nothing is built yet.

    Attributes:
        name: of the algorithm.
        data: makes the problem.
        model: makes a model of one group's clients, or of all groups'.
        adapters: puts adapters on a language model; None for systems without.
        pretraining: trains the base model under them.
        algorithm: makes the algorithm.
        client: the client's settings for this algorithm, its own changes among them.
        mapped: how clients are mapped.
        systems: failures and stragglers.
        course: the length of the run, and when it is looked at.
        settings: the whole config, defaults included, as ``config.json`` shows it.
    """

    name: str
    data: Bound
    model: Bound
    adapters: Bound | None
    pretraining: Bound
    algorithm: Bound
    client: dict[str, Any]
    mapped: Mapped
    systems: Systems
    course: Course
    settings: dict[str, Any]

    @property
    def takes(self) -> frozenset[str]:
        """The parameters of the algorithm."""
        return frozenset(self.algorithm.parameters)


_SECTIONS = ("data", "model", "algorithm", "client", "pretraining", "execution", "systems")


def make_plan(config: Mapping[str, Any]) -> Plan:
    """Checks a whole config by names and types, without building anything.

    Raises:
        InputError: a field that nothing takes, one that is missing, or a value that makes no sense,
            naming the field.
    """
    fields = plain_fields(config)
    sections = {name: fields.pop(name, {}) for name in _SECTIONS}
    course = bind(Course, fields, "config", also_known=_SECTIONS)
    mapped = bind(Mapped, sections["execution"], "config.execution")
    systems = bind(Systems, sections["systems"], "config.systems")
    data = _named(registry.DATA, sections["data"], "config.data")
    all_adapters = sections["model"].pop("adapters", {})
    model = _named(registry.MODELS, sections["model"], "config.model", TO_MODELS)
    client = _client(sections["client"], "config.client")
    name, algorithm, changes = _algorithm(sections["algorithm"], client)
    adapters = _adapters(name, all_adapters)
    pretraining = _pretraining(sections["pretraining"])
    settings = {
        "data": data.settings,
        "model": dict(model.settings),
        "algorithm": {"name": name, name: algorithm.settings | changes},
        "client": client,
        "pretraining": pretraining.settings,
        "execution": mapped.settings,
        "systems": systems.settings,
    }
    if adapters is not None:
        settings["model"]["adapters"] = {registry.ADAPTERS_OF[name]: adapters.settings}
    plan = Plan(
        name,
        data,
        model,
        adapters,
        pretraining,
        algorithm,
        client | changes.get("solver", changes),
        mapped.call({}),
        systems.call({}),
        _checked_course(course.call({})),
        settings,
    )
    plan.settings.update(plan.course._asdict())
    for check in (_check_client, _check_systems, _check_pretraining, _check_execution):
        check(plan)
    return plan


def plain_fields(config: Any) -> Any:
    """A config as plain dicts that nobody shares."""
    return copy.deepcopy(config.to_dict() if hasattr(config, "to_dict") else dict(config))


def _named(
    table: Makers, section: dict[str, Any], where: str, provided: Collection[str] = frozenset()
) -> Bound:
    """The function that a section names, with the section's settings."""
    settings = dict(section)
    name = settings.pop("name", None)
    function = choose(table, name, f"{where}.name")
    return bind(function, settings, where, provided=provided, tables=registry.TABLES, name=name)


# --- Local training.

CLIENT_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in parameters_of(make_solver).items()
    if not parameter.required
}


def _client(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The client's settings, defaults included; a rate of None is left to the algorithm."""
    rest = dict(section)
    rate = rest.pop("learning_rate", None)
    bound = bind(
        make_solver,
        rest,
        where,
        provided=("learning_rate", "num_rounds"),
        also_known=("learning_rate",),
    )
    if rate is not None:
        rate = plain_value(parameters_of(make_solver)["learning_rate"], rate, where)
    return {"learning_rate": rate} | bound.settings


def _algorithm(
    section: Mapping[str, Any], client: dict[str, Any]
) -> tuple[str, Bound, dict[str, Any]]:
    """The algorithm's name, its function with its settings, and its changes to the client's.

    A field that the function does not take itself and that the client has is a change for this
    algorithm alone. Where the function has a learning rate of its own and a solver too, the
    solver's is changed by the field ``solver``, a section like the client's.
    """
    name: Any = section.get("name")
    function = choose(registry.ALGORITHMS, name, "config.algorithm.name")
    for other in sorted(set(section) - {"name"}):
        choose(registry.ALGORITHMS, other, "algorithm in config.algorithm")
    where, parameters = f"config.algorithm.{name}", parameters_of(function)
    own = dict(section.get(name, {}))
    trains = [field for taker in _TAKES if taker in parameters for field in _TAKES[taker]]
    elsewhere = {"learning_rate", *CLIENT_DEFAULTS} - {n for n, p in parameters.items() if p.plain}
    changes = {field: own.pop(field) for field in sorted(elsewhere) if field in own}
    if changes.get("learning_rate", 0) is None:  # a field that waits for the command line
        del changes["learning_rate"]
    of_solver = own.pop("solver", {}) if "solver" in parameters else {}
    checked = _client(changes | of_solver, where)
    own_rate = parameters.get("learning_rate")
    if own_rate is not None and own_rate.required and own.get("learning_rate") is None:
        own["learning_rate"] = client["learning_rate"]
    bound = bind(
        function,
        own,
        where,
        provided=TO_ALGORITHMS,
        tables=registry.TABLES,
        also_known=elsewhere.intersection(trains),
    )
    changes = {field: checked[field] for field in changes | of_solver}
    return name, bound, {"solver": changes} if of_solver else changes


def _check_client(plan: Plan) -> None:
    """Refuses settings of the client that the algorithm would ignore, and a missing rate."""
    taken = {field for taker in _TAKES if taker in plan.takes for field in _TAKES[taker]}
    for field, default in CLIENT_DEFAULTS.items():
        if field not in taken and plan.client[field] != default:
            raise InputError(
                f"config.client.{field} is {plan.client[field]!r}, but {plan.name} does not take "
                f"it; leave it at {default!r}"
            )
    if plan.takes & {"solver", "optimizer"} and plan.client["learning_rate"] is None:
        raise InputError(
            f"missing field config.algorithm.{plan.name}.learning_rate; set it, or "
            "config.client.learning_rate for all algorithms"
        )


def _adapters(name: str, section: Mapping[str, Any]) -> Bound | None:
    for kind in section:
        choose(registry.ADAPTERS, kind, "adapters in config.model.adapters")
    if name not in registry.ADAPTERS_OF:
        return None
    kind = registry.ADAPTERS_OF[name]
    where = f"config.model.adapters.{kind}"
    return bind(registry.ADAPTERS[kind], section.get(kind, {}), where, provided=("model",))


def _pretraining(section: Mapping[str, Any]) -> Bound:
    return bind(
        pretrain,
        {"steps": 0, **{name: value for name, value in section.items() if value is not None}},
        "config.pretraining",
        provided=("model", "task", "examples"),
    )


def _check_pretraining(plan: Plan) -> None:
    steps, loads = plan.pretraining.values["steps"], plan.model.name == "checkpoint"
    if plan.adapters is None and (steps or loads):
        what = "config.model.name checkpoint" if loads else "config.pretraining"
        raise InputError(
            f"{what} gives weights to the frozen model under adapters, and {plan.name} has none; "
            f"use one of {', '.join(sorted(registry.ADAPTERS_OF))}"
        )
    if steps and loads:
        raise InputError("a checkpoint brings its weights; leave config.pretraining.steps at 0")


def _check_execution(plan: Plan) -> None:
    mapped = plan.mapped
    choose(PRECISIONS, mapped.precision, "config.execution.precision")
    if mapped.mode != "auto":
        make_execution(mapped.mode, mapped.chunk, mapped.num_devices)
    elif mapped.chunk is not None:
        raise InputError(
            f"config.execution.chunk is {mapped.chunk}, which goes with config.execution.mode "
            "chunk; leave it None with auto"
        )
    else:
        make_execution("vmap", None, mapped.num_devices)


def _checked_course(course: Course) -> Course:
    """The course with its defaults filled in, after a check of its counts."""
    every = course.eval_every if course.checkpoint_every is None else course.checkpoint_every
    course = course._replace(checkpoint_every=every)
    for name in ("num_rounds", "eval_every", "checkpoint_every", "evaluation_batch_size"):
        if getattr(course, name) < 1:
            raise InputError(f"config.{name} is {getattr(course, name)}; give at least 1")
    if every % course.eval_every:
        raise InputError(
            f"config.checkpoint_every is {every}, which is no multiple of config.eval_every "
            f"({course.eval_every}); the state is on the host only at evaluations"
        )
    if not course.seeds or len(set(course.seeds)) != len(course.seeds):
        raise InputError(f"config.seeds is {course.seeds}; give at least one, all different")
    return course


def is_dual(plan: Plan) -> bool:
    """Whether its clients pass over single examples, as methods in the dual do."""
    return "loss" in plan.takes


def _check_systems(plan: Plan) -> None:
    systems = plan.systems
    if systems.of_smallest and not systems.limited:
        raise InputError(
            "config.systems.of_smallest says whose share a budget is; set low and high below 1 too"
        )
    if systems.of_smallest and not is_dual(plan):
        raise InputError(
            f"config.systems.of_smallest is for methods in the dual; {plan.name} has shares of "
            "each client's own planned steps, leave it False"
        )
    in_lock_step = "model" in plan.takes and CutModel in plan.algorithm.parameters["model"].choices
    if systems.limited and in_lock_step:
        raise InputError(
            f"the clients of {plan.name} go in lock step, so that nobody can do less; leave "
            "config.systems.low and high at 1"
        )
