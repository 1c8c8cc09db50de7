"""A work directory: its config, its tasks, its append-only metrics, its summary."""

import json
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.evaluation import describe_summaries
from fedjax_mtl.tasks import Description

_CONFIG = "config.json"


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for name, value in tree.items():
        flat.update(_flatten(value, f"{prefix}.{name}" if prefix else name))
    return flat


def check(workdir: pathlib.Path, settings: dict[str, Any]) -> None:
    """Checks that a directory is free, or holds a run of these settings; changes nothing.

    A run of fewer rounds is gone on with, unless its local learning rates depend on how many there
    are.

    Args:
        workdir: the directory.
        settings: of the whole config, defaults included.

    Raises:
        InputError: it holds a run of a different config; the message names the differing fields.
        NotADirectoryError: the path is a file.
    """
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"workdir {workdir} is a file; name a directory")
    path = workdir / _CONFIG
    if not path.exists():
        return
    try:
        old = _flatten(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON ({error}); use another directory") from error
    new = _flatten(json.loads(json.dumps(settings)))
    differing = [
        f"{name}: {old.get(name, 'absent')!r} there, {new.get(name, 'absent')!r} now"
        for name in sorted(set(old) | set(new))
        if old.get(name, "absent") != new.get(name, "absent") and not _goes_on(name, old, new)
    ]
    if differing:
        raise InputError(
            f"{workdir} holds a run of a different config; use another directory. "
            "Differing fields: " + "; ".join(differing)
        )


def _goes_on(field: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a difference only makes a run longer."""
    longer = field == "num_rounds" and new[field] > old.get(field, new[field])
    return longer and new.get("client.schedule") not in ("multi_step", "cosine")


def claim(workdir: pathlib.Path, settings: dict[str, Any]) -> None:
    """Makes the directory this config's, after :func:`check`."""
    check(workdir, settings)
    workdir.mkdir(parents=True, exist_ok=True)
    content = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    path = workdir / _CONFIG
    if not path.exists() or path.read_text() != content:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(content)
        temporary.rename(path)


class JudgedTask(NamedTuple):
    """What the clients of a run, or one group of them, are judged on.

    Attributes:
        name: the task, as metric rows name it.
        metrics: how each of its metrics is to be read, as by ``tasks.describe``.
        group: of clients; None where they do not come in groups.
    """

    name: str
    metrics: dict[str, Description]
    group: str | None = None


def write_tasks(workdir: pathlib.Path, judged: Iterable[JudgedTask]) -> None:
    """Writes ``tasks.json``: what the rows and the summary of a run need to be read by others."""
    content = [
        {
            "task": task.name,
            "group": task.group,
            "metrics": {name: of_metric._asdict() for name, of_metric in task.metrics.items()},
        }
        for task in judged
    ]
    write_json(workdir / "tasks.json", content)


def read_tasks(workdir: pathlib.Path) -> list[JudgedTask]:
    """What :func:`write_tasks` wrote.

    Raises:
        FileNotFoundError: a directory without it.
    """
    path = workdir / "tasks.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir} holds no tasks.json, which says how its metrics are to be read; "
            f"start python -m experiments.run --workdir={workdir} with its --config once more: "
            "that adds the file and repeats no round"
        )
    return [
        JudgedTask(
            entry["task"],
            {name: Description(**of_metric) for name, of_metric in entry["metrics"].items()},
            entry["group"],
        )
        for entry in json.loads(path.read_text())
    ]


def full_name(metric: str, group: str | None) -> str:
    """A metric's name in a whole run: ``<group>/<metric>``, or the metric without groups."""
    return metric if group is None else f"{group}/{metric}"


def describe_metrics(judged: Iterable[JudgedTask]) -> dict[str, Description]:
    """How all values of a run that are about clients are to be read, by :func:`full_name`.

    Summaries over clients are among them.
    """
    return {
        full_name(name, task.group): described
        for task in judged
        for name, described in describe_summaries(task.metrics).items()
    }


def read_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file; a torn last line, left by a kill, is passed over.

    A value of nobody, ``null`` in the file, is NaN in the rows.
    """
    if not path.exists():
        return
    with path.open() as lines:
        for line in lines:
            if line.endswith("\n"):
                row = json.loads(line)
                yield {name: math.nan if value is None else value for name, value in row.items()}


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, only ever appended to.

    A resumed run computes again what was logged after its checkpoint; those lines are there
    already and are not written twice.
    """

    def __init__(self, path: pathlib.Path, resume_round: int):
        """Opens the file of a run that goes on after ``resume_round`` (-1: from nothing)."""
        self._path = path
        self._drop_torn_line()
        self._already = sum(row["round"] > resume_round for row in read_rows(path))

    def _drop_torn_line(self) -> None:
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with self._path.open("r+b") as file:
                file.truncate(end)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows, in one write, without those that an interrupted run wrote already."""
        known = min(self._already, len(rows))
        self._already -= known
        text = "".join(json.dumps(_without_nan(row)) + "\n" for row in rows[known:])
        if text:
            with self._path.open("a") as file:
                file.write(text)
                file.flush()


def _without_nan(content: Any) -> Any:
    """JSON has no NaN: a mean over nobody is ``null``."""
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


_REMEDY = "training diverged: lower the learning rate or clip (what was logged before is kept)"


def check_finite(rows: list[dict[str, Any]]) -> None:
    """Refuses rows that hold a NaN or an infinity, or that report clients that diverged.

    Only a round's own means may be NaN: they are so in rounds that nobody attended.

    Raises:
        FloatingPointError: naming round, seed, split and metric.
    """
    for row in rows:
        if row.get("diverged", 0) > 0:
            raise FloatingPointError(
                f"{row['diverged']:.2g} clients a round had a loss or update that is not finite in "
                f"the rounds before round {row['round']}, seed {row['seed']}; {_REMEDY}"
            )
        for name, value in row.items():
            of_nobody = row["split"] == "server" and isinstance(value, float) and math.isnan(value)
            if isinstance(value, float) and not math.isfinite(value) and not of_nobody:
                raise FloatingPointError(
                    f"{name} of {row['split']} is {value} in round {row['round']}, "
                    f"seed {row['seed']}; {_REMEDY}"
                )


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON so that a kill leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_without_nan(content), indent=2) + "\n")
    temporary.rename(path)
