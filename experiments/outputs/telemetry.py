"""What surrounds a run: TensorBoard events, compile time, versions, errors as one message."""

import importlib.metadata
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app

from experiments.outputs.checkpoints import DamagedCheckpoint
from fedjax_mtl.core.checks import InputError

_compile_seconds = 0.0


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    global _compile_seconds
    if event.startswith("/jax/core/compile/"):
        _compile_seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)


class CompileClock:
    """Seconds of tracing and compiling since this clock was made."""

    def __init__(self) -> None:
        self._start = _compile_seconds

    def seconds(self) -> float:
        """Seconds until now."""
        return _compile_seconds - self._start


class Events:
    """TensorBoard events, without TensorFlow; a resumed run writes only what is new."""

    def __init__(self, directory: pathlib.Path, resume_round: int) -> None:
        """Opens the events of a run that goes on after ``resume_round`` (-1: from nothing)."""
        from tensorboardX import SummaryWriter

        purge = None if resume_round < 0 else resume_round + 1
        self._writer = SummaryWriter(str(directory / "events"), purge_step=purge)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Writes the numbers of metric rows, without those of single clients."""
        for row in rows:
            if "client" in row:
                continue
            for name, value in row.items():
                if isinstance(value, float):
                    tag = f"{row['split']}/{name}/seed_{row['seed']}"
                    self._writer.add_scalar(tag, value, row["round"])

    def close(self) -> None:
        """Writes what is still held back."""
        self._writer.close()


def environment() -> dict[str, Any]:
    """Device and versions, for the summary."""
    packages = ("fedjax_mtl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind} x {jax.device_count()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def parse_flags(argv: list[str]) -> list[str]:
    """Parses absl's flags.

    A ``--config`` override that does not fit the config ends the program with one message.
    """
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        overrides = [argument for argument in argv if argument.startswith("--config.")]
        given = f" (settings given: {' '.join(overrides)})" if overrides else ""
        sys.exit(
            "error: the config or one of its settings is unknown or of the wrong type: "
            f"{error}{given}"
        )


def exit_on_bad_input(action: Callable[[], Any]) -> None:
    """Runs the action; an error that names its remedy ends the program with that message.

    Any other is a bug, and keeps its traceback.
    """
    try:
        action()
    except (
        InputError,
        FloatingPointError,
        FileNotFoundError,
        NotADirectoryError,
        DamagedCheckpoint,
    ) as error:
        sys.exit(f"error: {error}")
