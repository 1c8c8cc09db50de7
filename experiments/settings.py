"""Settings checked by name against what a factory takes."""

import inspect
from collections.abc import Callable
from typing import Any


def call(factory: Callable, settings: dict[str, Any], where: str) -> Any:
    """``factory(**settings)``, after checking the names.

    Raises:
        ValueError: a setting the factory does not take, or one it needs that is missing, naming the config field.
    """
    parameters = inspect.signature(factory).parameters
    unknown = sorted(set(settings) - set(parameters))
    if unknown:
        raise ValueError(
            f"unknown field {where}.{unknown[0]}; known fields: {', '.join(sorted(parameters))}"
        )
    missing = sorted(
        name
        for name, p in parameters.items()
        if p.default is inspect.Parameter.empty and name not in settings
    )
    if missing:
        raise ValueError(f"missing field {where}.{missing[0]}")
    return factory(**settings)


def choose(table: dict[str, Any], name: str, where: str) -> Any:
    """``table[name]``, or a ValueError that lists what there is."""
    if name not in table:
        raise ValueError(f"unknown {where} {name!r}; expected one of {', '.join(sorted(table))}")
    return table[name]
