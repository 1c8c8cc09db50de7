"""Figures from metric rows: learning curves and distributions over clients, as PNG and PDF."""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.outputs import workdir
from experiments.outputs.comparisons import (
    Descriptions,
    primary_metrics,
    shown_unit,
    with_unit,
)

Rows = list[dict[str, Any]]


def _figure(columns: int) -> tuple[Any, np.ndarray]:
    """A figure and its axes, ``[1, columns]``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        1, columns, figsize=(4.6 * columns, 3.4), squeeze=False, layout="constrained"
    )


def _save(figure: Any, stem: pathlib.Path) -> None:
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
    """A metric of a split of clients, of one group where there are groups.

    Attributes:
        split: of the clients.
        metric: as the rows name it.
        title: stands above it.
        label: stands at its axis, with the unit.
        scale: by which values are multiplied to be in that unit.
        group: of clients; None where there are none.
    """

    split: str
    metric: str
    title: str
    label: str
    scale: float = 1.0
    group: str | None = None

    def shows(self, row: dict[str, Any]) -> bool:
        """Whether a row has the panel's value."""
        return row["split"] == self.split and row.get("group") == self.group and self.metric in row


def series(rows: Rows, panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    """Rounds ``[n]`` and values ``[n, seeds]`` of a metric, in the panel's unit."""
    by_round: dict[int, dict[int, float]] = {}
    for row in rows:
        if panel.shows(row) and "client" not in row:
            value = panel.scale * row[panel.metric]
            by_round.setdefault(row["round"], {})[row["seed"]] = value
    seeds = sorted({seed for own in by_round.values() for seed in own})
    rounds = [r for r in sorted(by_round) if len(by_round[r]) == len(seeds)]
    return np.array(rounds), np.array([[by_round[r][s] for s in seeds] for r in rounds])


def _panel(
    split: str, metric: str, title: str, descriptions: Descriptions, group: str | None = None
) -> Panel:
    described = descriptions[workdir.full_name(metric, group)]
    scale, _ = shown_unit(described)
    label = with_unit(metric.rpartition("/")[2].replace("_", " "), described)
    return Panel(split, metric, title, label, scale, group)


def _task_panels(runs: dict[str, Rows], descriptions: Descriptions) -> list[Panel]:
    """One panel for the primary metric of each task, of each group where there are groups."""
    found: dict[tuple[str, str], Panel] = {}
    for row in (row for rows in runs.values() for row in rows):
        if row["split"] != "train_clients":
            continue
        group = row.get("group")
        for metric in primary_metrics(row, descriptions):
            title = ": ".join(filter(None, (group, metric.rpartition("/")[0])))
            found[group or "", metric] = _panel("train_clients", metric, title, descriptions, group)
    return [found[key] for key in sorted(found)]


def _curve_panels(metric: str, descriptions: Descriptions) -> list[Panel]:
    """What is shown of a run with one task whose clients do not come in groups."""
    shown = (
        ("train_clients", metric, "training clients"),
        ("train_clients", f"{metric}_bottom_decile", "bottom decile of training clients"),
        ("unseen_clients", metric, "held-out clients"),
        ("train_clients", "loss", "test loss, training clients"),
    )
    unique = {(split, name): title for split, name, title in shown}
    return [_panel(split, name, title, descriptions) for (split, name), title in unique.items()]


def curves(runs: dict[str, Rows], descriptions: Descriptions, stem: pathlib.Path) -> None:
    """Learning curves of named runs.

    They show the primary metric of training clients, its bottom decile, held-out clients, and the
    loss; where there are several tasks, the primary metric of each. Lines are means over seeds,
    bands one standard deviation. Writes ``stem``.png and .pdf.

    Args:
        runs: metric rows by the run's name.
        descriptions: how the metrics are to be read.
        stem: the files' path without its ending.
    """
    panels = _task_panels(runs, descriptions)
    if len(panels) == 1 and panels[0].group is None:
        panels = _curve_panels(panels[0].metric, descriptions)
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
        axis.set_ylabel(panel.label)
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 8), fontsize=8
    )
    _save(figure, stem)


def client_distributions(
    runs: dict[str, Rows], descriptions: Descriptions, stem: pathlib.Path
) -> None:
    """The primary metrics of every client at the end, one box a run; all seeds together.

    Writes ``stem``.png and .pdf.

    Args:
        runs: metric rows by the run's name.
        descriptions: how the metrics are to be read.
        stem: the files' path without its ending.
    """
    every = [row for rows in runs.values() for row in rows if "client" in row]
    panels = _task_panels(runs, descriptions)
    if len(panels) == 1 and panels[0].group is None:
        metric = panels[0].metric
        panels = [
            _panel(split, metric, f"each of the {split.replace('_', ' ')}", descriptions)
            for split in ("train_clients", "unseen_clients")
        ]
    panels = [p for p in panels if any(p.shows(row) for row in every)]
    figure, axes = _figure(max(len(panels), 1))
    for axis, panel in zip(axes[0], panels, strict=False):
        values = [
            [
                panel.scale * row[panel.metric]
                for row in rows
                if "client" in row and panel.shows(row)
            ]
            for rows in runs.values()
        ]
        axis.boxplot(values, tick_labels=list(runs), whis=(10, 90), showmeans=True)
        axis.set_title(panel.title, fontsize=10)
        axis.set_ylabel(panel.label)
        axis.tick_params(axis="x", labelrotation=30)
        axis.grid(alpha=0.3, axis="y")
    _save(figure, stem)
