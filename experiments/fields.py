"""Which fields a config has, with their types: what can be said on the command line.

A config file lists only what differs from the defaults. :func:`with_fields` adds all the others, so
that ``--config.algorithm.fedem.num_components=5`` is known even where the file does not say it.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference, config_dict

from experiments import plan, registry
from experiments.binding import Makers, Parameter, parameters_of
from fedjax_mtl.clients.central import pretrain
from fedjax_mtl.clients.solvers import make_solver

Section = Mapping[str, Any]


def with_fields(said: Section) -> ConfigDict:
    """A config of all fields: those that are said, and the others with their defaults.

    Fields that may be None take ``None`` on the command line too.

    Args:
        said: nested, as a config file says it.
    """
    config = ConfigDict(_of(plan.Course, said))
    for name, function in (("execution", plan.Mapped), ("systems", plan.Systems)):
        config[name] = ConfigDict(_of(function, said.get(name, {})))
    for name, table in (("data", registry.DATA), ("model", registry.MODELS)):
        config[name] = ConfigDict(_of_named(table, said[name]))
    if config.model.get("name") in ("checkpoint", "transformer"):
        adapters = said["model"].get("adapters", {})
        config.model.adapters = ConfigDict(
            {
                kind: ConfigDict(_of(function, adapters.get(kind, {}), ("model",)))
                for kind, function in registry.ADAPTERS.items()
            }
        )
    trained = ("model", "task", "examples")
    config.pretraining = ConfigDict(_of(pretrain, said.get("pretraining", {}), trained))
    config.client = ConfigDict(_of(make_solver, said.get("client", {}), ("num_rounds",)))
    config.algorithm = ConfigDict(_algorithms(said["algorithm"]))
    return config


def _algorithms(said: Section) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": said["name"]}
    for name, function in registry.ALGORITHMS.items():
        own = dict(said.get(name, {}))
        takes = parameters_of(function)
        if not takes.keys().isdisjoint({"solver", "optimizer"}):
            own.setdefault("learning_rate", None)
        fields[name] = ConfigDict(_of(function, own, plan.TO_ALGORITHMS))
    return fields


def _of_named(table: Mapping[str, Callable[..., Any]], said: Section) -> dict[str, Any]:
    rest = {name: value for name, value in said.items() if name not in ("name", "adapters")}
    function = table.get(said["name"])
    own = rest if function is None else _of(function, rest, plan.TO_MODELS)
    return {"name": said["name"], **own}


def _of(
    function: Callable[..., Any], said: Section, provided: Collection[str] = ()
) -> dict[str, Any]:
    """The fields of a section that is for this function, and whatever else is said there."""
    fields: dict[str, Any] = {}
    parameters = parameters_of(function)
    for name, parameter in parameters.items():
        makers = registry.TABLES.makers(parameter)
        plain = parameter.plain and not (parameter.required and name in provided)
        if makers is not None or plain:
            fields[name] = _field(parameter, said.get(name, _default(parameter)), makers)
    others = {name: value for name, value in said.items() if name not in fields}
    return fields | {name: _free(value) for name, value in others.items()}


def _default(parameter: Parameter) -> Any:
    return None if parameter.required else parameter.default


def _field(parameter: Parameter, value: Any, makers: Makers | None) -> Any:
    """A value that knows of which type its field is."""
    if makers is not None and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        # Where only one function can make the value, its settings are known too.
        known = [] if makers is None else list(makers.values())
        return ConfigDict(_of(known[0], value) if len(known) == 1 else dict(value))
    if makers is not None:
        return FieldReference(value if isinstance(value, str) else None, field_type=str)
    if value is None and parameter.scalars == (str,):
        return config_dict.placeholder(str)
    if float in parameter.scalars and type(value) is int:
        value = float(value)
    if value is None or (parameter.optional and not isinstance(value, str)):
        return FieldReference(value, field_type=object)
    return tuple(value) if isinstance(value, list) else value


def _free(value: Any) -> Any:
    """A field of which the function does not know the type; numbers can be said, and None."""
    if isinstance(value, Mapping):
        return ConfigDict(dict(value))
    return FieldReference(None, field_type=object) if value is None else value
