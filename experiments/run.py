"""One config -> one work directory: metrics, summary, curves, TensorBoard events, checkpoints.

    python -m experiments.run --config=configs/fedem_digits.py --workdir=runs/fedem [--config.client.batch_size=16 ...]

Started again on the same directory it goes on where it was, and ends with the same numbers, bit for bit.
"""

import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import build
from experiments.outputs import answers, plots, telemetry, workdir
from experiments.outputs.checkpoints import Checkpoints
from experiments.outputs.progress import Progress
from experiments.problems.base import PopulationProblem
from experiments.settings import choose
from fedjax_mtl import (
    Algorithm,
    Execution,
    Splits,
    evaluate_clients,
    evaluate_population,
    models,
    simulate_blocks,
    summarise_clients,
    tasks,
)
from fedjax_mtl.core import sampling
from fedjax_mtl.simulate import num_clients

PyTree = Any

# What the progress bar and the final line show.
_SHOWN = ("error", "rmse", "accuracy", "accuracy_bottom_decile", "normalised_error", "loss")


def make_evaluation(problem: build.Problem, execution: Execution, batch_size: int):
    """``(algorithm, state, splits, key) -> {split: {metric: [clients]}}``, on each client's test data.

    Training clients are judged as they are (after tuning, where that is the algorithm); held-out clients after ``adapt`` on their own
    training data.
    """

    def evaluate_groups(algorithm, state, splits, key):
        del key
        judge = evaluate_population(algorithm, problem.tasks, execution, batch_size)
        return {f"train_clients/{name}": own for name, own in judge(state, splits.test).items()}

    def evaluate(
        algorithm: Algorithm, state: PyTree, splits: Splits, key: jax.Array
    ) -> dict[str, dict[str, jax.Array]]:
        judge = evaluate_clients(algorithm, problem.task, execution, batch_size)
        served = algorithm.adapt(state, splits.train, key) if algorithm.tuned else state
        results = {"train_clients": judge(served, splits.test)}
        if splits.unseen_train is not None:
            adapted = algorithm.adapt(state, splits.unseen_train, key)
            results["unseen_clients"] = judge(adapted, splits.unseen_test)
        return results

    return evaluate_groups if isinstance(problem, PopulationProblem) else evaluate


class Judged(NamedTuple):
    """What an entry of an evaluation is about: a split of clients, of one group (or ``None``), their task and test sizes."""

    split: str
    group: str | None
    task: str
    sizes: np.ndarray


def judged(problem: build.Problem | PopulationProblem) -> dict[str, Judged]:
    """The entries that :func:`make_evaluation` returns."""
    splits = problem.splits
    if isinstance(problem, PopulationProblem):
        return {
            f"train_clients/{name}": Judged(
                "train_clients", name, problem.tasks[name].name, np.asarray(own.sizes)
            )
            for name, own in splits.test.items()
        }
    entries = {
        "train_clients": Judged(
            "train_clients", None, problem.task.name, np.asarray(splits.test.sizes)
        )
    }
    if splits.unseen_test is not None:
        sizes = np.asarray(splits.unseen_test.sizes)
        entries["unseen_clients"] = Judged("unseen_clients", None, problem.task.name, sizes)
    return entries


def rows_of(
    block, seeds: tuple[int, ...], about: dict[str, Judged], per_client: bool
) -> list[dict[str, Any]]:
    """The metrics of a block as rows, in an order that is always the same."""
    evaluation, history = jax.device_get((block.evaluation, block.metrics))
    rows = []
    for index, seed in enumerate(seeds):
        head = {"round": block.round, "seed": seed}
        if history:
            means = {
                name: float(np.mean(values[index])) for name, values in sorted(history.items())
            }
            rows.append({**head, "split": "server", **means})
        for entry in sorted(evaluation):
            of = about[entry]
            own = {name: values[index] for name, values in sorted(evaluation[entry].items())}
            summary = summarise_clients(own, of.sizes)
            named = {"split": of.split, "task": of.task} | ({"group": of.group} if of.group else {})
            rows.append({**head, **named, **{k: float(v) for k, v in summary.items()}})
            if per_client:
                rows += [
                    {**head, **named, "client": c, **{k: float(v[c]) for k, v in own.items()}}
                    for c in range(len(of.sizes))
                ]
    return rows


