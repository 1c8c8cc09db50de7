"""From ``config.data`` to federated splits and a task, one file a family."""

from collections.abc import Callable
from typing import Any

from experiments.problems import classification, language, linear, task_sets

DATASETS: dict[str, Callable[..., Any]] = {
    **classification.DATASETS,
    **language.DATASETS,
    **linear.DATASETS,
    **task_sets.DATASETS,
}
