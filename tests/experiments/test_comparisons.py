"""From metric rows and work directories to best values, improvements, tables and figures."""

import json

import numpy as np
import pytest

from experiments import report
from experiments.outputs import comparisons, metric_rows, plots, workdir
from fedjax_mtl import tasks
from fedjax_mtl.tasks import dense


def row(number, seed, group, **metrics):
    return {"round": number, "seed": seed, "split": "train_clients", "group": group, **metrics}


def described(**groups):
    """Descriptions of tasks by group; the group ``everybody`` stands for clients without groups."""
    return workdir.describe_metrics(
        workdir.JudgedTask(task.name, tasks.describe(task), None if name == "everybody" else name)
        for name, task in groups.items()
    )


CLASSES = tasks.classification()
DEPTH = tasks.joint({"d": (dense.depth(), 1.0)})
BOTH = described(a=CLASSES, b=DEPTH)
REFERENCE = [
    row(10, seed, group, **metrics)
    for seed in (0, 1)
    for group, metrics in (
        ("a", {"accuracy": 0.5, "loss": 1.0}),
        ("b", {"d/rmse": 2.0, "d/loss": 1.0}),
    )
]


def test_improvements_over_a_reference():
    rows = [
        row(number, seed, group, **metrics)
        for number, accuracy, error in ((5, 0.4, 2.0), (10, 0.6, 1.0))
        for seed in (0, 1)
        for group, metrics in (("a", {"accuracy": accuracy}), ("b", {"d/rmse": error}))
    ]
    gains = comparisons.improvements(rows, REFERENCE, BOTH)
    np.testing.assert_allclose(gains[5], [-10, -10])
    np.testing.assert_allclose(gains[10], [35, 35])
    same = comparisons.improvements(REFERENCE, REFERENCE, BOTH)
    np.testing.assert_allclose(same[10], 0, atol=1e-12)
    with pytest.raises(ValueError, match="no run of seed 7"):
        comparisons.improvements([row(10, 7, "a", accuracy=0.5)], REFERENCE, BOTH)


def test_improvement_at_chosen_rounds():
    rows = [{**r, "round": number} for number in (5, 10) for r in REFERENCE]
    for r in rows:
        if r["round"] == 5 and "accuracy" in r:
            r["accuracy"] = 0.4
    runs = [report.Runs(name, [], {}, own, BOTH) for name, own in (("a", REFERENCE), ("b", rows))]
    assert report.compared(runs, "a", None) == (
        ["improvement over a in %"],
        [["0.0 ± 0.0"], ["0.0 ± 0.0"]],
    )
    headings, cells = report.compared(runs[1:] + runs[:1], "a", None, [10])
    assert headings == ["improvement over a at round 10 in %"] and cells[0] == ["0.0 ± 0.0"]
    with pytest.raises(ValueError, match="a was not evaluated at round 5, but at 10"):
        report.compared(runs, "a", None, [5])
    runs[0] = runs[0]._replace(rows=rows)
    _, cells = report.compared(runs, "a", None, [5, 10])
    assert cells[1] == ["-10.0 ± 0.0", "0.0 ± 0.0"]


def finished_run(directory, algorithm, data_seed, step):
    directory.mkdir()
    config = {"algorithm": {"name": algorithm, "step": step}, "data": {"seed": data_seed}}
    (directory / "config.json").write_text(json.dumps(config))
    metrics = {"train_clients": {"accuracy": {"final": [0.5 + data_seed / 10]}}}
    (directory / "summary.json").write_text(
        json.dumps({"algorithm": algorithm, "seeds": [0], "metrics": metrics})
    )
    workdir.write_tasks(directory, [workdir.JudgedTask("classes", tasks.describe(CLASSES), "a")])
    (directory / "metrics.jsonl").write_text(json.dumps(row(1, 0, "a", accuracy=0.5)) + "\n")
    return directory