def answer_rows(
    round_index: int, problem: build.Problem, scores: dict[int, np.ndarray]
) -> list[dict[str, Any]]:
    """ROUGE-L of the clients' answers as rows, by seed: over clients, and client by client."""
    sizes = np.asarray(problem.generation.federation.sizes)
    rows = []
    for seed, values in scores.items():
        head = {"round": round_index, "seed": seed, "split": "train_clients", "task": "answers"}
        summary = summarise_clients({"rouge_l": values}, sizes)
        rows.append({**head, **{name: float(value) for name, value in summary.items()}})
        rows += [{**head, "client": c, "rouge_l": float(value)} for c, value in enumerate(values)]
    return rows


def summarise(rows: list[dict[str, Any]], seeds: tuple[int, ...]) -> dict[str, Any]:
    """Per split and metric (``<group>/<metric>`` where there are groups): the final value of every seed, final and best mean and std over seeds.

    Best is the best mean over rounds: the highest, for losses and errors the lowest.
    """
    table: dict[str, dict[str, dict[int, dict[int, float]]]] = {}
    for row in rows:
        if "client" in row:
            continue
        for name, value in row.items():
            if name in ("round", "seed", "split", "task", "group"):
                continue
            full = f"{row['group']}/{name}" if "group" in row else name
            by_round = table.setdefault(row["split"], {}).setdefault(full, {})
            by_round.setdefault(row["round"], {})[row["seed"]] = value
    summary: dict[str, Any] = {}
    for split, metrics in table.items():
        for name, by_round in metrics.items():
            rounds = sorted(by_round)
            values = np.array([[by_round[r][s] for s in seeds] for r in rounds])
            means = values.mean(axis=1)
            best = int(np.argmin(means) if tasks.lower_is_better(name) else np.argmax(means))
            summary.setdefault(split, {})[name] = {
                "final": values[-1].tolist(),
                "final_mean": float(means[-1]),
                "final_std": float(values[-1].std()),
                "best_mean": float(means[best]),
                "best_std": float(values[best].std()),
                "best_round": rounds[best],
            }
    return summary


class Prepared(NamedTuple):
    """A run that has been checked: its data, algorithm, execution, sampler, and what puts a base model's weights into its first state (or None)."""

    problem: build.Problem | PopulationProblem
    algorithm: Algorithm
    execution: Execution
    sampler: sampling.Sampler | sampling.PopulationSampler
    initial: Callable[[PyTree], PyTree] | None


def prepare(config: ml_collections.ConfigDict, fresh: bool = True) -> Prepared:
    """Builds all objects of a run and traces one round, which finds whatever can be wrong before anything is written.

    Args:
        fresh: False for a run that will be taken up from a checkpoint, which holds a base model's weights already.

    Raises:
        ValueError, FileNotFoundError: naming the field and the remedy.
    """
    build.check_fields(config)
    check_counts(config)
    problem = build.make_problem(config)
    algorithm, execution = build.make_algorithm(config, problem)
    train = problem.splits.train
    sampler = build.make_sampler(config, num_clients(train))

    def first_round(key):
        return algorithm.round(algorithm.init(key), sampler(key, 0, train), key)

    jax.eval_shape(first_round, jax.random.key(0))
    if getattr(problem, "generation", None) is not None:
        jax.eval_shape(
            answers.make_generation(config, problem),
            jax.eval_shape(algorithm.init, jax.random.key(0)),
        )
    base = build.make_base(config, problem) if fresh else None
    initial = None
    if base is not None:

        def initial(state):
            return state._replace(params=models.adapters.load_base(state.params, base))

        jax.eval_shape(initial, initial_shapes(algorithm, 1))
    return Prepared(problem, algorithm, execution, sampler, initial)


PRECISIONS = {"single": False, "double": True}


def run(config: ml_collections.ConfigDict, directory: pathlib.Path) -> dict[str, Any]:
    """Runs a config to its end in a directory, in the precision it asks for, and returns its summary.

    Raises:
        ValueError: bad fields, or a directory of another config. FloatingPointError: training diverged. RuntimeError: a damaged checkpoint.
    """
    build.check_fields(config)
    double = choose(PRECISIONS, config.execution.precision, "config.execution.precision")
    with jax.enable_x64(double):
        return _run(ml_collections.FrozenConfigDict(config), directory)


