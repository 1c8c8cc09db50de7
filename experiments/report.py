"""Turns work directories into tables (terminal, Markdown and LaTeX) and figures.

python -m experiments.report runs/fedem runs/fedavg runs/local --output=runs/report
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.table

from experiments.outputs import comparisons, plots, workdir
from experiments.outputs.comparisons import Descriptions
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.tasks import Description

# What is shown of the primary metric of a run with one task: split, suffix and heading.
SUMMARIES = (
    ("train_clients", "", ""),
    ("train_clients", "_mean", "mean over clients"),
    ("train_clients", "_bottom_decile", "bottom decile"),
    ("train_clients", "_worst_tenth", "worst tenth"),
    ("unseen_clients", "", "unseen clients"),
)

Row = list[tuple[str, bool]]
"""The cells of one run: the text, and whether it is the best of its column."""


class Column(NamedTuple):
    """A column of a table of runs.

    Attributes:
        split: of the clients.
        metric: as the summary names it.
        heading: without the unit.
        described: how the metric is to be read.
    """

    split: str
    metric: str
    heading: str
    described: Description


def columns_of(summaries: Mapping[str, dict[str, Any]], descriptions: Descriptions) -> list[Column]:
    """The columns for which some run has values.

    Of runs with one task these are its primary metric by :data:`SUMMARIES` and its loss, of runs
    with several tasks or groups of clients the primary metric of each.
    """
    primary = [name for name, described in descriptions.items() if described.primary]
    if len(primary) == 1:
        (metric,) = primary
        wanted = [
            (split, f"{metric}{suffix}", heading or _words(metric))
            for split, suffix, heading in SUMMARIES
        ]
        wanted += [("train_clients", "loss", "test loss")] if metric != "loss" else []
    else:
        headings = _headings(primary)
        wanted = [("train_clients", name, headings[name]) for name in primary]
    columns = [
        Column(split, metric, heading, descriptions[metric])
        for split, metric, heading in wanted
        if metric in descriptions
    ]
    return [c for c in columns if any(_value(s, c) is not None for s in summaries.values())]


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _headings(names: list[str]) -> dict[str, str]:
    """``<group> <metric>`` for names ``<group>/<task>/<metric>``, with the task where needed."""
    parts = {name: [*name.split("/")[:-1], _words(name.split("/")[-1])] for name in names}
    short = {name: " ".join(dict.fromkeys((own[0], own[-1]))) for name, own in parts.items()}
    unclear = {name for name in names if list(short.values()).count(short[name]) > 1}
    return {name: " ".join(parts[name]) if name in unclear else short[name] for name in names}


def load(directory: pathlib.Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        FileNotFoundError: the directory holds none.
    """
    path = directory / "summary.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{directory} holds no summary.json: the run has not finished; start it again with "
            f"python -m experiments.run --workdir={directory} and its --config"
        )
    return json.loads(path.read_text())


def _value(summary: dict[str, Any], column: Column) -> tuple[float, float] | None:
    entry = summary["metrics"].get(column.split, {}).get(column.metric)
    return None if entry is None else (entry["final_mean"], entry["final_std"])


def table(
    summaries: Mapping[str, dict[str, Any]], descriptions: Descriptions
) -> tuple[list[str], list[Row]]:
    """Headings, and the cells of each run: final mean ± std over seeds, shares in percent.

    Args:
        summaries: by the run's name.
        descriptions: how their metrics are to be read.
    """
    columns = columns_of(summaries, descriptions)
    headings = ["", *(comparisons.with_unit(c.heading, c.described) for c in columns)]
    cells = [[_cell(_value(summary, c), c) for c in columns] for summary in summaries.values()]
    # Compared as printed, so that all of a tie are marked.
    best = [
        _best([row[place] for row in cells], column.described)
        for place, column in enumerate(columns)
    ]
    rows = [
        [
            (name, False),
            *((text, _number(text) == top) for text, top in zip(row, best, strict=True)),
        ]
        for name, row in zip(summaries, cells, strict=True)
    ]
    return headings, rows


def _number(cell: str) -> float | None:
    return None if cell == "-" else float(cell.split(" ")[0])


def _best(cells: list[str], described: Description) -> float:
    numbers = [number for cell in cells if (number := _number(cell)) is not None]
    return max(numbers) if described.higher_is_better else min(numbers)


def _cell(value: tuple[float, float] | None, column: Column) -> str:
    if value is None:
        return "-"
    scale, unit = comparisons.shown_unit(column.described)
    digits = 1 if unit == "%" else 3
    return f"{scale * value[0]:.{digits}f} ± {scale * value[1]:.{digits}f}"


