"""A run's metrics as rows, and what a summary makes of them."""

from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.outputs import answers, comparisons, workdir
from fedjax_mtl import Block, summarise_clients, tasks
from fedjax_mtl.data.problem import Generation, Problem
from fedjax_mtl.rounds.infos import describe_info


class Judged(NamedTuple):
    """What an entry of an evaluation is about: a split of clients, their task, their test sizes."""

    split: str
    task: workdir.JudgedTask
    sizes: np.ndarray


def judged(problem: Problem) -> dict[str, Judged]:
    """The entries that :func:`make_evaluation` returns."""
    of_group = {task.group: task for task in _group_tasks(problem)}
    entries = {}
    for name, group in problem.groups.items():
        task = of_group[name if problem.grouped else None]
        tests = {"train_clients": group.splits.test, "unseen_clients": group.splits.unseen_test}
        for split, test in tests.items():
            if test is not None:
                entry = f"{split}/{name}" if problem.grouped else split
                entries[entry] = Judged(split, task, np.asarray(test.sizes))
    return entries


def _group_tasks(problem: Problem) -> list[workdir.JudgedTask]:
    return [
        workdir.JudgedTask(
            own.task.name, tasks.describe(own.task), name if problem.grouped else None
        )
        for name, own in problem.groups.items()
    ]


def judged_tasks(problem: Problem) -> list[workdir.JudgedTask]:
    """All that a run's rows about clients can be on, for its ``tasks.json``."""
    own = _group_tasks(problem)
    return own if problem.generation is None else [*own, answers.TASK]


def rows_of(
    block: Block,
    seeds: tuple[int, ...],
    about: dict[str, Judged],
    per_client: bool,
    stage: str | None = None,
) -> list[dict[str, Any]]:
    """The metrics of a block as rows, in an order that is always the same.

    Of a round's info only scalars are logged, as means over the rounds of the block; rounds that
    nobody attended enter none.

    Args:
        block: what the simulation yielded.
        seeds: of the block's leading axis.
        about: what the entries of its evaluation are about, see :func:`judged`.
        per_client: whether every client gets a row of its own too.
        stage: the name of the block's stage; None in a run that has one.
    """
    evaluation, history = jax.device_get((block.evaluation, block.metrics))
    rows = []
    for index, seed in enumerate(seeds):
        head: dict[str, Any] = {"round": block.round, "seed": seed}
        head |= {} if stage is None else {"stage": stage}
        scalars = {name: values[index] for name, values in history.items() if values.ndim == 2}
        if scalars:
            means = {name: _mean_of_rounds(values) for name, values in sorted(scalars.items())}
            rows.append({**head, "split": "server", **means})
        for entry in sorted(evaluation):
            of = about[entry]
            own = {name: values[index] for name, values in sorted(evaluation[entry].items())}
            summary = summarise_clients(own, of.sizes, of.task.metrics)
            named = {"split": of.split, "task": of.task.name}
            named |= {} if of.task.group is None else {"group": of.task.group}
            rows.append({**head, **named, **{k: float(v) for k, v in summary.items()}})
            if per_client:
                rows += [
                    {**head, **named, "client": c, **{k: float(v[c]) for k, v in own.items()}}
                    for c in range(len(of.sizes))
                ]
    return rows


def _mean_of_rounds(values: np.ndarray) -> float:
    """The mean over those rounds of a block that have a value; NaN where none has."""
    there = values[~np.isnan(values)]
    return float(np.mean(there)) if len(there) else float("nan")


def answer_rows(
    round_index: int, asked: Generation, scores: dict[int, np.ndarray]
) -> list[dict[str, Any]]:
    """ROUGE-L of the clients' answers as rows, by seed: over clients, and client by client."""
    sizes = np.asarray(asked.federation.sizes)
    rows = []
    for seed, values in scores.items():
        head = {"round": round_index, "seed": seed, "split": "train_clients"}
        head["task"] = answers.TASK.name
        summary = summarise_clients({"rouge_l": values}, sizes, answers.TASK.metrics)
        rows.append({**head, **{name: float(value) for name, value in summary.items()}})
        rows += [{**head, "client": c, "rouge_l": float(value)} for c, value in enumerate(values)]
    return rows


def summarise(
    rows: list[dict[str, Any]], seeds: tuple[int, ...], descriptions: dict[str, tasks.Description]
) -> dict[str, Any]:
    """Per split and metric: the final value of every seed, final and best mean and std over seeds.

    Best is the best mean over rounds. A number of which nobody says whether more or less of it is
    better has none.

    Args:
        rows: of the whole run.
        seeds: in the order of the values.
        descriptions: how the values about clients are to be read; see ``workdir.describe_metrics``.
    """
    table: dict[str, dict[str, dict[int, dict[int, float]]]] = {}
    for row in rows:
        if "client" in row:
            continue
        for name, value in row.items():
            if name in ("round", "seed", "stage", "split", "task", "group"):
                continue
            full = workdir.full_name(name, row.get("group"))
            by_round = table.setdefault(row["split"], {}).setdefault(full, {})
            by_round.setdefault(row["round"], {})[row["seed"]] = value
    summary: dict[str, Any] = {}
    for split, metrics in table.items():
        for name, by_round in metrics.items():
            rounds = sorted(by_round)
            values = np.array([[by_round[r][s] for s in seeds] for r in rounds])
            means = values.mean(axis=1)
            entry = {
                "final": values[-1].tolist(),
                "final_mean": float(means[-1]),
                "final_std": float(values[-1].std()),
            }
            described = describe_info(name) if split == "server" else descriptions.get(name)
            if described is not None and not np.isnan(means).all():
                better = np.nanargmax if described.higher_is_better else np.nanargmin
                best = int(better(means))
                entry["best_mean"] = float(means[best])
                entry["best_std"] = float(values[best].std())
                entry["best_round"] = rounds[best]
            summary.setdefault(split, {})[name] = entry
    return summary


def shown(
    rows: list[dict[str, Any]], descriptions: dict[str, tasks.Description]
) -> dict[str, float]:
    """What the progress bar shows, means over seeds and groups.

    That is each primary metric of the training clients and their loss. Of clients with one task
    and without groups it is also the metric's bottom decile, and its value for held-out clients.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        if "client" in row or row["split"] == "server":
            continue
        primary = comparisons.primary_metrics(row, descriptions)
        alone = len(primary) == 1 and "group" not in row
        if row["split"] == "unseen_clients":
            wanted = {"unseen": primary[0]} if alone else {}
        else:
            wanted = {name: name for name in primary}
            wanted |= {"decile": f"{primary[0]}_bottom_decile"} if alone else {}
            wanted["loss"] = "loss"
        for label, name in wanted.items():
            if name in row:
                values.setdefault(label, []).append(row[name])
    return {label: float(np.mean(each)) for label, each in values.items()}
