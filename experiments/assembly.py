"""Builds what a plan says: data, models, algorithm, sampler, base weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.plan import OPTIMIZER_FIELDS, PLAN_FIELDS, Plan, is_dual
from fedjax_mtl import Execution, default_execution, make_execution, models
from fedjax_mtl.clients.solvers import make_optimizer, make_plan, make_schedule, make_solver
from fedjax_mtl.core import sampling
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.data.problem import ALONE, Problem, ProblemGroup
from fedjax_mtl.models import entries, pretrained
from fedjax_mtl.models.cut import CutModel

PyTree = Any


def _describe_group(group: ProblemGroup) -> dict[str, Any]:
    """What a model for the clients of one group can ask for."""
    shape = group.input_shape
    known: dict[str, Any] = {"input_shape": shape, "image_shape": shape}
    if len(shape) == 1:
        known |= {"features": shape[0], "length": shape[0]}
    if isinstance(group.outputs, int):
        known |= {"outputs": group.outputs, "vocabulary": group.outputs}
    else:
        known["tasks"] = group.outputs
    return known if group.num_heads is None else known | {"num_heads": group.num_heads}


def make_models(plan: Plan, problem: Problem) -> Any:
    """The model of ``config.model``: one, one for each group, or a CutModel, without adapters.

    Raises:
        InputError: a model that does not fit the data.
    """
    named = {
        name: own.outputs
        for name, own in problem.groups.items()
        if not isinstance(own.outputs, int)
    }
    blocks = tuple(sorted({task for own in named.values() for task in own}))
    common: dict[str, Any] = {"code_blocks": blocks}
    if "outputs_by_group" in plan.model.parameters:
        shape = next(iter(problem.groups.values())).input_shape
        if named and problem.grouped:
            common["outputs_by_group"] = named
        return plan.model.call({**common, "input_shape": shape})
    if "num_heads" not in plan.model.parameters:
        for name, group in problem.groups.items():
            if group.num_heads is not None:
                raise InputError(
                    f"the clients of group {name!r} need a model with a head for each of them; use "
                    "--config.model.name=many_heads"
                )
    return problem.plain(
        {
            name: plan.model.call({**common, **_describe_group(group)})
            for name, group in problem.groups.items()
        }
    )


def _adapted(plan: Plan, model: Any, finish: Callable[[Any], Any]) -> Any:
    """The models as the algorithm takes them, with adapters if the algorithm trains adapters."""
    wants_cut = CutModel in plan.algorithm.parameters["model"].choices
    if wants_cut != isinstance(model, CutModel):
        if wants_cut:
            raise InputError(
                f"{plan.name!r} needs a model that can be cut; use --config.model.name=cut"
            )
        model = model.models
    if plan.adapters is None:
        return model
    if not isinstance(model, models.LanguageModel):
        raise InputError(
            f"{plan.name!r} tunes a language model; use config.model.name transformer or checkpoint"
        )
    return finish(plan.adapters.call({"model": model}))


def make_base(plan: Plan, problem: Problem) -> PyTree | None:
    """The frozen weights under adapters: a checkpoint's, or trained on data for that; or None."""
    if plan.adapters is None:
        return None
    if plan.model.name == "checkpoint":
        directory = plan.model.values["directory"]
        return pretrained.load_safetensors(
            directory, pretrained.from_hugging_face_config(directory)
        )
    if not plan.pretraining.values["steps"]:
        return None
    return plan.pretraining.call(
        {
            "model": make_models(plan, problem),
            "task": problem.task,
            "examples": problem.pretraining,
        }
    )


def _training(plan: Plan) -> dict[str, Any]:
    """The objects that the algorithm takes from the client's settings, such as a solver."""
    client, num_rounds = plan.client, plan.course.num_rounds
    makers: dict[str, Callable[[], Any]] = {
        "solver": lambda: make_solver(**client, num_rounds=num_rounds),
        "optimizer": lambda: make_optimizer(**{field: client[field] for field in OPTIMIZER_FIELDS}),
        "plan": lambda: make_plan(**{field: client[field] for field in PLAN_FIELDS}),
        "batch_size": lambda: client["batch_size"],
        "schedule": lambda: make_schedule(client["schedule"], num_rounds),
    }
    return {name: make() for name, make in makers.items() if name in plan.takes}


