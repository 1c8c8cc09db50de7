"""Comparisons of runs seed by seed: improvement over a reference, rounds to a target."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from fedjax_mtl import tasks

# The metric by which a task is compared, the first of these that it has.
PRIMARY = ("accuracy", "miou", "max_f", "rmse", "angle_error", "pixel_loss", "normalised_error")

Rows = list[dict[str, Any]]


def _judged(rows: Rows) -> Iterable[dict[str, Any]]:
    return (row for row in rows if row["split"] == "train_clients" and "client" not in row)


def primary_metrics(row: dict[str, Any]) -> dict[str, str]:
    """Of a metrics row, the metric of each task (``""`` where the row has one task) by which it is compared."""
    chosen: dict[str, str] = {}
    for metric in PRIMARY:
        for name in row:
            task, _, last = name.rpartition("/")
            if last == metric:
                chosen.setdefault(task, name)
    return chosen


def values_by_task(rows: Rows) -> dict[tuple[int, Any], dict[str, float]]:
    """``(round, seed) -> {group/metric: mean over the group's clients}`` of the primary metrics."""
    found: dict[tuple[int, Any], dict[str, float]] = {}
    for row in _judged(rows):
        values = found.setdefault((row["round"], row["seed"]), {})
        for name in primary_metrics(row).values():
            values[f"{row.get('group', '')}/{name}"] = row[name]
    return found


def improvements(rows: Rows, reference: Rows) -> dict[int, list[float]]:
    """Delta_m in percent over the reference at its last round, by round: one number a seed (see ``tasks.average_improvement``).

    Tasks of one group count as its mean.

    Raises:
        ValueError: the reference lacks a seed or a task.
    """
    base = values_by_task(reference)
    last = max(number for number, _ in base)
    by_round: dict[int, list[float]] = {}
    for (number, seed), values in sorted(
        values_by_task(rows).items(), key=lambda item: str(item[0])
    ):
        against = base.get((last, seed))
        if against is None or set(against) != set(values):
            raise ValueError(
                f"the reference has no run of seed {seed} with the same tasks at round {last}"
            )
        names = sorted(values)
        total, _ = tasks.average_improvement(
            [values[n] for n in names],
            [against[n] for n in names],
            [tasks.lower_is_better(n) for n in names],
        )
        by_round.setdefault(number, []).append(total)
    return dict(sorted(by_round.items()))


def rounds_to(rows: Rows, metric: str, target: float) -> list[float]:
    """The first round at which the metric of the training clients reaches the target, one number a seed; infinity where it never does.

    Raises:
        ValueError: no row has the metric.
    """
    reached: dict[Any, float] = {}
    for row in _judged(rows):
        if metric not in row:
            continue
        good = row[metric] <= target if tasks.lower_is_better(metric) else row[metric] >= target
        before = reached.setdefault(row["seed"], np.inf)
        if good:
            reached[row["seed"]] = min(before, row["round"])
    if not reached:
        raise ValueError(f"no evaluation of the training clients has the metric {metric!r}")
    return list(reached.values())
