"""Work directories -> tables (terminal, Markdown, LaTeX) and figures.

python -m experiments.report runs/fedem runs/fedavg runs/local --output=runs/report
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.table

from experiments.outputs import comparisons, plots, workdir
from fedjax_mtl import tasks

# Runs that differ only in data.seed are one row: seeds of the partition count like seeds of the training.
# (split, metric, heading); larger is better for all but losses and errors.
COLUMNS = (
    ("train_clients", "accuracy", "accuracy"),
    ("train_clients", "accuracy_bottom_decile", "bottom decile"),
    ("train_clients", "accuracy_mean", "mean over clients"),
    ("unseen_clients", "accuracy", "unseen clients"),
    ("train_clients", "squared_error", "squared error"),
    ("train_clients", "normalised_error_mean", "normalised error"),
    ("train_clients", "normalised_error_worst_tenth", "worst task"),
    ("train_clients", "loss", "test loss"),
)


def columns_of(summaries: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The columns for which some run has values; of heterogeneous populations each task's primary metric."""
    chosen = [c for c in COLUMNS if any(_value(s, c[0], c[1]) for s in summaries.values())]
    if chosen:
        return chosen
    names = next(iter(summaries.values()))["metrics"].get("train_clients", {})
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        group_name, _, metric = name.partition("/")
        groups.setdefault(group_name, {})[metric] = metric
    return [
        ("train_clients", f"{group_name}/{metric}", f"{group_name} {metric.rpartition('/')[2]}")
        for group_name, metrics in groups.items()
        for metric in comparisons.primary_metrics(metrics).values()
    ]


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


def _value(summary: dict[str, Any], split: str, metric: str) -> tuple[float, float] | None:
    entry = summary["metrics"].get(split, {}).get(metric)
    return None if entry is None else (entry["final_mean"], entry["final_std"])


def table(summaries: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Headings, and for each run its cells ``(text, best)``: final mean ± std over seeds, accuracies in percent."""
    columns = columns_of(summaries)
    headings = ["", *(heading for _, _, heading in columns)]
    best = {}
    for split, metric, _ in columns:
        # Compared as printed, so that all of a tie are marked.
        shown = [_cell(_value(s, split, metric), metric) for s in summaries.values()]
        means = [float(cell.split(" ")[0]) for cell in shown if cell != "-"]
        best[split, metric] = min(means) if tasks.lower_is_better(metric) else max(means)
    rows = []
    for name, summary in summaries.items():
        row = [(name, False)]
        for split, metric, _ in columns:
            cell = _cell(_value(summary, split, metric), metric)
            row.append((cell, cell != "-" and float(cell.split(" ")[0]) == best[split, metric]))
        rows.append(row)
    return headings, rows


def _cell(value: tuple[float, float] | None, metric: str) -> str:
    if value is None:
        return "-"
    scale, digits = (1, 3) if tasks.lower_is_better(metric) else (100, 1)
    return f"{scale * value[0]:.{digits}f} ± {scale * value[1]:.{digits}f}"


def markdown(headings: list[str], rows: list[list[tuple[str, bool]]]) -> str:
    """A Markdown table, the best of each column in bold."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for row in rows:
        lines.append(
            "| " + " | ".join(f"**{text}**" if best else text for text, best in row) + " |"
        )
    return "\n".join(lines) + "\n"


def latex(headings: list[str], rows: list[list[tuple[str, bool]]]) -> str:
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


def show(headings: list[str], rows: list[list[tuple[str, bool]]], title: str) -> None:
    """Prints the table on the terminal."""
    output = rich.table.Table(title=title, title_justify="left")
    for heading in headings:
        output.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        output.add_row(*(f"[bold]{text}[/bold]" if best else text for text, best in row))
    rich.console.Console().print(output)


class Runs(NamedTuple):
    """Runs that differ in nothing but the seed of their data; their seeds are pooled."""

    name: str
    directories: list[pathlib.Path]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]


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
    """The names of a sweep's directories without their part for ``data.seed``, where these still differ."""
    short = [
        "-".join(part for part in directory.name.split("-") if not part.startswith("data.seed="))
        for directory in directories
    ]
    return {
        directory: name if name and short.count(name) == 1 else directory.name
        for directory, name in zip(directories, short, strict=True)
    }


