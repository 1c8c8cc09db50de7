"""What reports say: tables cell by cell, pooled draws of the data, comparisons.

And what a run writes into its directory, and when.
"""

import json

import numpy as np
import pytest

from configs import fedem_synthetic
from experiments import report, run
from experiments.outputs import comparisons, metric_rows, plots, workdir
from experiments.outputs.progress import Progress
from fedjax_mtl import tasks
from fedjax_mtl.tasks import dense

CLASSES = tasks.classification()


def described(**groups):
    """How the metrics of tasks are read, by group; ``all`` are clients that have no groups."""
    return workdir.describe_metrics(
        workdir.JudgedTask(task.name, tasks.describe(task), None if name == "all" else name)
        for name, task in groups.items()
    )


ACCURACY = described(all=CLASSES)


def entry(*finals):
    """What a summary says of a metric, one final value a seed."""
    return {
        "final": list(finals),
        "final_mean": float(np.mean(finals)),
        "final_std": float(np.std(finals)),
    }


def summary(algorithm="fedavg", seeds=(0,), unseen=None, **metrics):
    """Of a finished run, by metric of the training clients."""
    splits = {"train_clients": {name: entry(*values) for name, values in metrics.items()}}
    if unseen is not None:
        splits["unseen_clients"] = {"accuracy": entry(*unseen)}
    return {"algorithm": algorithm, "seeds": list(seeds), "metrics": splits}


def row(number, seed=0, **metrics):
    return {"round": number, "seed": seed, "split": "train_clients", **metrics}


def finished(directory, rows=(), data_seed=None, step=1, **own):
    """The directory of a finished run."""
    directory.mkdir(parents=True)
    data = {} if data_seed is None else {"seed": data_seed}
    about = summary(**own)
    config = {"algorithm": {"name": about["algorithm"], "step": step}, "data": data}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "summary.json").write_text(json.dumps(about))
    workdir.write_tasks(directory, [workdir.JudgedTask("t", tasks.describe(CLASSES))])
    lines = [json.dumps(one) + "\n" for one in rows]
    (directory / "metrics.jsonl").write_text("".join(lines))
    return directory


TWO = {
    "fed_em": summary(
        accuracy=(0.5, 0.6), accuracy_bottom_decile=(0.4, 0.4), loss=(1.25, 1.75), unseen=(0.2, 0.3)
    ),
    "local": summary(accuracy=(0.4, 0.4), accuracy_bottom_decile=(0.4, 0.4), loss=(0.5, 0.5)),
}


# --- Tables.


def test_cells_and_what_is_best():
    """Means ± standard deviations over seeds, accuracies in percent, the best of each column.

    A tie as printed is best twice, and less is better for losses.
    """
    headings, rows = report.table(TWO, ACCURACY)
    assert headings == [
        *("", "accuracy (%)", "bottom decile (%)", "unseen clients (%)", "test loss")
    ]
    first, second = (dict(zip(headings, own, strict=True)) for own in rows)
    assert list(first.values()) == [
        ("fed_em", False),
        ("55.0 ± 5.0", True),
        ("40.0 ± 0.0", True),
        ("25.0 ± 5.0", True),
        ("1.500 ± 0.250", False),
    ]
    assert list(second.values()) == [
        ("local", False),
        ("40.0 ± 0.0", False),
        ("40.0 ± 0.0", True),
        ("-", False),
        ("0.500 ± 0.000", True),
    ]


def test_ties_are_those_of_what_is_printed():
    near = {"a": summary(accuracy=(0.50004,)), "b": summary(accuracy=(0.50001,))}
    _, rows = report.table(near, ACCURACY)
    assert [own[1] for own in rows] == [("50.0 ± 0.0", True)] * 2