def markdown(headings: list[str], rows: list[Row]) -> str:
    """A Markdown table, the best of each column in bold."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for row in rows:
        lines.append(
            "| " + " | ".join(f"**{text}**" if best else text for text, best in row) + " |"
        )
    return "\n".join(lines) + "\n"


def latex(headings: list[str], rows: list[Row]) -> str:
    """A LaTeX tabular (booktabs), the best of each column in bold."""

    def escape(text: str) -> str:
        return text.replace("_", r"\_").replace("%", r"\%").replace("±", r"$\pm$")

    lines = [r"\begin{tabular}{l" + "c" * (len(headings) - 1) + "}", r"\toprule"]
    lines.append(" & ".join(escape(h) for h in headings) + r" \\")
    lines.append(r"\midrule")
    for row in rows:
        cells = [rf"\textbf{{{escape(text)}}}" if best else escape(text) for text, best in row]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def show(headings: list[str], rows: list[Row], title: str) -> None:
    """Prints the table on the terminal."""
    output = rich.table.Table(title=title, title_justify="left")
    for heading in headings:
        output.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        output.add_row(*(f"[bold]{text}[/bold]" if best else text for text, best in row))
    rich.console.Console().print(output)


class Runs(NamedTuple):
    """Runs that differ in nothing but the seed of their data; their seeds are pooled.

    Attributes:
        name: in the report.
        directories: of the runs.
        summary: as of one run with all their seeds.
        rows: the metric rows of all.
        descriptions: how their metrics are to be read.
    """

    name: str
    directories: list[pathlib.Path]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    descriptions: Descriptions


def _settings(directory: pathlib.Path) -> tuple[dict[str, Any], int | None]:
    """The config without the data's seed, and that seed."""
    config = json.loads((directory / "config.json").read_text())
    return config, config.get("data", {}).pop("seed", None)


