"""One config -> one work directory: metrics, summary, curves, TensorBoard events, checkpoints.

    python -m experiments.run --config=configs/fedem_digits.py --workdir=runs/fedem \\
        --config.client.batch_size=16

Started again on the same directory it goes on where it was, and ends with the same numbers, bit for
bit.
"""

import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import assembly
from experiments.outputs import answers, metric_rows, plots, telemetry, workdir
from experiments.outputs.progress import Progress
from experiments.outputs.stages import StageCheckpoints, as_stages, begin, ends, stage_name
from experiments.plan import PRECISIONS, Plan, make_plan
from fedjax_mtl import (
    Algorithm,
    Execution,
    Stage,
    evaluate_clients,
    models,
    simulate_blocks,
)
from fedjax_mtl.core import sampling
from fedjax_mtl.core.algorithm import ByGroup
from fedjax_mtl.data.problem import Problem
from fedjax_mtl.simulation import stage_of

PyTree = Any


def make_evaluation(problem: Problem, execution: Execution, batch_size: int) -> Callable[..., Any]:
    """``(algorithm, state, splits, key) -> {split: {metric: [clients]}}``, on clients' test data.

    Training clients are judged as they are (after tuning, where that is the algorithm); held-out
    clients after ``adapt`` on their own training data. Splits of clients that come in groups are
    called ``<split>/<group>``.

    Args:
        problem: what is learned; its ``splits`` are what the evaluation takes.
        execution: how clients are mapped.
        batch_size: rows of a client that are judged at once.
    """

    def evaluate(
        algorithm: Algorithm, state: PyTree, splits: PyTree, key: jax.Array
    ) -> dict[str, dict[str, jax.Array]]:
        judge = evaluate_clients(algorithm, problem.task, execution, batch_size)
        served = algorithm.adapt(state, splits.train, key) if algorithm.tuned else state
        found = {"train_clients": judge(served, splits.test)}
        if splits.unseen_train is not None:
            adapted = algorithm.adapt(state, splits.unseen_train, key)
            found["unseen_clients"] = judge(adapted, splits.unseen_test)
        if not problem.grouped:
            return found
        return {
            f"{split}/{name}": own
            for split, groups in found.items()
            for name, own in groups.items()
        }

    return evaluate


class Prepared(NamedTuple):
    """A run that has been checked; nothing is written, trained or loaded yet but its data.

    Attributes:
        plan: what its config says.
        problem: what it learns.
        stages: how; one for an algorithm alone.
        execution: how clients are mapped.
        sampler: who takes part in a round.
    """

    plan: Plan
    problem: Problem
    stages: list[Stage]
    execution: Execution
    sampler: sampling.Sampler | sampling.PopulationSampler


class Made:
    """What several runs of one sweep share: data sets and base models, each made once."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def problem(self, plan: Plan) -> Problem:
        """The data of a plan."""
        said = {"data": plan.settings["data"], "steps": plan.pretraining.values["steps"] > 0}
        return self._once(plan, said, lambda: assembly.make_problem(plan))

    def base(self, plan: Plan, problem: Problem) -> PyTree | None:
        """The frozen weights under adapters, or None."""
        said = {name: plan.settings[name] for name in ("data", "pretraining")}
        said["model"] = {k: v for k, v in plan.settings["model"].items() if k != "adapters"}
        if plan.adapters is None:
            return None
        return self._once(plan, said, lambda: assembly.make_base(plan, problem))

    def _once(self, plan: Plan, said: dict[str, Any], make: Callable[[], Any]) -> Any:
        key = json.dumps([plan.mapped.precision, said], sort_keys=True)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _precision(plan: Plan) -> contextlib.AbstractContextManager[None]:
    return jax.enable_x64(PRECISIONS[plan.mapped.precision])


def prepare(plan: Plan, made: Made) -> Prepared:
    """Builds all objects of a run and traces one round.

    That finds whatever can be wrong before anything is written.

    Args:
        plan: what the config says.
        made: data that other runs have loaded.

    Raises:
        InputError: something that does not fit, naming the field and the remedy.
        FileNotFoundError: a file that is not there.
    """
    with _precision(plan):
        problem = made.problem(plan)
        made_of, execution = assembly.make_algorithm(plan, problem)
        stages = as_stages(made_of, plan.course.num_rounds)
        algorithm, _ = stages[0].build(None)
        train: ByGroup = problem.splits.train
        sampler = assembly.make_sampler(plan, problem.num_clients)

        def first_round(key: jax.Array) -> PyTree:
            return algorithm.round(algorithm.init(key), sampler(key, 0, train), key)

        jax.eval_shape(first_round, jax.random.key(0))
        if problem.generation is not None:
            state = jax.eval_shape(algorithm.init, jax.random.key(0))
            jax.eval_shape(answers.make_generation(plan, problem), state)
    return Prepared(plan, problem, stages, execution, sampler)


def with_base(state: PyTree, base: PyTree) -> PyTree:
    """A first state with a base model's weights in it."""
    return state._replace(params=models.adapters.load_base(state.params, base))