def test_columns_are_those_that_some_run_has():
    """In a fixed order, whatever else a summary holds."""
    metric = "normalised_error"
    own = summary(
        **{"loss": (1,), f"{metric}_worst_tenth": (3,), "rmse": (2,), f"{metric}_std": (4,)}
    )
    other = summary(**{f"{metric}_mean": (5,), metric: (6,)})
    pair = {"a": own, "b": other}
    headings, rows = report.table(pair, described(all=tasks.mean_squared_error()))
    assert headings == [*("", "normalised error", "mean over clients", "worst tenth", "test loss")]
    assert [text for text, _ in rows[0][1:]] == ["-", "-", "3.000 ± 0.000", "1.000 ± 0.000"]
    assert [text for text, _ in rows[1][1:]] == ["6.000 ± 0.000", "5.000 ± 0.000", "-", "-"]


def test_markdown():
    assert report.markdown(*report.table(TWO, ACCURACY)) == (
        "|  | accuracy (%) | bottom decile (%) | unseen clients (%) | test loss |\n"
        "|---|---|---|---|---|\n"
        "| fed_em | **55.0 ± 5.0** | **40.0 ± 0.0** | **25.0 ± 5.0** | 1.500 ± 0.250 |\n"
        "| local | 40.0 ± 0.0 | **40.0 ± 0.0** | - | **0.500 ± 0.000** |\n"
    )


def test_latex():
    """One column for each heading, the first to the left; what TeX would read is escaped."""
    rows = [[("fed_em", False), ("55.0 ± 5.0", True)], [("local", False), ("40 %", False)]]
    assert report.latex(["", "mean_a in %"], rows).splitlines() == [
        r"\begin{tabular}{lc}",
        r"\toprule",
        r" & mean\_a in \% \\",
        r"\midrule",
        r"fed\_em & \textbf{55.0 $\pm$ 5.0} \\",
        r"local & 40 \% \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    headings, rows = report.table(TWO, ACCURACY)
    assert report.latex(headings, rows).startswith(r"\begin{tabular}{lcccc}")


# --- Runs.


def test_draws_of_the_data_are_seeds_too(tmp_path):
    """Their final values are pooled, and their rows keep apart by the seed of the data.

    Other settings are other runs.
    """
    runs = report.group(
        [
            finished(tmp_path / "a", [row(1, accuracy=0.1)], 3, seeds=(0, 1), accuracy=(0.1, 0.3)),
            finished(tmp_path / "b", [row(1, accuracy=0.4)], 4, seeds=(0, 1), accuracy=(0.4, 0.8)),
            finished(tmp_path / "c", [row(1, accuracy=0.2)], 3, step=2, accuracy=(0.2,)),
        ]
    )
    assert [own.name for own in runs] == ["a", "c"]
    assert runs[0].directories == [tmp_path / "a", tmp_path / "b"]
    pooled = runs[0].summary
    assert pooled["seeds"] == [0, 1, 0, 1]
    own = pooled["metrics"]["train_clients"]["accuracy"]
    assert own["final"] == [0.1, 0.3, 0.4, 0.8]
    np.testing.assert_allclose([own["final_mean"], own["final_std"]], [0.4, np.std(own["final"])])
    assert [(one["seed"], one["accuracy"]) for one in runs[0].rows] == [("3/0", 0.1), ("4/0", 0.4)]


def test_runs_are_named_by_their_algorithms_where_these_differ(tmp_path):
    first = finished(tmp_path / "a", algorithm="fedem")
    assert [own.name for own in report.group([first, finished(tmp_path / "b")])] == [
        "fedem",
        "fedavg",
    ]
    names = ["data.seed=1-x", "data.seed=2-x", "data.seed=1-y"]
    alike = [finished(tmp_path / name, step=n) for n, name in enumerate(names)]
    # Without the seed of the data two of these would be called alike.
    assert [own.name for own in report.group(alike)] == [*names[:2], "y"]
    other = finished(tmp_path / "deep" / "a", step=2)
    with pytest.raises(ValueError, match="two runs have the same name"):
        report.group([finished(tmp_path / "wide" / "a"), other])


def test_a_report_writes_what_it_prints(tmp_path, capsys):
    """The table has the comparisons as its last columns; the curves stand beside it."""
    rows = [row(n, seed, accuracy=0.1 * n) for seed in (0, 1) for n in (1, 2, 3)]
    last = rows + [row(3, seed, client=0, accuracy=0.3) for seed in (0, 1)]
    better = [{**one, "accuracy": 1.5 * one["accuracy"]} for one in last]
    directories = [
        finished(tmp_path / "a", last, seeds=(0, 1), accuracy=(0.3, 0.3)),
        finished(tmp_path / "b", better, algorithm="fedem", seeds=(0, 1), accuracy=(0.45, 0.45)),
    ]
    out = tmp_path / "out"
    report.report(directories, out, "fedavg", "accuracy=0.3")
    assert (out / "report.md").read_text().splitlines() == [
        "|  | accuracy (%) | improvement over fedavg in % | rounds to accuracy=0.3 |",
        "|---|---|---|---|",
        "| fedavg | 30.0 ± 0.0 | 0.0 ± 0.0 | 3 ± 0 |",
        "| fedem | **45.0 ± 0.0** | 50.0 ± 0.0 | 2 ± 0 |",
    ]
    assert (out / "report.tex").read_text().startswith(r"\begin{tabular}{lccc}")
    assert {path.name for path in out.iterdir()} == {
        *("report.md", "report.tex", "curves.png", "curves.pdf", "clients.png", "clients.pdf")
    }
    printed = capsys.readouterr().out
    assert "over 2 seeds" in printed and "45.0 ± 0.0" in printed


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report.plots, "curves", lambda *_: None)
    monkeypatch.setattr(report.plots, "client_distributions", lambda *_: None)
    own = str(finished(tmp_path / "a", [row(2, accuracy=0.5)], accuracy=(0.5,)))
    report.main([own, f"--output={tmp_path / 'x'}", "--reference=fedavg", "--rounds", "2"])
    assert "at round 2 in %" in (tmp_path / "x" / "report.md").read_text()
    with pytest.raises(SystemExit):
        report.main([own, "--rounds", "2"])
    assert "name that run with --reference" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no run is called 'fedem'; there are fedavg"):
        report.main([own, f"--output={tmp_path / 'x'}", "--reference=fedem"])
    with pytest.raises(SystemExit, match="does not look like metric=value"):
        report.main([own, f"--output={tmp_path / 'x'}", "--target=accuracy"])