def make_problem(plan: Plan) -> Problem:
    """Loads and federates the data.

    Raises:
        InputError: data without anything to pre-train on where that was asked for.
        FileNotFoundError: files that are not there.
    """
    problem = plan.data.call({})
    if plan.pretraining.values["steps"] and problem.pretraining is None:
        raise InputError(
            "these data have nothing to pre-train on; set config.pretraining.steps to 0"
        )
    return problem


def make_algorithm(
    plan: Plan, problem: Problem, finish: Callable[[Any], Any] = lambda model: model
) -> tuple[Any, Execution]:
    """The algorithm (or what it returns instead), and how it maps clients.

    Args:
        plan: what the config says.
        problem: what is learned.
        finish: changes a model that has got its adapters, for instance to one that answers.
    """
    model = make_models(plan, problem)
    if "model" in plan.takes:
        model = _adapted(plan, model, finish)
    execution = _execution(plan, model)
    training = _training(plan)
    provided = {
        "model": model,
        "task": problem.task,
        "num_clients": problem.num_clients,
        "execution": execution,
        "dtype": jax.dtypes.canonicalize_dtype(jnp.float64),
        "head": entries.in_head,
        "decoder": entries.in_head,
        "encoder": entries.in_body,
        "representation": entries.in_body,
        "loss": problem.dual_loss,
        **_of_alone(problem),
        **training,
    }
    for_makers = {
        "batch_size": plan.client["batch_size"],
        "federation": None if problem.grouped else problem.splits.train,
        "groups": problem.alike,
        "model": model,
        "num_classes": None if problem.grouped else problem.each("outputs"),
        "num_clients": total_clients(problem),
        "penalty": plan.algorithm.values.get("penalty"),
    }
    return plan.algorithm.call(provided, for_makers), execution


def _of_alone(problem: Problem) -> dict[str, Any]:
    """What is provided to methods that are for clients without groups."""
    if problem.grouped:
        return {}
    train = problem.groups[ALONE].splits.train
    return {
        "sizes": train.sizes,
        "capacity": train.capacity,
        "features": problem.each("input_shape")[0],
        "mixture": train.sizes / jnp.sum(train.sizes),
    }


def total_clients(problem: Problem) -> int:
    """How many clients train, of all groups together."""
    counts = problem.num_clients
    return sum(counts.values()) if isinstance(counts, dict) else counts


def _execution(plan: Plan, model: Any) -> Execution:
    """How clients are mapped; ``auto`` is by platform and the size of the largest model.

    All components and a frozen base count.
    """
    mapped = plan.mapped
    if mapped.mode != "auto":
        return make_execution(mapped.mode, mapped.chunk, mapped.num_devices)
    model = model.models if isinstance(model, CutModel) else model
    components = max(plan.algorithm.values.get("num_components") or 1, 1)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), components))
    shapes = [
        jax.eval_shape(jax.vmap(one.init), keys)
        for one in (model.values() if isinstance(model, dict) else [model])
    ]
    largest = max(shapes, key=lambda params: sum(x.size for x in jax.tree.leaves(params)))
    chosen = default_execution(largest)
    return make_execution(chosen.mode, chosen.chunk, mapped.num_devices)


def make_sampler(
    plan: Plan, num_clients: int | dict[str, int]
) -> sampling.Sampler | sampling.PopulationSampler:
    """Everybody, or some clients a round, with failures and stragglers; of each group likewise."""
    size, systems = plan.course.cohort_size, plan.systems
    if isinstance(num_clients, dict):
        for name, count in num_clients.items():
            _check_cohort(size, count, f"clients of group {name!r} train")
    else:
        _check_cohort(size, num_clients, "clients train")
    sampler = sampling.full_participation() if size is None else sampling.uniform(size)
    if systems.limited and is_dual(plan):
        budget = sampling.fraction_of_data(
            systems.low, systems.high, of_smallest=systems.of_smallest
        )
        sampler = sampling.straggling(sampler, budget)
    elif systems.limited:
        sampler = sampling.partial_work(sampler, systems.low, systems.high)
    if systems.drop_probability:
        sampler = sampling.dropping(sampler, systems.drop_probability)
    return sampling.by_group(sampler) if isinstance(num_clients, dict) else sampler


def _check_cohort(size: int | None, count: int, who: str) -> None:
    if size is not None and not 1 <= size <= count:
        raise InputError(
            f"config.cohort_size is {size} but {count} {who}; give 1..{count}, or None for all"
        )


def clients_a_round(plan: Plan, problem: Problem) -> int:
    """How many clients take part in a round."""
    size = plan.course.cohort_size
    return total_clients(problem) if size is None else size * len(problem.groups)
