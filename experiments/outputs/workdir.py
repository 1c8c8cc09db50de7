"""A work directory: its config, its append-only metrics, its summary."""

import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_collections


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for name, value in tree.items():
        flat.update(_flatten(value, f"{prefix}.{name}" if prefix else name))
    return flat


def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Makes the directory this config's, or checks that it already is.

    Raises:
        ValueError: it holds a run of a different config; the message names the differing fields. Nothing is changed.
        NotADirectoryError: the path is a file.
    """
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"workdir {workdir} is a file; name a directory")
    path = workdir / "config.json"
    mine = json.loads(config.to_json())
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(mine, indent=2, sort_keys=True) + "\n")
        temporary.rename(path)
        return
    try:
        theirs = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); use another directory") from error
    old, new = _flatten(theirs), _flatten(mine)
    differing = [
        f"{name}: {old.get(name, 'absent')!r} there, {new.get(name, 'absent')!r} now"
        for name in sorted(set(old) | set(new))
        if old.get(name, "absent") != new.get(name, "absent")
    ]
    if differing:
        raise ValueError(
            f"{workdir} holds a run of a different config; use another directory. Differing fields: "
            + "; ".join(differing)
        )


def read_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file; a torn last line, left by a kill, is passed over."""
    if not path.exists():
        return
    with path.open() as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, only ever appended to.

    A resumed run computes again what was logged after its checkpoint; those lines are there already and are not written twice.
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
        """Appends rows, in one write; those that an interrupted run wrote already are passed over."""
        known = min(self._already, len(rows))
        self._already -= known
        text = "".join(json.dumps(row) + "\n" for row in rows[known:])
        if text:
            with self._path.open("a") as file:
                file.write(text)
                file.flush()


def check_finite(rows: list[dict[str, Any]]) -> None:
    """Raises FloatingPointError if a row holds a NaN or an infinity, or reports clients that diverged, naming round, seed, split and metric."""
    for row in rows:
        if row.get("diverged", 0) > 0:
            raise FloatingPointError(
                f"{row['diverged']:.2g} clients a round had a loss or update that is not finite in the rounds before round "
                f"{row['round']}, seed {row['seed']}; training diverged: lower the learning rate or clip (what was logged before is kept)"
            )
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} of {row['split']} is {value} in round {row['round']}, seed {row['seed']}; training diverged: "
                    "lower the learning rate or clip (what was logged before is kept)"
                )


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON so that a kill leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.rename(path)