# --- Comparisons.

RMSE = described(all=dense.depth())


def test_primary_metrics_of_rows():
    """One of each task, of what a row holds and its task calls primary."""
    of_two = tasks.joint({"depth": (dense.depth(), 1.0), "sal": (dense.saliency(), 1.0)})
    descriptions = described(all=CLASSES) | described(b=of_two)
    assert comparisons.primary_metrics({"rmse": 1, "accuracy": 2, "loss": 3}, descriptions) == [
        "accuracy"
    ]
    assert comparisons.primary_metrics({"loss": 2.0, "accuracy_std": 1.0}, descriptions) == []
    mixed = {"group": "b", "depth/loss": 1, "depth/rmse": 1, "sal/max_f": 1, "sal/max_iou": 1}
    assert comparisons.primary_metrics(mixed, descriptions) == ["depth/rmse", "sal/max_f"]


def test_only_the_training_clients_are_compared():
    """Not single clients, and not other splits; every task of every group counts alike."""
    edges = tasks.joint({"depth": (dense.depth(), 1.0), "edge": (dense.edges(), 1.0)})
    descriptions = described(a=CLASSES, b=edges)
    rows = [
        {**row(2, accuracy=0.6), "group": "a"},
        {**row(2, **{"depth/rmse": 2.0, "edge/pixel_loss": 0.5}), "group": "b"},
        {**row(2, accuracy=9.0, client=0), "group": "a"},
        {**row(2, accuracy=9.0), "split": "unseen_clients", "group": "a"},
        {**row(2, loss=9.0), "split": "server"},
    ]
    assert comparisons.values_by_task(rows, descriptions) == {
        (2, 0): {"a/accuracy": 0.6, "b/depth/rmse": 2.0, "b/edge/pixel_loss": 0.5}
    }
    reference = [
        {**row(1, accuracy=0.1), "group": "a"},
        {**row(7, accuracy=0.5), "group": "a"},
        {**row(7, **{"depth/rmse": 4.0, "edge/pixel_loss": 1.0}), "group": "b"},
    ]
    gains = comparisons.improvements(rows, reference, descriptions)
    np.testing.assert_allclose(gains[2], [100 * (0.1 / 0.5 + 0.5 + 0.5) / 3])


