"""A launcher's run of two stages of different structure, killed in each of them and taken up."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import fedem_synthetic
from experiments import registry, run
from experiments.outputs import workdir
from experiments.outputs.checkpoints import Checkpoints
from fedjax_mtl import Execution, Model, Solver, Stage, Task, algorithms
from fedjax_mtl.core.checks import InputError


def merge_then_mixture(
    model: Model,
    task: Task,
    *,
    num_clients: int,
    solver: Solver,
    merge_rounds: int = 3,
    num_components: int = 2,
    execution: Execution | None = None,
) -> list[Stage]:
    """FedAvg, then FedEM whose components start around what it learned."""
    around = {"num_clients": num_clients, "solver": solver, "execution": execution}

    def merge(previous):
        return algorithms.fedavg(model, task, **around), None

    def mixture(previous):
        algorithm = algorithms.fedem(model, task, num_components=num_components, **around)
        seeds = len(jax.tree.leaves(previous.params)[0])
        fresh = jax.vmap(algorithm.init)(jax.vmap(jax.random.key)(jnp.arange(seeds)))
        params = jax.tree.map(lambda w, x: w[:, None] + 0.1 * x, previous.params, fresh.params)
        return algorithm, fresh._replace(params=params)

    return [Stage(merge, merge_rounds, "merge"), Stage(mixture, 3, "mixture")]


@pytest.fixture
def config(monkeypatch):
    staged = {**registry.ALGORITHMS, "merge_then_mixture": merge_then_mixture}
    monkeypatch.setattr(registry, "ALGORITHMS", staged)
    made = fedem_synthetic.get_config("quick")
    changes = {"num_rounds": 6, "eval_every": 1, "checkpoint_every": 1, "seeds": (0, 1)}
    made.update_from_flattened_dict({"algorithm.name": "merge_then_mixture", **changes})
    return made


@pytest.fixture(scope="module")
def kept():
    return {}


def whole(config, kept, tmp_path_factory):
    """The uninterrupted run, made once."""
    if not kept:
        directory = tmp_path_factory.mktemp("whole") / "run"
        kept.update(directory=directory, summary=run.run(config, directory))
    return kept["directory"], kept["summary"]


def test_metrics_and_summary_know_the_stages(config, kept, tmp_path_factory):
    directory, summary = whole(config, kept, tmp_path_factory)
    rows = list(workdir.read_rows(directory / "metrics.jsonl"))
    by_stage = {
        name: {row["round"] for row in rows if row["stage"] == name}
        for name in ("merge", "mixture")
    }
    assert by_stage == {"merge": {0, 1, 2, 3}, "mixture": {4, 5, 6}}
    assert summary["stages"] == [{"name": "merge", "rounds": 3}, {"name": "mixture", "rounds": 3}]
    assert summary["metrics"]["train_clients"]["accuracy"]["best_round"] in range(7)
    # What travels at the end are two components of 20 weights and a bias.
    assert summary["bytes_up_per_round"] == 19 * 2 * 21 * 4
    assert (
        json.loads((directory / "config.json").read_text())["algorithm"]["merge_then_mixture"][
            "num_components"
        ]
        == 2
    )


@pytest.mark.parametrize("where", ["stage 1", "its end", "boundary", "stage 2"])
def test_killed_in_any_stage_it_ends_the_same(
    where, config, kept, tmp_path, tmp_path_factory, monkeypatch
):
    expected, _ = whole(config, kept, tmp_path_factory)
    write, save = workdir.MetricsFile.write, Checkpoints.save

    def failing_write(self, rows):
        if rows[0]["round"] == {"stage 1": 2, "its end": 3, "stage 2": 5}.get(where):
            raise KeyboardInterrupt
        write(self, rows)

    def failing_save(self, round_index, state, meta):
        if where == "boundary" and round_index == 3 and "stages" not in str(self._directory):
            raise KeyboardInterrupt  # the stage's end is kept, the checkpoint is not
        save(self, round_index, state, meta)

    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(workdir.MetricsFile, "write", failing_write)
        patch.setattr(Checkpoints, "save", failing_save)
        with pytest.raises(KeyboardInterrupt):
            run.run(config, directory)
    run.run(config, directory)
    ours, theirs = ((place / "metrics.jsonl").read_bytes() for place in (directory, expected))
    assert ours == theirs
    states = []
    for place in (directory, expected):
        manager = Checkpoints(place / "checkpoints")
        assert manager.latest_round() == 6
        manager.close()
        states.append(sorted(path.name for path in (place / "stages").iterdir()))
    assert states[0] == states[1]


def test_started_again_at_a_boundary_it_goes_on(
    config, kept, tmp_path, tmp_path_factory, monkeypatch
):
    """Killed between the first stage's last checkpoint and the second's first one."""
    expected, _ = whole(config, kept, tmp_path_factory)
    write = workdir.MetricsFile.write

    def failing(self, rows):
        if rows[0]["round"] == 4:
            raise KeyboardInterrupt
        write(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(workdir.MetricsFile, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            run.run(config, tmp_path / "run")
    run.run(config, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        expected / "metrics.jsonl"
    ).read_bytes()


def test_stages_of_other_lengths_are_refused(config, tmp_path):
    config.num_rounds = 8
    with pytest.raises(
        InputError, match="stages have 6 rounds together but config.num_rounds is 8"
    ):
        run.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rounds_of_nobody_are_null(tmp_path):
    """A round's means over nobody are null in the file, NaN when read, and no error."""
    made = fedem_synthetic.get_config("quick")
    made.update_from_flattened_dict(
        {"systems.drop_probability": 1.0, "num_rounds": 2, "eval_every": 1, "seeds": (0,)}
    )
    made.checkpoint_every = 1
    summary = run.run(made, tmp_path / "run")
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and '"loss": null' in text
    rows = list(workdir.read_rows(tmp_path / "run" / "metrics.jsonl"))
    of_rounds = [row for row in rows if row["split"] == "server"]
    assert all(np.isnan(row["loss"]) and row["participants"] == 0 for row in of_rounds)
    assert "best_mean" not in summary["metrics"]["server"]["loss"]
