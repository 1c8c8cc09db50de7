"""Improvement over a reference and rounds to a target, from metric rows."""

import json

import numpy as np
import pytest

from experiments import report
from experiments.outputs import comparisons


def row(number, seed, group, **metrics):
    return {"round": number, "seed": seed, "split": "train_clients", "group": group, **metrics}


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
    gains = comparisons.improvements(rows, REFERENCE)
    np.testing.assert_allclose(gains[5], [-10, -10])
    np.testing.assert_allclose(gains[10], [35, 35])
    np.testing.assert_allclose(comparisons.improvements(REFERENCE, REFERENCE)[10], 0, atol=1e-12)
    with pytest.raises(ValueError, match="no run of seed 7"):
        comparisons.improvements([row(10, 7, "a", accuracy=0.5)], REFERENCE)


def test_improvement_at_chosen_rounds():
    rows = [{**r, "round": number} for number in (5, 10) for r in REFERENCE]
    for r in rows:
        if r["round"] == 5 and "accuracy" in r:
            r["accuracy"] = 0.4
    runs = [report.Runs(name, [], {}, own) for name, own in (("a", REFERENCE), ("b", rows))]
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


def test_rounds_to_a_target():
    rows = [
        {"round": r, "seed": s, "split": "train_clients", "error": e}
        for s, errors in ((0, [3, 1, 2]), (1, [3, 3, 3]))
        for r, e in enumerate(errors)
    ]
    assert comparisons.rounds_to(rows, "error", 2) == [1, np.inf]
    assert comparisons.rounds_to(
        [{**r, "accuracy": -r["error"]} for r in rows], "accuracy", -2
    ) == [
        1,
        np.inf,
    ]
    with pytest.raises(ValueError, match="has the metric 'speed'"):
        comparisons.rounds_to(rows, "speed", 1)
