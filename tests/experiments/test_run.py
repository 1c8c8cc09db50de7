"""The launchers' contracts: what a work directory holds, resume to the bit, refusal, reports."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import fedem_digits, fedem_synthetic, relational_digits
from experiments import report, run, sweep
from experiments.outputs import telemetry, workdir
from experiments.plan import make_plan
from fedjax_mtl.core.checks import InputError

ROOT = pathlib.Path(__file__).parents[2]


def quick(**changes):
    config = fedem_synthetic.get_config("quick")
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished quick run."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    return directory, run.run(quick(), directory)


def test_a_work_directory_holds_what_is_promised(finished):
    directory, summary = finished
    names = {path.name for path in directory.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "curves.png",
        "checkpoints",
        "events",
    } <= names
    assert json.loads((directory / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert list((directory / "events").glob("events.out.tfevents*"))
    rows = list(workdir.read_rows(directory / "metrics.jsonl"))
    assert {row["round"] for row in rows} == {0, 2, 4}
    assert {row["seed"] for row in rows} == {0, 1, 2}
    assert {row["split"] for row in rows} == {"server", "train_clients", "unseen_clients"}
    last = [row for row in rows if row["split"] == "train_clients" and row["round"] == 4]
    assert sum("client" in row for row in last) == 3 * 19
    accuracy = summary["metrics"]["train_clients"]["accuracy"]
    np.testing.assert_allclose(accuracy["final_mean"], np.mean(accuracy["final"]))
    for name in (
        "wall_seconds",
        "compile_seconds",
        "rounds_per_second",
        "bytes_up_per_round",
        "device",
        "versions",
    ):
        assert summary[name]
    # 19 clients send three components of 20 weights and a bias in float32.
    assert summary["bytes_up_per_round"] == 19 * 3 * 21 * 4


def test_starting_a_finished_run_again_changes_nothing(finished):
    directory, summary = finished
    before = (directory / "metrics.jsonl").read_bytes()
    again = run.run(quick(), directory)
    assert (directory / "metrics.jsonl").read_bytes() == before
    assert again["metrics"] == summary["metrics"]


def test_a_directory_of_another_config_is_refused(finished):
    directory, _ = finished
    before = (directory / "metrics.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=r"different config.*client\.batch_size: 128 there, 16 now"
    ):
        run.run(quick(**{"client.batch_size": 16}), directory)
    assert (directory / "metrics.jsonl").read_bytes() == before


def test_a_run_taken_up_from_a_checkpoint_ends_the_same(finished, tmp_path):
    directory, _ = finished
    # Half a run: stop by an error after the first block, as if the machine had gone.
    real, calls = workdir.MetricsFile.write, []

    def failing(self, rows):
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, rows)

    workdir.MetricsFile.write = failing
    try:
        with pytest.raises(KeyboardInterrupt):
            run.run(quick(), tmp_path / "run")
    finally:
        workdir.MetricsFile.write = real
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "se')  # a torn line
    run.run(quick(), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        directory / "metrics.jsonl"
    ).read_bytes()


def launch(directory, *overrides):
    command = [sys.executable, "-m", "experiments.run", "--config=configs/fedem_synthetic.py:quick"]
    command += [f"--workdir={directory}", "--config.num_rounds=40", "--config.eval_every=1"]
    command += ["--config.checkpoint_every=1", *overrides]
    environment = dict(
        os.environ, JAX_COMPILATION_CACHE_DIR=str(ROOT / ".jax_cache"), JAX_PLATFORMS="cpu"
    )
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def final_state(directory):
    """The bytes of the metrics, and the newest checkpoint's leaves."""
    from experiments.outputs.checkpoints import Checkpoints
    from experiments.outputs.stages import first_shapes

    config = quick(num_rounds=40, eval_every=1, checkpoint_every=1)
    stages = run.prepare(make_plan(config), run.Made()).stages
    algorithm, _ = stages[0].build(None)
    checkpoints = Checkpoints(directory / "checkpoints")
    state, _ = checkpoints.restore(40, first_shapes(algorithm, 3))
    checkpoints.close()
    return (directory / "metrics.jsonl").read_bytes(), run.jax.tree.leaves(state)


@pytest.mark.claim
def test_a_killed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole = launch(tmp_path / "whole")
    assert whole.wait() == 0, whole.stdout.read()
    metrics, leaves = final_state(tmp_path / "whole")
    directory = tmp_path / "killed"
    kills = 0
    # The run is killed at whatever it is doing. Waiting for a temporary checkpoint directory hits
    # the middle of a save.
    for wait_for_save in (False, True, False, True, True):
        process = launch(directory)
        goal = time.time() + 120
        lines = len(list(workdir.read_rows(directory / "metrics.jsonl")))
        while process.poll() is None and time.time() < goal:
            grown = len(list(workdir.read_rows(directory / "metrics.jsonl"))) > lines + 20
            saving = list((directory / "checkpoints").glob("*tmp*"))
            if grown and (saving or not wait_for_save):
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        process.wait()
    assert kills >= 3
    process = launch(directory)
    assert process.wait() == 0, process.stdout.read()
    killed_metrics, killed_leaves = final_state(directory)
    assert killed_metrics == metrics
    for ours, theirs in zip(killed_leaves, leaves, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.cohort_size=500", "error: config.cohort_size is 500 but 19 clients train"),
        (
            "--config.cohort=5",
            "error: the config or one of its settings is unknown "
            ".*'cohort'.* given: .*--config.cohort=5",
        ),
        ("--config.num_rounds=many", "flag --config.num_rounds=many: invalid literal for int"),
    ],
)
def test_the_command_line_names_bad_fields(override, message, tmp_path):
    process = launch(tmp_path / "bad", override)
    output = process.communicate()[0]
    assert process.returncode == 1
    assert re.search(message, output), output
    assert "Traceback" not in output
    assert not (tmp_path / "bad").exists()


