"""Related linear tasks, a table of examples each: MOCHA's data sets."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.problems.base import Problem
from experiments.settings import call
from fedjax_mtl import tasks
from fedjax_mtl.data import features, task_tables
from fedjax_mtl.rounds.dual import check_tasks

_DUAL_LOSSES = {
    "hinge": tasks.dual.hinge,
    "smoothed_hinge": tasks.dual.smoothed_hinge,
    "squared": tasks.dual.squared,
    "logistic": tasks.dual.logistic,
}


def _linear_problem(
    table: task_tables.TaskTable,
    *,
    loss: str,
    train_share: float,
    skewed: bool,
    keep_order: bool,
    standardise: str,
    intercept: float,
    fourier_features: int,
    bandwidth: float,
    one_class: str,
    seed: int,
) -> Problem:
    """Tasks of linear models in the dual: split, then standardised (``pooled``, ``per_task`` or ``no``), then mapped."""
    if loss not in _DUAL_LOSSES:
        raise ValueError(
            f"unknown config.data.loss {loss!r}; expected one of {', '.join(_DUAL_LOSSES)}"
        )
    if standardise not in ("no", "pooled", "per_task"):
        raise ValueError(
            f"unknown config.data.standardise {standardise!r}; expected no, pooled or per_task"
        )
    if one_class not in ("refuse", "keep"):
        raise ValueError(f"unknown config.data.one_class {one_class!r}; expected refuse or keep")
    chosen = _DUAL_LOSSES[loss]()
    splits = task_tables.split_tasks(
        table, train_share=train_share, seed=seed, skewed=skewed, keep_order=keep_order
    )
    if chosen.labels == "real":
        splits = features.centre_labels(splits)
    if one_class == "refuse":
        check_tasks(splits.train, chosen)
    if standardise != "no":
        splits = features.standardise(splits, per_client=standardise == "per_task")
    if fourier_features:
        key = jax.random.key(seed)
        splits = features.random_fourier(
            splits, num_features=fourier_features, bandwidth=bandwidth, key=key
        )
    if intercept:
        splits = features.append_intercept(splits, intercept)
    width = splits.train.examples["inputs"].shape[1]
    return Problem(splits, tasks.dual.dual_task(chosen), (width,), 1, dual_loss=chosen)


def _prepared(table: task_tables.TaskTable, preparation: dict[str, Any]) -> Problem:
    return call(_linear_problem, {"table": table, **preparation}, "config.data.preparation")


def task_table(*, path: str, preparation: dict[str, Any]) -> Problem:
    """School, Landmine or other multi-task data, from a file the user names."""
    if not path:
        raise ValueError(
            "config.data.path is empty; name the file, e.g. --config.data.path=school.mat (.npz with X, y, task_sizes works too)"
        )
    return _prepared(task_tables.load_task_table(path), preparation)


def human_activity(*, directory: str, positive: int, preparation: dict[str, Any]) -> Problem:
    """The UCI smartphone recordings, from the folder the user names."""
    return _prepared(task_tables.load_human_activity(directory, positive), preparation)


def related_tasks(
    *,
    num_tasks: int,
    features: int,
    num_clusters: int,
    spread: float,
    smallest: int,
    largest: int,
    noise: float,
    seed: int,
    preparation: dict[str, Any],
) -> Problem:
    """Synthetic linear tasks in clusters."""
    table = task_tables.related_tasks(
        num_tasks=num_tasks,
        features=features,
        num_clusters=num_clusters,
        spread=spread,
        smallest=smallest,
        largest=largest,
        noise=noise,
        regression=preparation.get("loss") == "squared",
        seed=seed,
    )
    problem = _prepared(table, preparation)
    return problem._replace(groups=np.arange(num_tasks) % num_clusters)


DATASETS: dict[str, Callable[..., Any]] = {
    "human_activity": human_activity,
    "related_tasks": related_tasks,
    "task_table": task_table,
}
