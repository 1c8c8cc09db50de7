"""Problems of related linear tasks, a table of examples each: MOCHA's data sets."""

from typing import NamedTuple

import jax
import numpy as np

from fedjax_mtl import tasks
from fedjax_mtl.core.checks import InputError, check_choice
from fedjax_mtl.data import features as feature_maps
from fedjax_mtl.data import task_tables
from fedjax_mtl.data.problem import Problem, ProblemGroup, one_group
from fedjax_mtl.rounds.dual import check_tasks

DUAL_LOSSES = {
    "hinge": tasks.dual.hinge,
    "smoothed_hinge": tasks.dual.smoothed_hinge,
    "squared": tasks.dual.squared,
    "logistic": tasks.dual.logistic,
}


class Preparation(NamedTuple):
    """How a table of linear tasks is split and prepared.

    Attributes:
        loss: ``hinge``, ``smoothed_hinge``, ``squared`` or ``logistic``.
        train_share: of each task's examples.
        skewed: as for :func:`fedjax_mtl.data.task_tables.split_tasks`.
        keep_order: as for :func:`fedjax_mtl.data.task_tables.split_tasks`.
        standardise: ``no``, ``pooled`` over all clients' training inputs, or ``per_task``.
        intercept: the value of an appended column; None appends none.
        fourier_features: random features of a Gaussian kernel; None takes the inputs as they are.
        bandwidth: of that kernel.
        one_class: what to do with a task of one class, ``refuse`` or ``keep``.
        seed: of the split, and of the random features.
    """

    loss: str = "hinge"
    train_share: float = 0.75
    skewed: bool = False
    keep_order: bool = False
    standardise: str = "no"
    intercept: float | None = None
    fourier_features: int | None = None
    bandwidth: float = 1.0
    one_class: str = "refuse"
    seed: int = 0


DEFAULT_PREPARATION = Preparation()


def linear_problem(
    table: task_tables.TaskTable, preparation: Preparation = DEFAULT_PREPARATION
) -> Problem:
    """Tasks of linear models in the dual: split, then standardised, then mapped.

    Args:
        table: the examples of all tasks.
        preparation: how.

    Raises:
        InputError: an unknown choice.
        ValueError: a task of one class, unless those are kept.
    """
    how = preparation
    check_choice("config.data.preparation.loss", how.loss, DUAL_LOSSES)
    check_choice(
        "config.data.preparation.standardise", how.standardise, ("no", "pooled", "per_task")
    )
    check_choice("config.data.preparation.one_class", how.one_class, ("refuse", "keep"))
    chosen = DUAL_LOSSES[how.loss]()
    splits = task_tables.split_tasks(
        table,
        train_share=how.train_share,
        seed=how.seed,
        skewed=how.skewed,
        keep_order=how.keep_order,
    )
    if chosen.labels == "real":
        splits = feature_maps.centre_labels(splits)
    if how.one_class == "refuse":
        check_tasks(splits.train, chosen)
    if how.standardise != "no":
        splits = feature_maps.standardise(splits, per_client=how.standardise == "per_task")
    if how.fourier_features is not None:
        splits = feature_maps.random_fourier(
            splits,
            num_features=how.fourier_features,
            bandwidth=how.bandwidth,
            key=jax.random.key(how.seed),
        )
    if how.intercept is not None:
        splits = feature_maps.append_intercept(splits, how.intercept)
    width = splits.train.examples["inputs"].shape[1]
    group = ProblemGroup(splits, tasks.dual.dual_task(chosen), (width,), 1)
    return one_group(group, dual_loss=chosen)


def task_table_problem(
    *, path: str | None = None, preparation: Preparation = DEFAULT_PREPARATION
) -> Problem:
    """School, Landmine or other multi-task data, from a file.

    Args:
        path: of the file, see :func:`fedjax_mtl.data.task_tables.load_task_table`.
        preparation: see :class:`Preparation`.

    Raises:
        InputError: no path.
        FileNotFoundError: no such file.
    """
    if not path:
        raise InputError(
            "config.data.path is empty; name the file, e.g. --config.data.path=school.mat "
            "(.npz with X, y, task_sizes works too)"
        )
    return linear_problem(task_tables.load_task_table(path), preparation)


def human_activity_problem(
    *, directory: str, positive: int = 4, preparation: Preparation = DEFAULT_PREPARATION
) -> Problem:
    """The UCI smartphone recordings, one activity against the others.

    Args:
        directory: the folder of the data set.
        positive: as for :func:`fedjax_mtl.data.task_tables.load_human_activity`.
        preparation: see :class:`Preparation`.

    Raises:
        FileNotFoundError: no such folder.
    """
    return linear_problem(task_tables.load_human_activity(directory, positive), preparation)


def related_tasks_problem(
    *,
    num_tasks: int = 30,
    features: int = 20,
    num_clusters: int = 3,
    spread: float = 0.5,
    smallest: int = 20,
    largest: int = 120,
    noise: float = 0.1,
    seed: int = 0,
    preparation: Preparation = DEFAULT_PREPARATION,
) -> Problem:
    """Synthetic linear tasks in clusters; regressions where the loss is the squared one.

    Args:
        num_tasks: as for :func:`fedjax_mtl.data.task_tables.related_tasks`.
        features: as for :func:`fedjax_mtl.data.task_tables.related_tasks`.
        num_clusters: as for :func:`fedjax_mtl.data.task_tables.related_tasks`.
        spread: as for :func:`fedjax_mtl.data.task_tables.related_tasks`.
        smallest: as for :func:`fedjax_mtl.data.task_tables.related_tasks`.
        largest: as for :func:`fedjax_mtl.data.task_tables.related_tasks`.
        noise: as for :func:`fedjax_mtl.data.task_tables.related_tasks`.
        seed: of the draw.
        preparation: see :class:`Preparation`.
    """
    table = task_tables.related_tasks(
        num_tasks=num_tasks,
        features=features,
        num_clusters=num_clusters,
        spread=spread,
        smallest=smallest,
        largest=largest,
        noise=noise,
        regression=preparation.loss == "squared",
        seed=seed,
    )
    problem = linear_problem(table, preparation)
    return problem._replace(alike=np.arange(num_tasks) % num_clusters)
