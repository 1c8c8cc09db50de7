"""Primal sub-optimality over estimated time, of runs of MOCHA and the methods it is compared with.

    python -m experiments.figures.round_times runs/stragglers/* [--output=runs/stragglers/times]

Writes a figure (PNG and PDF), a panel a network, and prints when each run reached which sub-optimality. The optimum is the largest dual value that any
run reached; the estimate is that of the released code, ``costs.estimated_round_time``, with stragglers charged at the largest possible budget.
"""

import json
import pathlib
import sys
from typing import NamedTuple

import matplotlib
import numpy as np

from experiments.outputs import workdir
from fedjax_mtl import costs

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TARGETS = (1.0, 0.1, 0.01)


class Course(NamedTuple):
    """One run.

    Attributes:
        name: of its directory. method: of its algorithm. num_tasks: nodes.
        rounds: done at each evaluation, ``[evaluations]``. primal, dual, slowest: means over the rounds between evaluations, of the values and of the slowest node's steps.
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
    """The course of a work directory's first seed.

    Raises:
        ValueError: a run that reports no primal values.
    """
    config = json.loads((directory / "config.json").read_text())
    rows = [
        row
        for row in workdir.read_rows(directory / "metrics.jsonl")
        if row["split"] == "server" and row["seed"] == config["seeds"][0]
    ]
    if not rows or "primal" not in rows[0]:
        raise ValueError(
            f"{directory} has no primal values; round times are for MOCHA and the methods around it"
        )
    clients = sum("client" in row for row in workdir.read_rows(directory / "metrics.jsonl"))

    def column(name):
        return np.array([row.get(name, -np.inf) for row in rows])

    method = config["algorithm"]["name"]
    passes = config["algorithm"][method].get("passes", 1.0)
    return Course(
        directory.name,
        method,
        clients // len(config["seeds"]),
        column("round"),
        column("primal"),
        column("dual"),
        column("slowest_steps"),
        min(passes, config["systems"]["high"]) * rows[0]["num_examples"],
    )


def elapsed(course: Course, network: str) -> np.ndarray:
    """Estimated time at each evaluation, ``[evaluations]``."""
    between = np.diff(course.rounds, prepend=0)
    one = costs.estimated_round_time(
        course.method,
        steps=course.steps,
        slowest=course.slowest,
        num_tasks=course.num_tasks,
        network=network,
    )
    return np.cumsum(between * one)


def times_to(courses: list[Course], optimum: float, network: str) -> dict[str, list[float | None]]:
    """When each run's sub-optimality first was at most each of ``TARGETS``; None where never."""
    table = {}
    for course in courses:
        when = elapsed(course, network)
        reached = [when[course.primal - optimum <= target] for target in TARGETS]
        table[course.name] = [float(times[0]) if len(times) else None for times in reached]
    return table


def draw(courses: list[Course], optimum: float, output: pathlib.Path) -> None:
    """Sub-optimality over time, a panel a network."""
    figure, axes = plt.subplots(1, len(costs.NETWORKS), figsize=(12, 3.5), sharey=True)
    for axis, network in zip(axes, costs.NETWORKS, strict=True):
        for course in courses:
            gap = np.maximum(course.primal - optimum, 1e-12)
            axis.plot(elapsed(course, network), gap, label=course.name)
        axis.set(xscale="log", yscale="log", xlabel="estimated time", title=network)
    axes[0].set_ylabel("primal sub-optimality")
    axes[0].legend()
    for suffix in (".png", ".pdf"):
        figure.savefig(output.with_suffix(suffix), bbox_inches="tight", dpi=150)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    """Work directories, and ``--output``."""
    outputs = [a.partition("=")[2] for a in arguments if a.startswith("--output=")]
    directories = [pathlib.Path(a) for a in arguments if not a.startswith("--")]
    courses = [read_course(d) for d in directories if (d / "metrics.jsonl").exists()]
    if not courses:
        raise SystemExit("name work directories of finished runs, e.g. runs/stragglers/*")
    optimum = max(course.dual.max() for course in courses)
    output = pathlib.Path(outputs[0]) if outputs else directories[0].parent / "times"
    draw(courses, optimum, output)
    for network in costs.NETWORKS:
        print(
            f"\n{network}: estimated time to a primal sub-optimality of {', '.join(map(str, TARGETS))}"
        )
        for name, times in times_to(courses, optimum, network).items():
            print(f"  {name:16s}", *("never" if t is None else f"{t:10.3g}" for t in times))


if __name__ == "__main__":
    main(sys.argv[1:])
