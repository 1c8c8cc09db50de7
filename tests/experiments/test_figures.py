"""The figures beside the report's: rendered scenes with predictions, and MOCHA's round times."""

import json

import jax
import numpy as np
import pytest

from configs import fedbone_scenes
from experiments import assembly
from experiments.figures import round_times, scene_figures
from experiments.outputs import workdir
from experiments.outputs.checkpoints import Checkpoints
from experiments.outputs.stages import first_shapes
from experiments.plan import make_plan
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.data import rendered

# --- Round times.


def write_course(directory, method, *, passes, high=1.0, primal=(3.0, 1.05)):
    """A finished run of two nodes and two seeds, evaluated after rounds 5 and 10."""
    directory.mkdir(parents=True)
    config = {
        "algorithm": {"name": method, method: {} if passes is None else {"passes": passes}},
        "seeds": [0, 1],
        "systems": {"high": high},
    }
    (directory / "config.json").write_text(json.dumps(config))
    work = {"num_examples": 20.0, "slowest_steps": 4.0}
    rows = [
        {"round": done, "seed": seed, "split": "server", "primal": value + seed, "dual": 1.0} | work
        for done, value in zip((5, 10), primal, strict=True)
        for seed in (0, 1)
    ]
    rows += [
        {"round": 10, "seed": seed, "split": "train_clients", "client": client, "loss": 0.5}
        for seed in (0, 1)
        for client in (0, 1)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(lines)


def test_time_of_mocha_by_hand(tmp_path):
    """A round takes 8 flops for each step of all nodes, plus 10 for WiFi."""
    write_course(tmp_path / "mocha", "mocha", passes=0.5)
    course = round_times.read_course(tmp_path / "mocha")
    assert (course.name, course.method, course.num_tasks) == ("mocha", "mocha", 2)
    np.testing.assert_array_equal(course.primal, [3.0, 1.05])
    np.testing.assert_allclose(round_times.elapsed(course, "wifi"), [5 * 90, 10 * 90])
    np.testing.assert_allclose(round_times.elapsed(course, "3g"), [5 * 1080, 10 * 1080])


def test_stragglers_are_charged_at_the_largest_budget(tmp_path):
    write_course(tmp_path / "slow", "mocha", passes=0.5, high=0.25)
    course = round_times.read_course(tmp_path / "slow")
    np.testing.assert_allclose(round_times.elapsed(course, "wifi"), [5 * 50, 10 * 50])


def test_cocoa_waits_for_its_slowest_node(tmp_path):
    write_course(tmp_path / "cocoa", "cocoa", passes=None)
    course = round_times.read_course(tmp_path / "cocoa")
    np.testing.assert_allclose(round_times.elapsed(course, "wifi"), [5 * 74, 10 * 74])


def test_times_to_targets(tmp_path):
    for name, primal in {"fast": (1.5, 1.005), "slow": (3.0, 1.05)}.items():
        write_course(tmp_path / name, "mocha", passes=0.5, primal=primal)
    courses = [round_times.read_course(tmp_path / name) for name in ("fast", "slow")]
    table = round_times.times_to(courses, 1.0, "wifi")
    assert table == {"fast": [450.0, 900.0, 900.0], "slow": [900.0, 900.0, None]}


def test_round_times_are_drawn_and_printed(tmp_path, capsys):
    write_course(tmp_path / "runs" / "mocha", "mocha", passes=0.5)
    (tmp_path / "runs" / "unfinished").mkdir()
    round_times.main([str(path) for path in sorted((tmp_path / "runs").iterdir())])
    lines = capsys.readouterr().out.splitlines()
    assert "wifi: estimated time to a primal sub-optimality of 1.0, 0.1, 0.01" in lines
    assert lines[2].split() == ["mocha", "900", "900", "never"]
    for suffix in ("png", "pdf"):
        assert (tmp_path / "runs" / f"times.{suffix}").stat().st_size > 1000


def test_round_times_refuse_other_runs(tmp_path):
    with pytest.raises(SystemExit, match="name work directories of finished runs"):
        round_times.main([str(tmp_path)])
    write_course(tmp_path / "fedavg", "fedavg", passes=None)
    rows = list(workdir.read_rows(tmp_path / "fedavg" / "metrics.jsonl"))
    lines = [json.dumps({k: v for k, v in row.items() if k != "primal"}) + "\n" for row in rows]
    (tmp_path / "fedavg" / "metrics.jsonl").write_text("".join(lines))
    with pytest.raises(SystemExit, match="fedavg has no primal values"):
        round_times.main([str(tmp_path / "fedavg")])


# --- Scenes.


def test_labels_as_images():
    ignored = np.full((1, 2, 3), rendered.IGNORE, np.float32)
    ignored[0, 1] = [0.0, 1.0, -1.0]
    picture, style = scene_figures.shown("normals", ignored)
    np.testing.assert_allclose(picture, [[[1, 1, 1], [0.5, 1, 0]]])
    assert style == {}
    picture, style = scene_figures.shown("semseg", np.array([[[3.0], [rendered.IGNORE]]]))
    np.testing.assert_array_equal(picture.mask, [[False, True]])
    assert style["vmax"] == max(rendered.NUM_SEMSEG.values()) - 1
    picture, _ = scene_figures.shown("image", np.full((1, 1, 3), 51.0))
    np.testing.assert_allclose(picture, 0.2)


def test_predictions_in_the_form_of_labels():
    classes = np.array([[[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]]])
    np.testing.assert_array_equal(scene_figures.decoded("semseg", classes), [[[1], [0]]])
    two = np.array([[[0.0, 0.0], [0.0, 100.0]]])
    np.testing.assert_allclose(scene_figures.decoded("sal", two), [[[0.5], [1.0]]])
    np.testing.assert_allclose(scene_figures.decoded("edge", np.zeros((1, 1, 1))), [[[0.5]]])
    depth = np.array([[[2.0]]])
    assert scene_figures.decoded("depth", depth) is depth


def test_a_rendered_scene_is_drawn(tmp_path, capsys):
    output = tmp_path / "scene.png"
    scene_figures.main(["--domain=B", "--index=1", "--size=tiny", f"--output={output}"])
    assert capsys.readouterr().out == f"written: {output}\n"
    assert output.stat().st_size > 1000
    titles = [title for title, _ in scene_figures.of_scene("B", 1, "tiny")]
    assert titles[0] == "image" and {"semseg", "human_parts", "normals"} < set(titles)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where the scenes are kept after the first rendering."""
    return tmp_path_factory.mktemp("tfds")


def untrained_run(directory, data_dir):
    """A work directory on one task of the rooms, with a checkpoint of what was initialised."""
    config = fedbone_scenes.get_config("quick")
    config.algorithm.name = "fedavg"
    config.data.update(data_dir=str(data_dir), domains=("A",))
    plan = make_plan(config)
    workdir.claim(directory, plan.settings)
    algorithm, _ = assembly.make_algorithm(plan, assembly.make_problem(plan))
    shapes = first_shapes(algorithm, len(plan.course.seeds))
    checkpoints = Checkpoints(directory / "checkpoints")
    checkpoints.save(1, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), {})
    checkpoints.close()


def test_predictions_of_a_run(tmp_path, data_dir):
    untrained_run(tmp_path / "run", data_dir)
    ((image, label, prediction),) = scene_figures.of_run(tmp_path / "run", 61)
    assert [image[0], label[0], prediction[0]] == ["image", "depth (A_depth)", "depth predicted"]
    expected = dict(scene_figures.of_scene("A", 1, "tiny", extras=False))
    np.testing.assert_allclose(image[1], expected["image"], atol=1e-3)
    np.testing.assert_array_equal(label[1], expected["depth"])
    np.testing.assert_array_equal(prediction[1], np.zeros_like(label[1]))  # of zero parameters


def test_runs_without_predictions_are_refused(tmp_path, data_dir):
    with pytest.raises(SystemExit, match="config.json"):
        scene_figures.main([f"--workdir={tmp_path}"])
    untrained_run(tmp_path / "run", data_dir)
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="holds no checkpoint; run it first"):
        scene_figures.of_run(tmp_path / "run", 0)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"] = {"name": "digits"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no run on scenes; its data are 'digits'"):
        scene_figures.of_run(tmp_path / "run", 0)