def test_divergence_is_reported_and_what_was_logged_is_kept(tmp_path):
    config = quick(**{"algorithm.fedem.learning_rate": 1e38, "client.weight_decay": 0.5})
    with pytest.raises(
        FloatingPointError, match=r"round \d+, seed 0; training diverged: lower the learning rate"
    ):
        run.run(config, tmp_path / "run")
    rows = list(workdir.read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert {row["round"] for row in rows} == {0}


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    directory, _ = finished
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(directory), str(copy)], check=True)
    for path in (copy / "checkpoints" / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"garbage")
    with pytest.raises(RuntimeError, match=r"checkpoints/4 cannot be read .*delete that directory"):
        run.run(quick(), copy)


def test_sweep_and_report(tmp_path):
    config = fedem_digits.get_config("quick")
    sweep.sweep(config, ["algorithm.name=fedem,fedavg"], tmp_path)
    table = (tmp_path / "report.md").read_text()
    assert "fedem" in table and "fedavg" in table and "**" in table and "±" in table
    assert r"\begin{tabular}" in (tmp_path / "report.tex").read_text()
    for name in ("curves.png", "curves.pdf", "clients.png", "clients.pdf"):
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(ValueError, match="cannot set config.algorithm.nam"):
        sweep.sweep(config, ["algorithm.nam=fedem"], tmp_path)
    with pytest.raises(ValueError, match="does not look like field=value"):
        sweep.parse_grid("nonsense")


@pytest.mark.parametrize(
    "text, values",
    [
        ("(64,32),(32,)", [(64, 32), (32,)]),
        ("1,2.5,abc", [1, 2.5, "abc"]),
        (
            "learned(smoothness=0.5, decay=0.1),group",
            ["learned(smoothness=0.5, decay=0.1)", "group"],
        ),
        ("('average, sgd(learning_rate=3.0)')", ["average, sgd(learning_rate=3.0)"]),
        ("data/a b,100.txt", ["data/a b", "100.txt"]),
        ("None,True", [None, True]),
    ],
)
def test_a_grid_is_split_where_python_would(text, values):
    assert sweep.parse_grid(f"field={text}") == ("field", values)


def test_a_sweep_loads_data_once(tmp_path, monkeypatch):
    made = []
    real = run.assembly.make_problem
    monkeypatch.setattr(run.assembly, "make_problem", lambda plan: made.append(plan) or real(plan))
    config = fedem_digits.get_config("quick")
    config.update(num_rounds=2, eval_every=2, seeds=(0,))
    sweep.sweep(config, ["algorithm.name=fedavg,local"], tmp_path)
    assert len(made) == 1


def test_a_finished_run_goes_on_with_more_rounds(tmp_path):
    config = fedem_digits.get_config("quick")
    config.update(seeds=(0,), num_rounds=2)
    config.algorithm.name = "fedavg"
    run.run(config, tmp_path / "run")
    config.num_rounds = 4
    longer = run.run(config, tmp_path / "run")
    whole = run.run(config, tmp_path / "whole")
    assert longer["metrics"]["train_clients"] == whole["metrics"]["train_clients"]
    config.num_rounds = 2
    with pytest.raises(ValueError, match="num_rounds: 4 there, 2 now"):
        run.run(config, tmp_path / "run")


def test_another_configs_directory_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"num_rounds": 3}')
    monkeypatch.setattr(run.assembly, "make_problem", None)
    with pytest.raises(ValueError, match="holds a run of a different config"):
        run.run(fedem_digits.get_config("quick"), tmp_path)


def test_a_bug_keeps_its_traceback():
    def broken():
        raise ValueError("zip() argument 2 is shorter than argument 1")

    with pytest.raises(ValueError, match="zip"):
        telemetry.exit_on_bad_input(broken)

    def refused():
        raise InputError("give another")

    with pytest.raises(SystemExit, match="error: give another"):
        telemetry.exit_on_bad_input(refused)


def test_fields_can_be_none_on_the_command_line(tmp_path):
    overrides = ["--config.client.batch_size=None", "--config.client.max_norm=2.5"]
    overrides += ["--config.algorithm.fedem.num_components=2", "--config.num_rounds=1"]
    process = launch(tmp_path / "run", *overrides)
    assert process.wait() == 0, process.stdout.read()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["client"]["batch_size"] is None and config["client"]["max_norm"] == 2.5
    assert config["algorithm"]["fedem"]["num_components"] == 2


def test_a_report_of_an_unfinished_run_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="has not finished"):
        report.report([tmp_path], tmp_path / "out")


ALGORITHMS = [
    *("agnostic", "apfl", "clustered", "decentralized_fedem", "ditto", "fedadam", "fedamp"),
    *("fedavg", "fedavg_tuned", "fedbn", "feddea", "fedem", "fedhca2", "fedmtl", "fedper"),
    *("fedprox", "fedrep", "fedu", "l2sgd", "lg_fedavg", "local", "matfl", "pfedme", "q_ffl"),
    "sheaf_fmtl",
]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_runs_from_a_config(name, tmp_path):
    config = relational_digits.get_config("quick")
    config.algorithm.name = name
    config.seeds = (0,)
    config.num_rounds, config.eval_every, config.checkpoint_every = 2, 2, 2
    summary = run.run(config, tmp_path / name)
    assert 0 <= summary["metrics"]["train_clients"]["accuracy"]["final_mean"] <= 1
