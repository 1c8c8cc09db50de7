"""Figures from metric rows: learning curves and distributions over clients, as PNG and PDF."""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.outputs.comparisons import primary_metrics

Rows = list[dict[str, Any]]


def _figure(columns: int):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        1, columns, figsize=(4.6 * columns, 3.4), squeeze=False, layout="constrained"
    )


def _save(figure, stem: pathlib.Path) -> None:
    from matplotlib import pyplot

    for suffix in (".png", ".pdf"):
        figure.savefig(stem.with_suffix(suffix), dpi=150)
    pyplot.close(figure)


def _styles(count: int) -> list[dict[str, str]]:
    """Colours, and beyond ten runs other line styles too."""
    return [
        {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]} for i in range(count)
    ]


class Panel(NamedTuple):
    """A metric of a split of clients, of one group where there are groups."""

    split: str
    metric: str
    title: str
    group: str | None = None

    def shows(self, row: dict[str, Any]) -> bool:
        return row["split"] == self.split and row.get("group") == self.group and self.metric in row


def series(rows: Rows, panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    """Rounds ``[n]`` and values ``[n, seeds]`` of a metric."""
    by_round: dict[int, dict[int, float]] = {}
    for row in rows:
        metric = panel.metric
        if panel.shows(row) and "client" not in row:
            by_round.setdefault(row["round"], {})[row["seed"]] = row[metric]
    seeds = sorted({seed for own in by_round.values() for seed in own})
    rounds = [r for r in sorted(by_round) if len(by_round[r]) == len(seeds)]
    return np.array(rounds), np.array([[by_round[r][s] for s in seeds] for r in rounds])


def _main_metric(rows: Rows) -> str:
    names = {name for row in rows for name in row}
    return next(
        (name for name in ("accuracy", "normalised_error", "squared_error") if name in names),
        "loss",
    )


def _group_panels(rows: Rows) -> list[Panel]:
    """One panel for each group's primary metrics; none where there are no groups."""
    found: dict[tuple[str, str], Panel] = {}
    for row in rows:
        if "group" in row:
            for metric in primary_metrics(row).values():
                title = f"{row['group']}: {metric.rpartition('/')[2]}"
                found[row["group"], metric] = Panel("train_clients", metric, title, row["group"])
    return [found[key] for key in sorted(found)]


def curves(runs: dict[str, Rows], stem: pathlib.Path) -> None:
    """Learning curves of named runs: the main metric of training clients, its bottom decile, held-out clients, and the loss.

    Lines are means over seeds, bands one standard deviation. Writes ``stem``.png and .pdf.
    """
    every = [row for rows in runs.values() for row in rows]
    metric = _main_metric(every)
    panels = _group_panels(every) or [
        Panel("train_clients", metric, f"{metric}, training clients"),
        Panel("train_clients", f"{metric}_bottom_decile", f"{metric}, bottom decile of clients"),
        Panel("unseen_clients", metric, f"{metric}, held-out clients"),
        Panel("train_clients", "loss", "test loss, training clients"),
    ]
    panels = [p for p in panels if any(len(series(rows, p)[0]) for rows in runs.values())]
    figure, axes = _figure(max(len(panels), 1))
    styles = dict(zip(runs, _styles(len(runs)), strict=True))
    for axis, panel in zip(axes[0], panels, strict=False):
        for label, rows in runs.items():
            rounds, values = series(rows, panel)
            if not len(rounds):
                continue
            mean, std = values.mean(axis=1), values.std(axis=1)
            (line,) = axis.plot(rounds, mean, label=label, **styles[label])
            axis.fill_between(
                rounds, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0
            )
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("round")
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 8), fontsize=8
    )
    _save(figure, stem)


def client_distributions(runs: dict[str, Rows], stem: pathlib.Path) -> None:
    """The main metric of every client at the end, one box a run; all seeds together. Writes ``stem``.png and .pdf."""
    every = [row for rows in runs.values() for row in rows if "client" in row]
    metric = _main_metric(every)
    panels = _group_panels(every) or [
        Panel(split, metric, f"{metric} of each of the {split.replace('_', ' ')}")
        for split in ("train_clients", "unseen_clients")
    ]
    panels = [p for p in panels if any(p.shows(row) for row in every)]
    figure, axes = _figure(max(len(panels), 1))
    for axis, panel in zip(axes[0], panels, strict=False):
        values = [
            [row[panel.metric] for row in rows if "client" in row and panel.shows(row)]
            for rows in runs.values()
        ]
        axis.boxplot(values, tick_labels=list(runs), whis=(10, 90), showmeans=True)
        axis.set_title(panel.title, fontsize=10)
        axis.tick_params(axis="x", labelrotation=30)
        axis.grid(alpha=0.3, axis="y")
    _save(figure, stem)
