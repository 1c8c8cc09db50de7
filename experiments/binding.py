"""From settings to the call of a library function: each hyper-parameter is declared once, there.

:func:`bind` fills every named parameter of a function from the settings of a config, then from
what the run provides (the model, the task, the number of clients ...), else leaves its default.
Objects that a config cannot hold are named: ``"ring"``, ``"random(seed=3)"`` or
``{"name": "random", "seed": 3}`` become a graph, an optimiser or a path predicate by the
parameter's name or annotation, through tables of library functions that are bound likewise.
"""

import ast
import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_mtl.core.checks import InputError

Makers = Mapping[str, Callable[..., Any]]
"""Library functions that make objects of one kind, by the name a config says."""

_EMPTY = inspect.Parameter.empty
_SCALARS = (bool, int, float, str)
_NO_NAMES: frozenset[str] = frozenset()


class Tables(NamedTuple):
    """How objects are made that settings only name.

    Attributes:
        names: makers by the parameter's name; they go before those by annotation.
        annotations: makers by the parameter's annotation (the annotation itself, or its text where
            it cannot be imported).
        joins: by the name of a parameter that takes several such objects one after the other, what
            makes one of them.
        provided: what the run provides to makers, by parameter.
        needs: by parameter, in words, what must be there for the run to provide it.
    """

    names: Mapping[str, Makers] = types.MappingProxyType({})
    annotations: Mapping[Any, Makers] = types.MappingProxyType({})
    joins: Mapping[str, Callable[..., Any]] = types.MappingProxyType({})
    provided: Collection[str] = _NO_NAMES
    needs: Mapping[str, str] = types.MappingProxyType({})

    def makers(self, parameter: "Parameter") -> Makers | None:
        """What makes values for a parameter, or None if they are plain."""
        if parameter.name in self.names:
            return self.names[parameter.name]
        found = (self.annotations.get(choice) for choice in parameter.choices)
        return next((makers for makers in found if makers is not None), None)


NO_TABLES = Tables()


class Parameter(NamedTuple):
    """A parameter of a library function.

    Attributes:
        name: as the function calls it.
        choices: the members of its annotation, without None.
        optional: whether it may be None.
        default: its default, or ``inspect.Parameter.empty``.
    """

    name: str
    choices: tuple[Any, ...]
    optional: bool
    default: Any

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is _EMPTY

    @property
    def plain(self) -> bool:
        """Whether a config can hold its values as they are."""
        return bool(self.scalars) or self.takes_sequences

    @property
    def takes_sequences(self) -> bool:
        """Whether its values can be tuples of numbers or strings."""
        return any(_is_sequence(choice) for choice in self.choices)

    @property
    def scalars(self) -> tuple[type, ...]:
        """Which of number, string and bool its values can be."""
        return tuple(choice for choice in self.choices if choice in _SCALARS)


def _is_sequence(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if not (isinstance(origin, type) and issubclass(origin, Sequence)):
        return False
    members = (member for member in typing.get_args(annotation) if member is not Ellipsis)
    return all(member in _SCALARS for member in members)


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; of a Literal, the type of its values."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(c for member in typing.get_args(annotation) for c in _choices(member))
    if typing.get_origin(annotation) is typing.Literal:
        return tuple(dict.fromkeys(type(value) for value in typing.get_args(annotation)))
    return (annotation,)


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """The annotation that a text stands for.

    The text stays if its names are only there for type checkers.
    """
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, names)  # as typing.get_type_hints does
    except (AttributeError, NameError):
        return annotation