def test_improvements_by_round_and_seed():
    reference = [row(10, seed, rmse=2.0 + seed) for seed in (0, 1)]
    rows = [
        row(number, seed, rmse=(2.0 + seed) * factor)
        for number, factor in ((2, 1.5), (10, 0.5))
        for seed in (1, 0)
    ]
    gains = comparisons.improvements(rows, reference, RMSE)
    assert list(gains) == [2, 10]
    np.testing.assert_allclose([gains[2], gains[10]], [[-50, -50], [50, 50]])


def test_rounds_to_a_target_are_the_first():
    """Reaching it exactly counts, and so does reaching it once."""
    values = {0: (0.2, 0.7, 0.4), 1: (0.1, 0.2, 0.5)}
    rows = [
        row(5 * n, seed, accuracy=value, loss=value)
        for seed, own in values.items()
        for n, value in enumerate(own)
    ]
    assert comparisons.rounds_to(rows, "accuracy", 0.5, ACCURACY) == [5, 10]
    assert comparisons.rounds_to(rows, "accuracy", 0.6, ACCURACY) == [5, np.inf]
    assert comparisons.rounds_to(rows, "loss", 0.1, ACCURACY) == [np.inf, 0]
    rows.append(row(0, 2, client=0, accuracy=1))
    assert comparisons.rounds_to(rows, "accuracy", 0.1, ACCURACY) == [0, 0]


def test_spreads_of_what_was_reached():
    """Over those that reached it, who are counted where some did not."""
    rows = [row(n, seed, accuracy=0.1 * n + 0.2 * seed) for seed in (0, 1) for n in (1, 3)]
    own = report.Runs("a", [], {}, rows, ACCURACY)
    for target, text in (("0.3", "2 ± 1"), ("0.5", "3 ± 0 (1 of 2)"), ("0.9", "never")):
        headings, cells = report.compared([own], None, f"accuracy={target}")
        assert headings == [f"rounds to accuracy={target}"] and cells == [[text]]
    assert report.compared([own], None, None) == ([], [[]])


# --- Curves.


def panel(group=None, **settings):
    return plots.Panel("train_clients", "loss", "title", "label", group=group, **settings)


def test_series_of_curves():
    """Rounds that all seeds have, in order; single clients and other groups are left out."""
    rows = [row(4, 1, loss=0.4), row(2, 0, loss=0.2), row(4, 0, loss=0.3), row(2, 1, loss=0.1)]
    rows += [row(6, 0, loss=0.5), row(2, 0, loss=9.0, client=3)]
    rows.append({**row(2, 0, loss=8.0), "group": "g"})
    rounds, values = plots.series(rows, panel())
    np.testing.assert_array_equal(rounds, [2, 4])
    np.testing.assert_array_equal(values, [[0.2, 0.1], [0.3, 0.4]])
    np.testing.assert_array_equal(plots.series(rows, panel("g"))[1], [[8.0]])
    np.testing.assert_array_equal(plots.series(rows, panel("g", scale=100.0))[1], [[800.0]])


def test_more_runs_than_colours():
    styles = plots._styles(25)
    assert len({tuple(own.items()) for own in styles}) == 25
    assert {own["linestyle"] for own in styles[:10]} == {"-"}
    assert styles[10] == {"color": "C0", "linestyle": "--"}


# --- Summaries and files of a run.


