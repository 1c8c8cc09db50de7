"""Several tasks of one client as one task."""

from collections.abc import Mapping

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.task import Metric, PyTree, Task, measures


def joint(tasks: Mapping[str, tuple[Task, float]]) -> Task:
    """The weighted sum of tasks; outputs and labels are dicts with an entry a task.

    The labels may hold more. Metrics come as ``<task>/<metric>``, each task's own loss as
    ``<task>/loss``. What is primary of a task stays so: a joint task is compared by one number for
    each of its tasks.

    Args:
        tasks: the task and its weight in the sum, by the name of its output and label.

    Raises:
        InputError: no task, or a weight that is not positive.
    """
    if not tasks:
        raise InputError("a client needs at least one task; tasks is empty")
    for name, (_, weight) in tasks.items():
        if weight <= 0:
            raise InputError(
                f"task {name!r} has weight {weight}; give a positive weight or drop the task"
            )

    def loss(outputs, labels):
        return sum(
            weight * task.loss(outputs[name], labels[name])
            for name, (task, weight) in tasks.items()
        )

    metrics = {
        f"{name}/{metric}": _of_part(name, measure)
        for name, (task, _) in tasks.items()
        for metric, measure in measures(task).items()
    }

    def mix(outputs, weights):
        return {name: task.mix(outputs[name], weights) for name, (task, _) in tasks.items()}

    return Task("+".join(tasks), loss, metrics, mix)


def _of_part(name: str, metric: Metric) -> Metric:
    """The metric of one task, of the outputs and labels of all."""

    def measure(outputs: PyTree, labels: PyTree) -> PyTree:
        return metric.measure(outputs[name], labels[name])

    return metric._replace(measure=measure)