def test_draws_of_the_data_are_pooled_under_a_name_without_their_seed(tmp_path):
    directories = [
        finished_run(tmp_path / f"data.seed={seed}-fedavg.step={step}", "fedavg", seed, step)
        for step in (1, 2)
        for seed in (0, 1)
    ]
    runs = report.group(directories)
    assert [run.name for run in runs] == ["fedavg.step=1", "fedavg.step=2"]
    assert runs[0].summary["metrics"]["train_clients"]["accuracy"]["final"] == [0.5, 0.6]
    assert [r["seed"] for r in runs[0].rows] == ["0/0", "1/0"]
    assert runs[0].descriptions == described(a=CLASSES)


def test_rounds_to_a_target():
    rows = [
        {"round": r, "seed": s, "split": "train_clients", "rmse": e, "accuracy": -e}
        for s, errors in ((0, [3, 1, 2]), (1, [3, 3, 3]))
        for r, e in enumerate(errors)
    ]
    descriptions = described(everybody=dense.depth()) | described(everybody=CLASSES)
    assert comparisons.rounds_to(rows, "rmse", 2, descriptions) == [1, np.inf]
    assert comparisons.rounds_to(rows, "accuracy", -2, descriptions) == [1, np.inf]
    with pytest.raises(ValueError, match="has the metric 'speed'"):
        comparisons.rounds_to(rows, "speed", 1, descriptions)


def falling(split, name):
    """A value that falls 9, 3, 1 over three evaluations."""
    return [
        {"round": number, "seed": 0, "split": split, name: value}
        for number, value in enumerate((9.0, 3.0, 1.0))
    ]


@pytest.mark.parametrize(
    ("split", "name", "best", "at"),
    [
        ("server", "primal", 1, 2),
        ("server", "loss/rooms", 1, 2),
        ("server", "dual", 9, 0),
        ("train_clients", "accuracy", 9, 0),
        ("train_clients", "accuracy_std", 1, 2),
        ("train_clients", "loss_bottom_decile", 1, 2),
    ],
)
def test_the_best_round_is_the_one_in_the_direction_of_the_value(split, name, best, at):
    summary = metric_rows.summarise(falling(split, name), (0,), described(everybody=CLASSES))
    entry = summary[split][name]
    assert entry["final_mean"] == 1
    assert (entry["best_mean"], entry["best_round"]) == (best, at)


@pytest.mark.parametrize("split", ["server", "train_clients"])
def test_what_has_no_direction_has_no_best(split):
    summary = metric_rows.summarise(falling(split, "num_steps"), (0,), described(everybody=CLASSES))
    assert set(summary[split]["num_steps"]) == {"final", "final_mean", "final_std"}


def test_the_best_of_a_group_is_its_own():
    rows = [
        {**own, "group": group} for group in "ab" for own in falling("train_clients", "accuracy")
    ]
    wrong = dict(described(a=CLASSES))
    wrong["b/accuracy"] = tasks.Description(higher_is_better=False)
    best = metric_rows.summarise(rows, (0,), wrong)["train_clients"]
    assert best["a/accuracy"]["best_mean"] == 9 and best["b/accuracy"]["best_mean"] == 1


def test_a_directory_says_how_its_metrics_are_to_be_read(tmp_path):
    judged = [
        workdir.JudgedTask(CLASSES.name, tasks.describe(CLASSES), "a"),
        workdir.JudgedTask(DEPTH.name, tasks.describe(DEPTH)),
    ]
    workdir.write_tasks(tmp_path, judged)
    assert workdir.read_tasks(tmp_path) == judged
    descriptions = workdir.describe_metrics(judged)
    assert descriptions["a/accuracy"] == tasks.Description(True, "share", True)
    assert descriptions["d/rmse"] == tasks.Description(False, "m", True)
    assert descriptions["d/rmse_worst_tenth"] == tasks.Description(False, "m", False)