def group(directories: list[pathlib.Path]) -> list[Runs]:
    """Pools runs that differ only in ``data.seed``, in the order given; named by algorithm where these differ, else by directory, without ``data.seed=``."""
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
        runs.append(Runs(name, members, _pool([load(d) for d in members]), rows))
    if len({run.name for run in runs}) != len(runs):
        raise ValueError(
            f"two runs have the same name ({', '.join(run.name for run in runs)}); rename a directory"
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
    """The improvement over the last round of the run ``reference``, at these rounds or, without any, at each run's last.

    Raises:
        ValueError: no such run, or a round at which a run was not evaluated.
    """
    base = next((run for run in runs if run.name == reference), None)
    if base is None:
        raise ValueError(
            f"no run is called {reference!r}; there are {', '.join(run.name for run in runs)}"
        )
    gains = [comparisons.improvements(run.rows, base.rows) for run in runs]
    if not rounds:
        return [f"improvement over {reference} in %"], [[_spread(g[max(g)], 1) for g in gains]]
    for run, gain in zip(runs, gains, strict=True):
        if missing := sorted(set(rounds) - set(gain)):
            known = ", ".join(map(str, gain))
            raise ValueError(f"{run.name} was not evaluated at round {missing[0]}, but at {known}")
    headings = [f"improvement over {reference} at round {number} in %" for number in rounds]
    return headings, [[_spread(gain[number], 1) for gain in gains] for number in rounds]


def compared(
    runs: list[Runs], reference: str | None, target: str | None, rounds: Sequence[int] = ()
) -> tuple[list[str], list[list[str]]]:
    """Further columns: the improvement over the run ``reference`` (see :func:`improvement_columns`), and the rounds to ``target`` (``metric=value``).

    Raises:
        ValueError: no such run or round, or a target that cannot be read.
    """
    headings, columns = [], []
    if reference is not None:
        headings, columns = improvement_columns(runs, reference, rounds)
    if target is not None:
        metric, _, value = target.rpartition("=")
        try:
            level = float(value)
        except ValueError:
            raise ValueError(f"--target={target} does not look like metric=value") from None
        headings.append(f"rounds to {target}")
        columns.append([_spread(comparisons.rounds_to(run.rows, metric, level), 0) for run in runs])
    return headings, [list(row) for row in zip(*columns, strict=True)] if columns else [
        [] for _ in runs
    ]


def report(
    directories: list[pathlib.Path],
    output: pathlib.Path,
    reference: str | None = None,
    target: str | None = None,
    rounds: Sequence[int] = (),
) -> None:
    """Writes report.md, report.tex, curves and clients (.png and .pdf) into ``output``, and prints the table.

    Args:
        reference: a run over which the others' improvement is given, at their last round or at ``rounds``. target: ``metric=value``, to which the rounds are counted.

    Raises:
        FileNotFoundError: a run has not finished. ValueError: different runs of the same name, no such reference, round or metric.
    """
    runs = group(directories)
    headings, cells = table({run.name: run.summary for run in runs})
    more, extra = compared(runs, reference, target, rounds)
    headings += more
    cells = [row + [(text, False) for text in own] for row, own in zip(cells, extra, strict=True)]
    counts = "/".join(str(count) for count in sorted({len(run.summary["seeds"]) for run in runs}))
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.md").write_text(markdown(headings, cells))
    (output / "report.tex").write_text(latex(headings, cells))
    logged = {run.name: run.rows for run in runs}
    plots.curves(logged, output / "curves")
    plots.client_distributions(logged, output / "clients")
    show(headings, cells, f"final mean ± std over {counts} seeds; accuracies in %")
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
            "--rounds says where the improvement over a run is given; name that run with --reference"
        )
    try:
        report(
            arguments.workdirs,
            arguments.output,
            arguments.reference,
            arguments.target,
            arguments.rounds,
        )
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
