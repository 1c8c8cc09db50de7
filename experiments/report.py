"""Work directories -> tables (terminal, Markdown, LaTeX) and figures.

python -m experiments.report runs/fedem runs/fedavg runs/local --output=runs/report
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import rich.console
import rich.table

from experiments import plots, workdir

# (split, metric, heading); larger is better for all but losses and errors.
COLUMNS = (
    ("train_clients", "accuracy", "accuracy"),
    ("train_clients", "accuracy_bottom_decile", "bottom decile"),
    ("train_clients", "accuracy_mean", "mean over clients"),
    ("unseen_clients", "accuracy", "unseen clients"),
    ("train_clients", "squared_error", "squared error"),
    ("train_clients", "loss", "test loss"),
)


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


def _is_error(metric: str) -> bool:
    return "loss" in metric or "error" in metric


def table(summaries: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Headings, and for each run its cells ``(text, best)``: final mean ± std over seeds, accuracies in percent."""
    columns = [c for c in COLUMNS if any(_value(s, c[0], c[1]) for s in summaries.values())]
    headings = ["", *(heading for _, _, heading in columns)]
    best = {}
    for split, metric, _ in columns:
        # Compared as printed, so that all of a tie are marked.
        shown = [_cell(_value(s, split, metric), metric) for s in summaries.values()]
        means = [float(cell.split(" ")[0]) for cell in shown if cell != "-"]
        best[split, metric] = min(means) if _is_error(metric) else max(means)
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
    scale, digits = (1, 3) if _is_error(metric) else (100, 1)
    return f"{scale * value[0]:.{digits}f} ± {scale * value[1]:.{digits}f}"


def markdown(headings: list[str], rows: list[list[tuple[str, bool]]]) -> str:
    """A Markdown table, the best of each column in bold."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for row in rows:
        lines.append("| " + " | ".join(f"**{text}**" if best else text for text, best in row) + " |")
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


def names_of(directories: list[pathlib.Path], summaries: list[dict[str, Any]]) -> list[str]:
    """The runs' algorithms where these differ, else the directories' names."""
    algorithms = [summary["algorithm"] for summary in summaries]
    if len(set(algorithms)) == len(algorithms):
        return algorithms
    return [directory.name for directory in directories]


def report(directories: list[pathlib.Path], output: pathlib.Path) -> None:
    """Writes report.md, report.tex, curves and clients (.png and .pdf) into ``output``, and prints the table."""
    found = [load(directory) for directory in directories]
    names = names_of(directories, found)
    if len(set(names)) != len(names):
        raise ValueError(f"two of the runs have the same name ({', '.join(names)}); rename a directory")
    summaries = dict(zip(names, found, strict=True))
    headings, rows = table(summaries)
    seeds = {len(s["seeds"]) for s in found}
    title = f"final mean ± std over {'/'.join(map(str, sorted(seeds)))} seeds; accuracies in %"
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.md").write_text(markdown(headings, rows))
    (output / "report.tex").write_text(latex(headings, rows))
    logged = {
        name: list(workdir.read_rows(directory / "metrics.jsonl"))
        for name, directory in zip(names, directories, strict=True)
    }
    plots.curves(logged, output / "curves")
    plots.client_distributions(logged, output / "clients")
    show(headings, rows, title)
    rich.console.Console(soft_wrap=True).print(
        f"written: {output}/report.md, report.tex, curves.png, clients.png (and .pdf)", highlight=False
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("report"))
    arguments = parser.parse_args(argv)
    try:
        report(arguments.workdirs, arguments.output)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
