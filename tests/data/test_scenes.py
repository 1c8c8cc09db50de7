"""The rendered scenes as data sets: made once, read back equal, federated, learnable."""

import jax
import numpy as np
import optax
import pytest

from fedjax_mtl import models, tasks
from fedjax_mtl.clients import training
from fedjax_mtl.core import batching, federation
from fedjax_mtl.data import rendered, scenes
from fedjax_mtl.data.task_problems import scenes_problem

FIELDS = {
    "size": "tiny",
    "profile": "tiny",
    "domains": ("A", "B"),
    "tasks_a": ("semseg", "normals", "edge", "depth"),
    "tasks_b": ("semseg", "human_parts", "normals", "edge"),
    "single_task": True,
    "clients_per_group": 1,
    "train_fraction": 1.0,
    "edge_weight": 0.95,
    "seed": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


def test_what_was_rendered_is_read_back(folder):
    made = scenes.load_scenes("A", size="tiny", profile="tiny", data_dir=folder)
    assert len(made["train"]["image"]) == rendered.LENGTHS["tiny"]["A"]["train"]
    assert len(made["test"]["depth"]) == rendered.LENGTHS["tiny"]["A"]["test"]
    one = rendered.preprocess(rendered.render("A", "train", 7, "tiny"))
    for name in ("image", "semseg", "normals", "edge", "depth"):
        np.testing.assert_array_equal(made["train"][name][7], one[name].astype(np.float32))
    again = scenes.load_scenes("A", size="tiny", profile="tiny", data_dir=folder)
    np.testing.assert_array_equal(made["train"]["image"], again["train"]["image"])


def test_extras_are_sets_of_their_own(folder):
    made = scenes.load_scenes("B", size="tiny", profile="tiny", extras=True, data_dir=folder)
    assert set(rendered.EXTRAS) <= set(made["train"])


def test_a_population_of_scenes(folder):
    problem = scenes_problem(data_dir=folder, **FIELDS)
    assert sorted(problem.splits.train) == sorted(
        [f"A_{t}" for t in FIELDS["tasks_a"]] + [f"B_{t}" for t in FIELDS["tasks_b"]]
    )
    sizes = {name: int(f.sizes.sum()) for name, f in problem.splits.train.items()}
    assert all(sizes[f"A_{t}"] == 10 for t in FIELDS["tasks_a"])
    assert all(sizes[f"B_{t}"] == 15 for t in FIELDS["tasks_b"])
    assert set(problem.splits.train["A_depth"].examples["labels"]) == {"depth"}
    owned = np.concatenate(
        [np.asarray(problem.splits.train[f"A_{t}"].indices[0]) for t in FIELDS["tasks_a"]]
    )
    assert len(set(owned.tolist())) == 40  # disjoint, and together everything
    joint = scenes_problem(
        data_dir=folder, **{**FIELDS, "single_task": False, "clients_per_group": 4}
    )
    assert joint.splits.train["A"].num_clients == 4
    assert joint.groups["B"].outputs["human_parts"] == 7


@pytest.mark.claim
def test_a_tiny_model_overfits_eight_images_on_all_tasks(folder):
    """The labels can be learned from the images, all together by one encoder."""
    problem = scenes_problem(data_dir=folder, **{**FIELDS, "single_task": False, "domains": ("A",)})
    own = problem.splits.train["A"]
    model = models.multi_decoder(*problem.groups["A"][2:4], "tiny")
    task = problem.task["A"]
    losses = tasks.example_losses(model, task)
    view = federation.ClientView(
        own.examples,
        own.indices[0][:8],
        np.int32(8),
        np.int32(0),
        np.int32(federation.NO_BUDGET),
        np.int32(0),
        jax.random.key(0),
    )
    optimizer = optax.adam(1e-2)

    @jax.jit
    def overfit(key):
        params = model.init(key)
        before = training.local_losses(losses, params, view)
        trained = training.train(
            training.loss_gradient(losses),
            optimizer,
            batching.steps(250, None),
            params,
            optimizer.init(params),
            view,
            key,
        )
        outputs = model.apply(trained.params, own.examples["inputs"][view.rows], None)
        labels = jax.tree.map(lambda x: x[view.rows], own.examples["labels"])
        finals = {
            name: metric.finish(jax.tree.map(lambda x: x.sum(0), metric.measure(outputs, labels)))
            for name, metric in task.metrics.items()
            if metric.finish is not None
        }
        return before, training.local_losses(losses, trained.params, view), finals

    before, after, finals = overfit(jax.random.key(0))
    assert after.mean() < 0.35 * before.mean()
    assert finals["semseg/miou"] > 0.5
    assert finals["depth/rmse"] < 0.7
    assert finals["normals/angle_error"] < 20


def test_bad_arguments(folder):
    with pytest.raises(
        ValueError, match="unknown domain 'C' of rendered scenes; expected one of A, B"
    ):
        scenes.load_scenes("C", data_dir=folder)
    with pytest.raises(ValueError, match="unknown size 'huge'"):
        scenes.load_scenes("A", size="huge", data_dir=folder)
    with pytest.raises(
        ValueError, match="unknown task 'sal' in config.data.tasks_a; expected one of semseg"
    ):
        scenes_problem(data_dir=folder, **{**FIELDS, "tasks_a": ("sal",)})
    with pytest.raises(ValueError, match="train_fraction is 0"):
        scenes_problem(data_dir=folder, **{**FIELDS, "train_fraction": 0})