def _run(config: ml_collections.FrozenConfigDict, directory: pathlib.Path) -> dict[str, Any]:
    fresh = not any((directory / "checkpoints").glob("*"))
    problem, algorithm, execution, sampler, initial = prepare(config, fresh)
    seeds = tuple(config.seeds)
    workdir.claim(directory, config)

    # --- Resume.
    started = time.perf_counter()
    checkpoints = Checkpoints(directory / "checkpoints")
    done = checkpoints.latest_round()
    state, spent = None, {"wall_seconds": 0.0, "compile_seconds": 0.0}
    if done is None and not fresh:
        initial = prepare(config).initial  # interrupted before its first checkpoint was whole
    if done is not None:
        state, spent = checkpoints.restore(done, initial_shapes(algorithm, len(seeds)))
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
        algorithm,
        problem.splits.train,
        num_rounds=config.num_rounds,
        seeds=seeds,
        sampler=sampler,
        evaluate=make_evaluation(problem, execution, config.evaluation_batch_size),
        evaluation_data=problem.splits,
        eval_every=config.eval_every,
        initial=initial,
        state=state,
        start_round=done or 0,
    )
    shapes = initial_shapes(algorithm, 1)
    one_run = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    about = judged(problem)
    with Progress(config.algorithm.name, config.num_rounds, done or 0) as progress:
        for block in blocks:
            last = block.round == config.num_rounds
            rows = rows_of(block, seeds, about, per_client=last)
            if last and getattr(problem, "generation", None) is not None:
                scores = answers.score(config, problem, block.state, seeds, directory)
                rows += answer_rows(block.round, problem, scores)
            workdir.check_finite(rows)
            metrics.write(rows)
            events.write(rows)
            if last or block.round % config.checkpoint_every == 0:
                checkpoints.save(block.round, block.state, elapsed())
            progress.show(block.round, shown(rows))

    # --- Summary.
    checkpoints.close()
    events.close()
    rows = list(workdir.read_rows(directory / "metrics.jsonl"))
    up, down = algorithm.traffic(one_run)
    clients = build.cohort_size(config, num_clients(problem.splits.train))
    times = elapsed()
    steady = max(times["wall_seconds"] - times["compile_seconds"], 1e-9)
    summary = {
        "algorithm": config.algorithm.name,
        "num_rounds": config.num_rounds,
        "seeds": list(seeds),
        "metrics": summarise(rows, seeds),
        **times,
        "rounds_per_second": config.num_rounds / steady,  # of all seeds at once
        "bytes_up_per_round": up * clients,
        "bytes_down_per_round": down * clients,
        "execution": {"mode": execution.mode, "chunk": execution.chunk},
        **telemetry.environment(),
    }
    workdir.write_json(directory / "summary.json", summary)
    plots.curves({config.algorithm.name: rows}, directory / "curves")
    return summary


def check_counts(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for counts that make no sense."""
    for name in ("num_rounds", "eval_every", "checkpoint_every", "evaluation_batch_size"):
        if config[name] < 1:
            raise ValueError(f"config.{name} is {config[name]}; give at least 1")
    if config.checkpoint_every % config.eval_every:
        raise ValueError(
            f"config.checkpoint_every is {config.checkpoint_every}, which is no multiple of config.eval_every "
            f"({config.eval_every}); the state is on the host only at evaluations"
        )
    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        raise ValueError(f"config.seeds is {tuple(config.seeds)}; give at least one, all different")


def initial_shapes(algorithm: Algorithm, num_seeds: int) -> PyTree:
    """The shapes of a run's state, with a leading axis of seeds."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_seeds))
    return jax.eval_shape(jax.vmap(algorithm.init), keys)


def shown(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds of what the progress bar shows: of the training clients, and the held-out clients' accuracy."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if "client" in row or row["split"] == "server":
            continue
        if row["split"] == "train_clients":
            for name in _SHOWN:
                if name in row:
                    values.setdefault(name, []).append(row[name])
        elif "accuracy" in row:
            values.setdefault("unseen_accuracy", []).append(row["accuracy"])
    return {name: float(np.mean(each)) for name, each in values.items()}


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
    telemetry.exit_on_bad_input(lambda: run(_CONFIG.value, pathlib.Path(_WORKDIR.value)))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=telemetry.parse_flags)
