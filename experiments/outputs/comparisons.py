"""Comparisons of runs seed by seed: improvement over a reference, rounds to a target."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from experiments.outputs import workdir
from fedjax_mtl import tasks
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.task import SHARE

Rows = list[dict[str, Any]]
Descriptions = Mapping[str, tasks.Description]
"""How the values about clients are to be read; see :func:`workdir.describe_metrics`."""


def merge_descriptions(runs: Iterable[Descriptions]) -> dict[str, tasks.Description]:
    """The descriptions of several runs in one.

    Raises:
        InputError: two runs describe a metric differently, so that they cannot be compared.
    """
    merged: dict[str, tasks.Description] = {}
    for descriptions in runs:
        for name, described in descriptions.items():
            if merged.setdefault(name, described) != described:
                raise InputError(
                    f"two runs describe {name!r} differently, as {tuple(merged[name])} and as "
                    f"{tuple(described)} (higher is better, unit, primary); report them apart"
                )
    return merged


def shown_unit(described: tasks.Description) -> tuple[float, str]:
    """The factor by which a value is multiplied to be shown, and its unit then.

    Shares are shown in percent.
    """
    return (100.0, "%") if described.unit == SHARE else (1.0, described.unit)


def with_unit(text: str, described: tasks.Description) -> str:
    """A heading or the label of an axis: the text, and the unit in brackets where there is one."""
    _, unit = shown_unit(described)
    return f"{text} ({unit})" if unit else text


def primary_metrics(row: Mapping[str, Any], descriptions: Descriptions) -> list[str]:
    """The metrics of a row by which its tasks are compared, one for each task."""
    names = {name: workdir.full_name(name, row.get("group")) for name in row}
    return [
        name for name, full in names.items() if full in descriptions and descriptions[full].primary
    ]


def _judged(rows: Rows) -> Iterable[dict[str, Any]]:
    return (row for row in rows if row["split"] == "train_clients" and "client" not in row)


def values_by_task(
    rows: Rows, descriptions: Descriptions
) -> dict[tuple[int, Any], dict[str, float]]:
    """``(round, seed) -> {metric: mean over the clients}`` of the primary metrics.

    Metrics of groups are called ``<group>/<metric>``.
    """
    found: dict[tuple[int, Any], dict[str, float]] = {}
    for row in _judged(rows):
        values = found.setdefault((row["round"], row["seed"]), {})
        for name in primary_metrics(row, descriptions):
            values[workdir.full_name(name, row.get("group"))] = row[name]
    return found


def improvements(rows: Rows, reference: Rows, descriptions: Descriptions) -> dict[int, list[float]]:
    """Delta_m in percent over the reference at its last round, by round: one number a seed.

    See ``tasks.average_improvement``. The clients of a group that have the same task count as its
    mean.

    Raises:
        InputError: the reference lacks a seed or a task.
    """
    base = values_by_task(reference, descriptions)
    last = max(number for number, _ in base)
    by_round: dict[int, list[float]] = {}
    for (number, seed), values in sorted(
        values_by_task(rows, descriptions).items(), key=lambda item: str(item[0])
    ):
        against = base.get((last, seed))
        if against is None or set(against) != set(values):
            raise InputError(
                f"the reference has no run of seed {seed} with the same tasks at round {last}"
            )
        names = sorted(values)
        total, _ = tasks.average_improvement(
            [values[n] for n in names],
            [against[n] for n in names],
            [descriptions[n].higher_is_better for n in names],
        )
        by_round.setdefault(number, []).append(total)
    return dict(sorted(by_round.items()))


def rounds_to(rows: Rows, metric: str, target: float, descriptions: Descriptions) -> list[float]:
    """The first round at which a metric of the training clients reaches the target, by seed.

    It is infinity where it never does. In groups every row counts that has the metric.

    Raises:
        InputError: no row has the metric.
    """
    reached: dict[Any, float] = {}
    for row in _judged(rows):
        described = descriptions.get(workdir.full_name(metric, row.get("group")))
        if metric not in row or described is None:
            continue
        value = row[metric]
        good = value >= target if described.higher_is_better else value <= target
        before = reached.setdefault(row["seed"], np.inf)
        if good:
            reached[row["seed"]] = min(before, row["round"])
    if not reached:
        raise InputError(f"no evaluation of the training clients has the metric {metric!r}")
    return list(reached.values())