def test_summaries_of_a_run():
    """The last value of each seed, and the round whose mean was best, of every metric."""
    values = {"accuracy": [(0.1, 0.3), (0.7, 0.5), (0.4, 0.6)], "loss": [(3, 1), (1, 2), (2, 3)]}
    rows = [
        row(5 * n, seed, **{name: float(own[n][seed]) for name, own in values.items()})
        for n in range(3)
        for seed in (1, 0)
    ]
    rows.append(row(10, 0, client=0, accuracy=99.0))
    rows.append({**row(10, 0, accuracy=0.5), "group": "g", "task": "t"})
    rows.append({**row(10, 1, accuracy=0.25), "group": "g", "task": "t"})
    descriptions = ACCURACY | described(g=CLASSES)
    own = metric_rows.summarise(rows, (0, 1), descriptions)["train_clients"]
    assert set(own) == {"accuracy", "loss", "g/accuracy"}
    assert own["accuracy"]["final"] == [0.4, 0.6] and own["accuracy"]["best_round"] == 5
    for name, found in (("accuracy", (0.5, 0.1, 0.6, 0.1)), ("loss", (2.5, 0.5, 1.5, 0.5))):
        names = ("final_mean", "final_std", "best_mean", "best_std")
        np.testing.assert_allclose([own[name][n] for n in names], found, err_msg=name)
    assert own["loss"]["best_round"] == 5
    assert own["g/accuracy"]["final"] == [0.5, 0.25]


def test_what_the_progress_bar_shows():
    """Means over seeds of the training clients, and the primary metric of those held out."""
    rows = [
        row(1, 0, accuracy=0.5, loss=1.0, accuracy_std=0.1, accuracy_bottom_decile=0.2),
        row(1, 1, accuracy=0.7, loss=2.0, accuracy_bottom_decile=0.4),
        row(1, 0, accuracy=9.0, client=0),
        {**row(1, 0, accuracy=0.2, loss=9.0), "split": "unseen_clients"},
        {**row(1, 1, accuracy=0.4), "split": "unseen_clients"},
        {**row(1, 0, loss=7.0), "split": "server"},
    ]
    shown = metric_rows.shown(rows, ACCURACY)
    assert set(shown) == {"accuracy", "decile", "unseen", "loss"}
    expected = {"accuracy": 0.6, "decile": 0.3, "unseen": 0.3, "loss": 1.5}
    for name, value in expected.items():
        np.testing.assert_allclose(shown[name], value, err_msg=name)


def test_progress_without_a_terminal_is_about_ten_lines(capsys):
    with Progress("fedem", 100, 20) as progress:
        for done in range(20, 101):
            progress.show(done, {"accuracy": 0.51234, "loss": 2.0})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" rounds")[0] for line in lines] == [
        f"fedem {done}/100" for done in range(20, 101, 10)
    ]
    assert lines[-1].endswith("acc 0.512 loss 2.000")


def test_metrics_are_not_written_twice(tmp_path):
    """What was logged after the checkpoint is there already; a torn line is cut away."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(row(n)) + "\n" for n in (1, 2, 2, 3)]
    path.write_text("".join(lines[:3]) + '{"round": 3, "se')
    resumed = workdir.MetricsFile(path, 1)
    resumed.write([row(2)])
    resumed.write([row(2), row(3)])
    assert path.read_text() == "".join(lines)
    assert [one["round"] for one in workdir.read_rows(path)] == [1, 2, 2, 3]


def test_rows_that_are_not_finite():
    workdir.check_finite([row(1, loss=1.0, diverged=0.0, task="inf")])
    with pytest.raises(FloatingPointError, match="loss of train_clients is inf in round 3, seed 2"):
        workdir.check_finite([row(1, loss=1.0), row(3, 2, loss=float("inf"))])
    with pytest.raises(FloatingPointError, match="1.5 clients a round .* before round 4, seed 0"):
        workdir.check_finite([row(4, diverged=1.5)])


def test_checkpoints_are_saved_as_often_as_asked(tmp_path):
    """Four rounds, judged after each: after the second and at the end; the metrics have all."""
    config = fedem_synthetic.get_config("quick")
    config.algorithm.name = "fedavg"
    config.seeds = (0,)
    config.num_rounds, config.eval_every, config.checkpoint_every = 4, 1, 2
    run.run(config, tmp_path / "run")
    saved = {
        path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()
    }
    assert saved == {"2", "4"}
    rows = list(workdir.read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert sorted({one["round"] for one in rows}) == [0, 1, 2, 3, 4]