def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters that can be given to a function by name.

    Of a partial function, without those that it sets: they are what makes it a variant.
    """
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    bare = function.func if isinstance(function, functools.partial) else function
    declared = bare.__new__ if isinstance(bare, type) else inspect.unwrap(bare)
    spaces = getattr(declared, "__globals__", {})
    found = {}
    for name, one in inspect.signature(function).parameters.items():
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) or name in fixed:
            continue
        members = _choices(_resolved(one.annotation, spaces))
        found[name] = Parameter(
            name,
            tuple(member for member in members if member is not type(None)),
            type(None) in members or one.default is None,
            one.default,
        )
    return found


class Bound(NamedTuple):
    """A library function whose settings have been checked; nothing has been built yet.

    Attributes:
        function: what will be called.
        values: by parameter, a plain value, or the Bound of the object it names.
        parameters: all parameters of the function.
        where: the config section, for messages.
        name: of the maker, where there is a choice; None for a function that was bound directly.
        tables: for messages about what the run does not provide.
    """

    function: Callable[..., Any]
    values: dict[str, Any]
    parameters: dict[str, Parameter]
    where: str
    name: str | None
    tables: Tables

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, defaults included, in the form of a config."""
        own: dict[str, Any] = {} if self.name is None else {"name": self.name}
        for name, value in self.values.items():
            own[name] = value.settings if isinstance(value, Bound | Joined) else value
        return own

    def call(self, provided: Mapping[str, Any], for_makers: Mapping[str, Any] | None = None) -> Any:
        """Calls the function, after making the objects that its settings name.

        Args:
            provided: by parameter, what the run provides; settings go first.
            for_makers: by parameter, what it provides to the makers.

        Raises:
            InputError: something that the function needs is neither set nor provided.
        """
        for_makers = {} if for_makers is None else for_makers
        arguments = {}
        for name, parameter in self.parameters.items():
            if self.values.get(name) is not None:
                value = self.values[name]
                made = isinstance(value, Bound | Joined)
                arguments[name] = value.call(for_makers, for_makers) if made else value
            elif provided.get(name) is not None:
                arguments[name] = provided[name]
            elif name in self.values and parameter.optional:
                arguments[name] = None
            elif parameter.required:
                raise InputError(
                    f"{self.where} needs {self.tables.needs.get(name, name)}"
                    + (f" (for {self.name!r})" if self.name else "")
                )
        return self.function(**arguments)


class Joined(NamedTuple):
    """Several objects that are made one after the other and joined.

    Attributes:
        join: what makes one of them.
        members: what makes each.
    """

    join: Callable[..., Any]
    members: tuple[Bound, ...]

    @property
    def settings(self) -> tuple[dict[str, Any], ...]:
        """The settings of each member, as :attr:`Bound.settings`."""
        return tuple(member.settings for member in self.members)

    def call(self, provided: Mapping[str, Any], for_makers: Mapping[str, Any] | None = None) -> Any:
        """Calls every member, as :meth:`Bound.call`, and joins the results."""
        return self.join(*(member.call(provided, for_makers) for member in self.members))


def bind(
    function: Callable[..., Any],
    settings: Mapping[str, Any],
    where: str,
    *,
    provided: Collection[str] = _NO_NAMES,
    tables: Tables = NO_TABLES,
    name: str | None = None,
    also_known: Collection[str] = _NO_NAMES,
) -> Bound:
    """Checks settings against the parameters of a function and completes them with its defaults.

    Args:
        function: a library function (or a ``functools.partial`` of one) with annotated parameters.
        settings: by parameter; None is a value where the parameter may be None, and elsewhere
            means that nothing was said.
        where: the config section, for messages.
        provided: the parameters that the run provides unless they are set.
        tables: how the objects are made that settings only name.
        name: by which the settings say which function they are for, if they do.
        also_known: fields of the section that are for somebody else, for messages.

    Raises:
        InputError: a setting that the function does not take, one that it needs and that is
            missing, or a value of another type, naming the field.
    """
    parameters = parameters_of(function)
    fields = {n: p for n, p in parameters.items() if _is_field(p, provided, tables)}
    unknown = sorted(set(settings) - set(fields))
    if unknown:
        known = sorted((set(fields) - set(provided)) | set(also_known))
        raise InputError(
            f"unknown field {where}.{unknown[0]}; known fields: {', '.join(known) or 'none'}"
        )
    values: dict[str, Any] = {}
    for field, parameter in fields.items():
        value = settings.get(field)
        if value is not None:
            values[field] = _bound_value(parameter, value, f"{where}.{field}", tables)
        elif field in provided:
            continue
        elif field in settings and parameter.optional:
            values[field] = None
        elif parameter.required:
            raise InputError(f"missing field {where}.{field}")
        else:
            values |= _default_value(parameter, f"{where}.{field}", tables)
    missing = [n for n, p in parameters.items() if p.required and n not in {*fields, *provided}]
    if missing:
        raise InputError(f"{where} cannot give {missing[0]!r}: no value of it fits in a config")
    return Bound(function, values, parameters, where, name, tables)


def _is_field(parameter: Parameter, provided: Collection[str], tables: Tables) -> bool:
    """Whether a config can set a parameter.

    A parameter without a default is left to the run, if the run provides it.
    """
    if tables.makers(parameter) is not None:
        return True
    return parameter.plain and not (parameter.required and parameter.name in provided)


