"""Primal sub-optimality over estimated time, of runs of MOCHA and the methods it is compared with.

    python -m experiments.figures.round_times runs/stragglers/* [--output=runs/stragglers/times]

Writes a figure (PNG and PDF) with one panel a network, and prints when each run reached which
sub-optimality. The optimum is the largest dual value that any of the runs reached. The estimate of
time is that of MOCHA's released code, :func:`fedjax_mtl.costs.estimated_round_time`; stragglers are
charged at the largest possible budget.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.outputs import telemetry, workdir
from fedjax_mtl import costs
from fedjax_mtl.core.checks import InputError

TARGETS = (1.0, 0.1, 0.01)


class Course(NamedTuple):
    """How one run went.

    Attributes:
        name: of its directory.
        method: the name of its algorithm.
        num_tasks: how many nodes there are.
        rounds: how many were done at each evaluation, ``[evaluations]``.
        primal: the primal value, mean over the rounds since the evaluation before,
            ``[evaluations]``.
        dual: the dual value, likewise.
        slowest: the steps of the node that made most, likewise.
        steps: coordinate steps of all nodes in a round at the largest possible budget.
    """

    name: str
    method: str
    num_tasks: int
    rounds: np.ndarray
    primal: np.ndarray
    dual: np.ndarray
    slowest: np.ndarray
    steps: float


def read_course(directory: pathlib.Path) -> Course:
    """Returns the course of the first seed of a work directory.

    Raises:
        InputError: a run that reports no primal values.
    """
    config = json.loads((directory / "config.json").read_text())
    every = list(workdir.read_rows(directory / "metrics.jsonl"))
    seeds = config["seeds"]
    rows = [row for row in every if row["split"] == "server" and row["seed"] == seeds[0]]
    if not rows or "primal" not in rows[0]:
        raise InputError(
            f"{directory} has no primal values; round times are for MOCHA and the methods around it"
        )

    def column(name: str) -> np.ndarray:
        return np.array([row.get(name, -np.inf) for row in rows])

    method = config["algorithm"]["name"]
    passes = config["algorithm"][method].get("passes", 1.0)
    return Course(
        name=directory.name,
        method=method,
        num_tasks=sum("client" in row for row in every) // len(seeds),
        rounds=column("round"),
        primal=column("primal"),
        dual=column("dual"),
        slowest=column("slowest_steps"),
        steps=min(passes, config["systems"]["high"]) * rows[0]["num_examples"],
    )


def elapsed(course: Course, network: str) -> np.ndarray:
    """The estimated time at each evaluation, ``[evaluations]``.

    Args:
        course: of a run.
        network: one of ``costs.NETWORKS``.
    """
    between = np.diff(course.rounds, prepend=0)
    one = costs.estimated_round_time(
        course.method,
        steps=course.steps,
        slowest=course.slowest,
        num_tasks=course.num_tasks,
        network=network,
    )
    return np.cumsum(between * one)


def times_to(
    courses: Sequence[Course], optimum: float, network: str
) -> dict[str, list[float | None]]:
    """When each run's sub-optimality first was at most each of ``TARGETS``; None where never.

    Args:
        courses: of the runs.
        optimum: the primal value that sub-optimality is counted from.
        network: one of ``costs.NETWORKS``.
    """
    table: dict[str, list[float | None]] = {}
    for course in courses:
        when = elapsed(course, network)
        reached = [when[course.primal - optimum <= target] for target in TARGETS]
        table[course.name] = [float(times[0]) if len(times) else None for times in reached]
    return table


def draw(courses: Sequence[Course], optimum: float, output: pathlib.Path) -> None:
    """Draws sub-optimality over time, with one panel a network.

    Args:
        courses: of the runs.
        optimum: the primal value that sub-optimality is counted from.
        output: the path of the figure without its ending.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5))
    axes = figure.subplots(1, len(costs.NETWORKS), sharey=True)
    for axis, network in zip(axes, costs.NETWORKS, strict=True):
        for course in courses:
            gap = np.maximum(course.primal - optimum, 1e-12)
            axis.plot(elapsed(course, network), gap, label=course.name)
        axis.set(xscale="log", yscale="log", xlabel="estimated time", title=network)
    axes[0].set_ylabel("primal sub-optimality")
    axes[0].legend()
    for suffix in (".png", ".pdf"):
        figure.savefig(output.with_suffix(suffix), bbox_inches="tight", dpi=150)


def report(directories: Sequence[pathlib.Path], output: pathlib.Path | None) -> None:
    """Draws the figure and prints the times.

    Args:
        directories: of the runs; those without metrics are passed over.
        output: the path of the figure without its ending; None is ``times`` beside the first run.

    Raises:
        InputError: no directory of a run, or one that reports no primal values.
    """
    courses = [read_course(d) for d in directories if (d / "metrics.jsonl").exists()]
    if not courses:
        raise InputError("name work directories of finished runs, e.g. runs/stragglers/*")
    optimum = max(course.dual.max() for course in courses)
    draw(courses, optimum, output or directories[0].parent / "times")
    targets = ", ".join(map(str, TARGETS))
    for network in costs.NETWORKS:
        print(f"\n{network}: estimated time to a primal sub-optimality of {targets}")
        for name, times in times_to(courses, optimum, network).items():
            print(f"  {name:16s}", *("never" if t is None else f"{t:10.3g}" for t in times))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="*", type=pathlib.Path, help="of finished runs")
    parser.add_argument("--output", type=pathlib.Path, help="the figure's path without its ending")
    arguments = parser.parse_args(argv)
    telemetry.exit_on_bad_input(lambda: report(arguments.directories, arguments.output))


if __name__ == "__main__":
    main()