def test_a_directory_that_does_not_say_so_is_named_with_the_remedy(tmp_path):
    directory = finished_run(tmp_path / "old", "fedavg", 0, 1)
    (directory / "tasks.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"old holds no tasks\.json.* once more"):
        report.group([directory])


def test_runs_that_describe_a_metric_differently_are_not_compared():
    metres = described(everybody=dense.depth())
    plain = described(everybody=dense.pixel_regression("depth"))
    assert comparisons.merge_descriptions([metres, metres]) == metres
    with pytest.raises(ValueError, match=r"describe 'rmse' differently, as \(False, 'm', True\)"):
        comparisons.merge_descriptions([metres, plain])


def summaries(**final):
    """Summaries of two runs, the second of half the values."""
    return {
        name: {
            "metrics": {
                "train_clients": {
                    metric: {"final_mean": scale * value, "final_std": 0.1 * value}
                    for metric, value in final.items()
                }
            }
        }
        for name, scale in (("first", 1.0), ("second", 0.5))
    }


def test_tables_show_units_and_mark_the_better_direction():
    descriptions = described(everybody=CLASSES)
    headings, rows = report.table(
        summaries(accuracy=0.5, accuracy_bottom_decile=0.4, loss=2.0), descriptions
    )
    assert headings == ["", "accuracy (%)", "bottom decile (%)", "test loss"]
    assert rows[0] == [
        ("first", False),
        ("50.0 ± 5.0", True),
        ("40.0 ± 4.0", True),
        ("2.000 ± 0.200", False),
    ]
    assert rows[1][1:] == [
        ("25.0 ± 5.0", False),
        ("20.0 ± 4.0", False),
        ("1.000 ± 0.200", True),
    ]
    headings, rows = report.table(summaries(**{"a/accuracy": 0.5, "b/d/rmse": 2.0}), BOTH)
    assert headings == ["", "a accuracy (%)", "b rmse (m)"]
    assert [best for _, best in rows[0]] == [False, True, False]


def test_columns_of_tasks_with_the_same_metric_name_the_task():
    parts = {name: (dense.segmentation(name, 3), 1.0) for name in ("semseg", "parts")}
    headings, _ = report.table(
        summaries(**{"B/semseg/miou": 0.5, "B/parts/miou": 0.2}),
        described(B=tasks.joint(parts)),
    )
    assert headings == ["", "B semseg miou (%)", "B parts miou (%)"]


def test_axes_of_figures_have_units(tmp_path):
    rows = [
        row(number, 0, group, **metrics)
        for number in (1, 2)
        for group, metrics in (("a", {"accuracy": 0.5}), ("b", {"d/rmse": 2.0}))
    ]
    rows += [{**own, "client": 0} for own in rows if own["round"] == 2]
    panels = plots._task_panels({"run": rows}, BOTH)
    assert [(p.title, p.label) for p in panels] == [("a", "accuracy (%)"), ("b: d", "rmse (m)")]
    rounds, values = plots.series(rows, panels[0])
    assert rounds.tolist() == [1, 2] and values.tolist() == [[50], [50]]
    plots.curves({"run": rows}, BOTH, tmp_path / "curves")
    plots.client_distributions({"run": rows}, BOTH, tmp_path / "clients")
    assert {path.name for path in tmp_path.iterdir()} == {
        "curves.png",
        "curves.pdf",
        "clients.png",
        "clients.pdf",
    }


def test_the_figure_of_one_task_shows_its_clients_and_its_loss():
    names = [
        (p.split, p.metric, p.label)
        for p in plots._curve_panels("accuracy", described(everybody=CLASSES))
    ]
    assert names == [
        ("train_clients", "accuracy", "accuracy (%)"),
        ("train_clients", "accuracy_bottom_decile", "accuracy bottom decile (%)"),
        ("unseen_clients", "accuracy", "accuracy (%)"),
        ("train_clients", "loss", "loss"),
    ]
    # Where the loss is all there is, it is shown once.
    alone = tasks.Task("alone", CLASSES.loss, {}, CLASSES.mix)
    panels = plots._curve_panels("loss", described(everybody=alone))
    assert [(p.split, p.metric) for p in panels] == [
        ("train_clients", "loss"),
        ("train_clients", "loss_bottom_decile"),
        ("unseen_clients", "loss"),
    ]