def _default_value(parameter: Parameter, where: str, tables: Tables) -> dict[str, Any]:
    """The default by the parameter's name, or nothing where no config can say it."""
    name, default, makers = parameter.name, parameter.default, tables.makers(parameter)
    if default is None:
        return {name: None}
    if makers is None or type(default) in parameter.scalars:
        said = isinstance(default, (*_SCALARS, tuple))
        return {name: default} if said else {}
    for maker, function in makers.items():
        if not parameters_of(function) and function() is default:
            return {name: bind_named(makers, maker, where, tables)}
    if isinstance(default, tuple) and hasattr(default, "_asdict"):
        return {name: bind_named(makers, default._asdict(), where, tables)}
    return {}


def _bound_value(parameter: Parameter, value: Any, where: str, tables: Tables) -> Any:
    makers = tables.makers(parameter)
    if makers is None:
        return plain_value(parameter, value, where)
    if type(value) in parameter.scalars and value not in makers:
        return plain_value(parameter, value, where)
    if isinstance(value, str):
        value = read_call(value, where)
    if isinstance(value, list | tuple) and parameter.name in tables.joins:
        members = (bind_named(makers, one, where, tables) for one in value)
        return Joined(tables.joins[parameter.name], tuple(members))
    return bind_named(makers, value, where, tables)


def bind_named(makers: Makers, value: Any, where: str, tables: Tables) -> Bound:
    """Binds the maker that a setting names, with the settings it gives.

    Args:
        makers: by name; with a single one the name may be left out.
        value: ``"name"``, ``"name(setting=value)"`` or ``{"name": ..., "setting": value}``.
        where: the field, for messages.
        tables: for the settings of the maker.
    """
    settings = read_call(value, where) if isinstance(value, str) else value
    if not isinstance(settings, Mapping):
        raise InputError(
            f"{where} is {value!r}; expected one of {', '.join(sorted(makers))}, or "
            "name(setting=value, ...)"
        )
    settings = dict(settings)
    name = settings.pop("name", next(iter(makers)) if len(makers) == 1 else None)
    function = choose(makers, name, where)
    return bind(function, settings, where, provided=tables.provided, tables=tables, name=name)


def choose(table: Mapping[str, Any], name: Any, where: str) -> Any:
    """``table[name]``, or an InputError that lists what there is."""
    if name not in table:
        raise InputError(f"unknown {where} {name!r}; expected one of {', '.join(sorted(table))}")
    return table[name]


def plain_value(parameter: Parameter, value: Any, where: str) -> Any:
    """A setting as the parameter takes it: whole numbers become floats, lists tuples.

    Raises:
        InputError: a value of another type.
    """
    if isinstance(value, list | tuple):
        value = tuple(value)
    types_taken = parameter.scalars
    if parameter.takes_sequences and (isinstance(value, tuple) or not types_taken):
        if isinstance(value, tuple):
            return value
    elif float in types_taken and isinstance(value, int) and int not in types_taken:
        return value if isinstance(value, bool) and bool in types_taken else float(value)
    elif type(value) in types_taken:
        return _read_number(value) if float in types_taken else value
    expected = [one.__name__ for one in types_taken] + ["tuple"] * parameter.takes_sequences
    raise InputError(f"{where} is {value!r}; expected {' or '.join(expected)}")


def _read_number(value: Any) -> Any:
    """The number that a text is, of a setting that can be a name too; otherwise what it was."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def read_call(text: str, where: str) -> Any:
    """``"name(setting=value, other=name(...))"`` as nested settings.

    A bare name is a call without settings; several with commas between them become a tuple.

    Raises:
        InputError: text of another form.
    """

    def read(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return {"name": node.id}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            return {"name": node.func.id} | {
                str(keyword.arg): value(keyword.value) for keyword in node.keywords
            }
        raise ValueError

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return node.id
        return read(node) if isinstance(node, ast.Call) else ast.literal_eval(node)

    try:
        body = ast.parse(text.strip(), mode="eval").body
        return tuple(map(read, body.elts)) if isinstance(body, ast.Tuple) else read(body)
    except (ValueError, SyntaxError):
        raise InputError(
            f"{where} is {text!r}; give a name, or name(setting=value, ...) in the form of Python"
        ) from None