def run(config: Any, directory: pathlib.Path) -> dict[str, Any]:
    """Runs a config to its end in a directory, in the precision it asks for; returns its summary.

    Raises:
        InputError: bad fields, or a directory of another config.
        FileNotFoundError: a file that is not there.
        FloatingPointError: training diverged.
        DamagedCheckpoint: a checkpoint that cannot be read.
    """
    plan, made = make_plan(config), Made()
    workdir.check(directory, plan.settings)
    return run_prepared(prepare(plan, made), made, directory)


def run_prepared(prepared: Prepared, made: Made, directory: pathlib.Path) -> dict[str, Any]:
    """Runs what has been prepared to its end, as :func:`run`."""
    with _precision(prepared.plan):
        return _run(prepared, made, directory)


def _run(prepared: Prepared, made: Made, directory: pathlib.Path) -> dict[str, Any]:
    plan, problem, stages, execution, sampler = prepared
    course, seeds = plan.course, plan.course.seeds
    workdir.claim(directory, plan.settings)
    workdir.write_tasks(directory, metric_rows.judged_tasks(problem))
    descriptions = workdir.describe_metrics(metric_rows.judged_tasks(problem))

    # --- Resume.
    started = time.perf_counter()
    checkpoints = StageCheckpoints(directory, stages, len(seeds))
    done, state, previous, spent = checkpoints.take_up()
    # A checkpoint holds a base model's weights too.
    base = made.base(plan, problem) if done is None else None
    metrics = workdir.MetricsFile(directory / "metrics.jsonl", -1 if done is None else done)
    events = telemetry.Events(directory, -1 if done is None else done)
    compile_clock = telemetry.CompileClock()

    def elapsed() -> dict[str, float]:
        return {
            "wall_seconds": spent["wall_seconds"] + time.perf_counter() - started,
            "compile_seconds": spent["compile_seconds"] + compile_clock.seconds(),
        }

    # --- Rounds.
    blocks = simulate_blocks(
        stages,
        problem.splits.train,
        num_rounds=course.num_rounds,
        seeds=seeds,
        sampler=sampler,
        evaluate=make_evaluation(problem, execution, course.evaluation_batch_size),
        evaluation_data=problem.splits,
        eval_every=course.eval_every,
        initial=None if base is None else functools.partial(with_base, base=base),
        state=state,
        start_round=done or 0,
        previous=previous,
    )
    algorithm, shapes = begin(stages[stage_of(stages, done or 0)[0]], previous, len(seeds))
    about = metric_rows.judged(problem)
    checkpoint_every = course.checkpoint_every or course.eval_every
    with Progress(plan.name, course.num_rounds, done or 0) as progress:
        for block in blocks:
            last = block.round == course.num_rounds
            of_stage = stage_name(stages, block.stage) if len(stages) > 1 else None
            rows = metric_rows.rows_of(block, seeds, about, last, of_stage)
            if last and problem.generation is not None:
                scores = answers.score(plan, problem, block.state, seeds, directory)
                rows += metric_rows.answer_rows(block.round, problem.generation, scores)
            workdir.check_finite(rows)
            metrics.write(rows)
            events.write(rows)
            if block.round % checkpoint_every == 0 or block.round in ends(stages):
                checkpoints.save(block.round, block.state, elapsed())
            algorithm = block.algorithm or algorithm
            shapes = jax.eval_shape(lambda x: x, block.state)
            progress.show(block.round, metric_rows.shown(rows, descriptions))

    # --- Summary.
    checkpoints.close()
    events.close()
    rows = list(workdir.read_rows(directory / "metrics.jsonl"))
    one_run = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    up, down = algorithm.traffic(one_run)
    clients = assembly.clients_a_round(plan, problem)
    times = elapsed()
    steady = max(times["wall_seconds"] - times["compile_seconds"], 1e-9)
    summary = {
        "algorithm": plan.name,
        "num_rounds": course.num_rounds,
        "seeds": list(seeds),
        **_describe_stages(stages),
        "metrics": metric_rows.summarise(rows, seeds, descriptions),
        **times,
        "rounds_per_second": course.num_rounds / steady,  # of all seeds at once
        "bytes_up_per_round": up * clients,
        "bytes_down_per_round": down * clients,
        "execution": {"mode": execution.mode, "chunk": execution.chunk},
        **telemetry.environment(),
    }
    workdir.write_json(directory / "summary.json", summary)
    plots.curves({plan.name: rows}, descriptions, directory / "curves")
    return summary


def _describe_stages(stages: list[Stage]) -> dict[str, Any]:
    """Of a run of several stages, their names and rounds."""
    if len(stages) == 1:
        return {}
    named = [
        {"name": stage_name(stages, index), "rounds": stage.rounds}
        for index, stage in enumerate(stages)
    ]
    return {"stages": named}


_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, e.g. configs/fedem_digits.py:quick"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results go; an interrupted run there is continued"
)


def main(argv: list[str]) -> None:
    """Flags only; see :func:`run`."""
    logging.set_verbosity(logging.WARNING)  # orbax narrates every save
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected arguments {argv[1:]}; settings look like --config.num_rounds=10"
        )
    directory = pathlib.Path(cast(str, _WORKDIR.value))  # the flag is required
    telemetry.exit_on_bad_input(lambda: run(_CONFIG.value, directory))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=telemetry.parse_flags)
