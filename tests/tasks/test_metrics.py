"""What metrics say about themselves: direction, unit, and which is primary."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_mtl import tasks
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.task import SHARE
from fedjax_mtl.rounds.infos import describe_info
from fedjax_mtl.tasks import dense, dual, rouge

LOWER = {
    "angle_error",
    "error",
    "loss",
    "normalised_error",
    "perplexity",
    "pixel_loss",
    "rmse",
    "squared_error",
    "token_loss",
}
HIGHER = {"accuracy", "max_f", "max_iou", "miou", "rouge_l"}

ALL = {
    "binary": (tasks.binary_classification(), "accuracy", SHARE),
    "classification": (tasks.classification(), "accuracy", SHARE),
    "sequence": (tasks.sequence_classification(), "accuracy", SHARE),
    "language": (tasks.language_modelling(), "accuracy", SHARE),
    "regression": (tasks.regression(), "squared_error", ""),
    "scaled": (tasks.mean_squared_error(), "normalised_error", ""),
    "rooted": (tasks.mean_squared_error(primary="rmse"), "rmse", ""),
    "hinge": (dual.dual_task(dual.hinge()), "accuracy", SHARE),
    "squared": (dual.dual_task(dual.squared()), "rmse", ""),
    "segmentation": (dense.segmentation("semseg", 3), "miou", SHARE),
    "depth": (dense.depth(), "rmse", "m"),
    "normals": (dense.normals(), "angle_error", "degrees"),
    "edges": (dense.edges(), "pixel_loss", ""),
    "saliency": (dense.saliency(), "max_f", SHARE),
    "pixels": (dense.pixel_regression("heat", unit="K"), "rmse", "K"),
}


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_task_says_how_it_is_compared(name):
    task, primary, unit = ALL[name]
    described = tasks.describe(task)
    assert [metric for metric, own in described.items() if own.primary] == [primary]
    assert described[primary].unit == unit
    assert set(described) <= LOWER | HIGHER
    for metric, own in described.items():
        assert own.higher_is_better == (metric in HIGHER)


def test_rouge_is_described_without_a_task():
    assert rouge.DESCRIPTIONS == {"rouge_l": tasks.Description(True, "%", False)}


def test_joint_tasks_keep_the_descriptions_of_their_parts():
    bare = tasks.Task("bare", lambda outputs, labels: outputs, {}, None)
    task = tasks.joint({"depth": (dense.depth(), 2.0), "x": (bare, 1.0)})
    assert tasks.describe(task) == {
        "loss": tasks.Description(higher_is_better=False),
        "depth/loss": tasks.Description(higher_is_better=False),
        "depth/rmse": tasks.Description(higher_is_better=False, unit="m", primary=True),
        "x/loss": tasks.Description(higher_is_better=False, primary=True),
    }
    nested = tasks.describe(tasks.joint({"both": (task, 1.0)}))
    assert [name for name, own in nested.items() if own.primary] == [
        "both/depth/rmse",
        "both/x/loss",
    ]


def with_metrics(**metrics):
    return tasks.Task("mine", lambda outputs, labels: outputs, metrics, None)


def test_a_plain_function_is_refused_with_the_remedy():
    task = with_metrics(distance=lambda outputs, labels: abs(outputs - labels))
    for use in (tasks.describe, lambda task: tasks.joint({"a": (task, 1.0)})):
        with pytest.raises(
            InputError, match=r"metric 'distance' of task 'mine' .* give .*Metric\("
        ):
            use(task)


def test_metrics_that_contradict_each_other_are_refused():
    first = tasks.Metric(lambda outputs, labels: outputs, higher_is_better=True, primary=True)
    with pytest.raises(InputError, match="two primary metrics, 'a' and 'b'"):
        tasks.describe(with_metrics(a=first, b=first))
    with pytest.raises(InputError, match="metric called 'loss'"):
        tasks.describe(with_metrics(loss=first))
    with pytest.raises(
        InputError, match="unknown primary metric 'loss'; expected one of normalised"
    ):
        tasks.mean_squared_error(primary="loss")


def test_an_own_metric_is_one_line():
    distance = tasks.Metric(
        lambda outputs, labels: jnp.abs(outputs - labels), higher_is_better=False, unit="m"
    )
    assert tasks.describe(with_metrics(distance=distance)) == {
        "loss": tasks.Description(higher_is_better=False, primary=True),
        "distance": tasks.Description(higher_is_better=False, unit="m"),
    }
    np.testing.assert_array_equal(distance.measure(jnp.array([1.0]), jnp.array([3.0])), [2])


def test_directions_of_what_rounds_report():
    lower = ("loss", "loss/rooms", "primal", "gap", "diverged", "inexactness", "personal_loss")
    assert not any(describe_info(name).higher_is_better for name in lower)
    assert describe_info("dual").higher_is_better
    for name in ("num_steps", "num_steps/rooms", "sigma_prime", "num_clusters", "lossy"):
        assert describe_info(name) is None
