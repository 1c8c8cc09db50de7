"""Several tasks of one client as one task."""

from fedjax_mtl.core.task import PooledMetric, Task


def joint(tasks: dict[str, tuple[Task, float]]) -> Task:
    """The weighted sum of tasks; outputs and labels are dicts with an entry a task (labels may hold more).

    Metrics come as ``<task>/<metric>``, each task's own loss as ``<task>/loss``.

    Args:
        tasks: the task and its weight in the sum, by the name of its output and label.

    Raises:
        ValueError: no task, or a weight that is not positive.
    """
    if not tasks:
        raise ValueError("a client needs at least one task; tasks is empty")
    for name, (_, weight) in tasks.items():
        if weight <= 0:
            raise ValueError(
                f"task {name!r} has weight {weight}; give a positive weight or drop the task"
            )

    def loss(outputs, labels):
        return sum(
            weight * task.loss(outputs[name], labels[name])
            for name, (task, weight) in tasks.items()
        )

    def of_task(name, measure):
        if isinstance(measure, PooledMetric):
            return PooledMetric(lambda o, y: measure.statistics(o[name], y[name]), measure.finish)
        return lambda o, y: measure(o[name], y[name])

    metrics = {}
    for name, (task, _) in tasks.items():
        for metric, measure in {"loss": task.loss, **task.metrics}.items():
            metrics[f"{name}/{metric}"] = of_task(name, measure)

    def mix(outputs, weights):
        return {name: task.mix(outputs[name], weights) for name, (task, _) in tasks.items()}

    return Task("+".join(tasks), loss, metrics, mix)