def _pool(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of several runs as of one with all their seeds."""
    pooled: dict[str, Any] = {}
    for split, metrics in summaries[0]["metrics"].items():
        for name in metrics:
            final = [value for s in summaries for value in s["metrics"][split][name]["final"]]
            entry = {
                "final": final,
                "final_mean": float(np.mean(final)),
                "final_std": float(np.std(final)),
            }
            pooled.setdefault(split, {})[name] = entry
    seeds = [seed for s in summaries for seed in s["seeds"]]
    return {**summaries[0], "metrics": pooled, "seeds": seeds}


def _names(directories: list[pathlib.Path]) -> dict[pathlib.Path, str]:
    """The names of a sweep's directories, without ``data.seed=`` where they differ without it."""
    short = [
        "-".join(part for part in directory.name.split("-") if not part.startswith("data.seed="))
        for directory in directories
    ]
    return {
        directory: name if name and short.count(name) == 1 else directory.name
        for directory, name in zip(directories, short, strict=True)
    }


def group(directories: list[pathlib.Path]) -> list[Runs]:
    """Pools runs that differ only in ``data.seed``, in the order given.

    They are named by algorithm where these differ, else by directory, without ``data.seed=``.

    Raises:
        FileNotFoundError: a run has not finished, or does not say how its metrics are to be read.
        InputError: two runs of the same name, or pooled runs that describe a metric differently.
    """
    groups: dict[str, list[pathlib.Path]] = {}
    for directory in directories:
        load(directory)
        groups.setdefault(json.dumps(_settings(directory)[0], sort_keys=True), []).append(directory)
    algorithms = [load(members[0])["algorithm"] for members in groups.values()]
    by_algorithm = len(set(algorithms)) == len(algorithms)
    names = _names([members[0] for members in groups.values()])
    runs = []
    for members, algorithm in zip(groups.values(), algorithms, strict=True):
        rows = [
            {**row, "seed": f"{_settings(directory)[1]}/{row['seed']}"}
            for directory in members
            for row in workdir.read_rows(directory / "metrics.jsonl")
        ]
        name = algorithm if by_algorithm else names[members[0]]
        descriptions = comparisons.merge_descriptions(
            workdir.describe_metrics(workdir.read_tasks(directory)) for directory in members
        )
        runs.append(Runs(name, members, _pool([load(d) for d in members]), rows, descriptions))
    if len({run.name for run in runs}) != len(runs):
        raise InputError(
            f"two runs have the same name ({', '.join(run.name for run in runs)}); "
            "rename a directory"
        )
    return runs


def _spread(values: list[float], digits: int) -> str:
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return "never"
    text = f"{np.mean(finite):.{digits}f} ± {np.std(finite):.{digits}f}"
    return text if len(finite) == len(values) else f"{text} ({len(finite)} of {len(values)})"


def improvement_columns(
    runs: list[Runs], reference: str, rounds: Sequence[int]
) -> tuple[list[str], list[list[str]]]:
    """Headings and columns with the improvement over the last round of the run ``reference``.

    Args:
        runs: one line each.
        reference: the name of one of them.
        rounds: at which the improvement is given; without any, at each run's last.

    Raises:
        InputError: no such run, or a round at which a run was not evaluated.
    """
    base = next((run for run in runs if run.name == reference), None)
    if base is None:
        raise InputError(
            f"no run is called {reference!r}; there are {', '.join(run.name for run in runs)}"
        )
    descriptions = comparisons.merge_descriptions(run.descriptions for run in runs)
    gains = [comparisons.improvements(run.rows, base.rows, descriptions) for run in runs]
    if not rounds:
        return [f"improvement over {reference} in %"], [[_spread(g[max(g)], 1) for g in gains]]
    for run, gain in zip(runs, gains, strict=True):
        if missing := sorted(set(rounds) - set(gain)):
            known = ", ".join(map(str, gain))
            raise InputError(f"{run.name} was not evaluated at round {missing[0]}, but at {known}")
    headings = [f"improvement over {reference} at round {number} in %" for number in rounds]
    return headings, [[_spread(gain[number], 1) for gain in gains] for number in rounds]


def compared(
    runs: list[Runs], reference: str | None, target: str | None, rounds: Sequence[int] = ()
) -> tuple[list[str], list[list[str]]]:
    """Further headings, and the further cells of each run.

    Args:
        runs: one line each.
        reference: a run over which the improvement is given; see :func:`improvement_columns`.
        target: ``metric=value``, to which the rounds are counted.
        rounds: at which the improvement is given.

    Raises:
        InputError: no such run or round, or a target that cannot be read.
    """
    headings: list[str] = []
    columns: list[list[str]] = []
    if reference is not None:
        headings, columns = improvement_columns(runs, reference, rounds)
    if target is not None:
        metric, _, value = target.rpartition("=")
        try:
            level = float(value)
        except ValueError:
            raise InputError(f"--target={target} does not look like metric=value") from None
        headings.append(f"rounds to {target}")
        reached = [comparisons.rounds_to(run.rows, metric, level, run.descriptions) for run in runs]
        columns.append([_spread(numbers, 0) for numbers in reached])
    return headings, [[column[place] for column in columns] for place in range(len(runs))]


def report(
    directories: list[pathlib.Path],
    output: pathlib.Path,
    reference: str | None = None,
    target: str | None = None,
    rounds: Sequence[int] = (),
) -> None:
    """Writes report.md, report.tex, curves and clients (.png and .pdf), and prints the table.

    Args:
        directories: of finished runs.
        output: the directory for the files.
        reference: a run over which the others' improvement is given.
        target: ``metric=value``, to which the rounds are counted.
        rounds: at which the improvement is given; without any, at each run's last.

    Raises:
        FileNotFoundError: a run has not finished, or does not say how its metrics are to be read.
        InputError: different runs of the same name or with different descriptions of a metric, no
            such reference, round or metric.
    """
    runs = group(directories)
    descriptions = comparisons.merge_descriptions(run.descriptions for run in runs)
    headings, cells = table({run.name: run.summary for run in runs}, descriptions)
    more, extra = compared(runs, reference, target, rounds)
    headings += more
    cells = [row + [(text, False) for text in own] for row, own in zip(cells, extra, strict=True)]
    counts = "/".join(str(count) for count in sorted({len(run.summary["seeds"]) for run in runs}))
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.md").write_text(markdown(headings, cells))
    (output / "report.tex").write_text(latex(headings, cells))
    logged = {run.name: run.rows for run in runs}
    plots.curves(logged, descriptions, output / "curves")
    plots.client_distributions(logged, descriptions, output / "clients")
    show(headings, cells, f"final mean ± std over {counts} seeds")
    rich.console.Console(soft_wrap=True).print(
        f"written: {output}/report.md, report.tex, curves.png, clients.png (and .pdf)",
        highlight=False,
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("report"))
    parser.add_argument(
        "--reference", help="the run over which the others' improvement (Delta_m) is given"
    )
    parser.add_argument(
        "--rounds",
        nargs="+",
        type=int,
        default=(),
        help="where the improvement is given; default: at the last",
    )
    parser.add_argument("--target", help="metric=value: count the rounds to it")
    arguments = parser.parse_args(argv)
    if arguments.rounds and arguments.reference is None:
        parser.error(
            "--rounds says where the improvement over a run is given; "
            "name that run with --reference"
        )
    try:
        report(
            arguments.workdirs,
            arguments.output,
            arguments.reference,
            arguments.target,
            arguments.rounds,
        )
    except (FileNotFoundError, InputError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
