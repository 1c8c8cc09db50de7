"""Checks of arguments that many constructors share.

Each message names the argument and the choices.
"""

from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used as it is; the message names the thing and the remedy.

    Launchers show it as one line. Any other error is a bug and keeps its traceback.
    """


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises InputError unless ``value`` is one of ``choices``, naming the argument."""
    choices = tuple(choices)
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}; expected one of {', '.join(choices)}")


def check_fidelity(fidelity: str) -> None:
    """Raises InputError unless ``fidelity`` is ``paper`` or ``released``."""
    if fidelity not in ("paper", "released"):
        raise InputError(f"fidelity must be 'paper' or 'released', got {fidelity!r}")
