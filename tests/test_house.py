"""The library keeps its own rules about imports, names and signatures."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import types

import pytest

import experiments
import fedjax_mtl

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted(
    module.name
    for package in (fedjax_mtl, experiments)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
)

# What stands below may not import what stands above.
FLOORS = [
    ("core",),
    ("execution", "costs", "relations", "tasks"),
    ("models", "clients"),
    ("server",),
    ("rounds",),
    ("algorithms", "evaluation", "simulation"),
    ("data",),
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported(path):
    """The modules of the package that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedjax_mtl"):
            parts = node.module.split(".")
            rooms = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            yield from rooms


@pytest.mark.parametrize("room", sorted(FLOOR_OF))
def test_imports_point_one_way(room):
    package = ROOT / "fedjax_mtl"
    files = [package / f"{room}.py"] if (package / f"{room}.py").exists() else []
    for path in files or sorted((package / room).rglob("*.py")):
        above = {
            other
            for other in imported(path)
            if other != room and FLOOR_OF.get(other, -1) >= FLOOR_OF[room]
        }
        # Rooms of one floor may look at each other only from right to left, as listed.
        level = FLOORS[FLOOR_OF[room]]
        above -= set(level[: level.index(room)])
        assert not above, f"{path.relative_to(ROOT)} imports {sorted(above)}, which stand above it"


def test_core_and_algorithms_know_no_flax():
    for room in ("core", "clients", "rounds", "server", "algorithms", "relations"):
        for path in (ROOT / "fedjax_mtl" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(name.split(".")[0] == "flax" for name in names), path


def test_no_function_shadows_a_module():
    for name in MODULES:
        parent, _, last = name.rpartition(".")
        importlib.import_module(name)
        found = getattr(importlib.import_module(parent), last)
        assert isinstance(found, types.ModuleType), f"{parent}.{last} is no longer the module"


def public_functions():
    """Every public function and method of a public class, with where it stands."""
    for name in MODULES:
        module = importlib.import_module(name)
        for member, value in vars(module).items():
            if member.startswith("_") or getattr(value, "__module__", None) != name:
                continue
            if inspect.isfunction(value):
                yield f"{name}.{member}", value
            elif inspect.isclass(value):
                for method, function in vars(value).items():
                    if inspect.isfunction(function) and not method.startswith("_"):
                        yield f"{name}.{member}.{method}", function


def _from_elsewhere(function):
    """Whether NamedTuple or flax made a method, and not this library."""
    return not (function.__module__ or "").startswith(("fedjax_mtl", "experiments")) or (
        "<string>" in function.__code__.co_filename
    )


def test_public_functions_are_annotated_and_take_no_anything():
    wrong = []
    for where, function in public_functions():
        if _from_elsewhere(function) or hasattr(function, "__wrapped__"):
            continue
        signature = inspect.signature(function)
        for parameter in list(signature.parameters.values()):
            if parameter.name == "self":
                continue
            if parameter.kind is parameter.VAR_KEYWORD and where not in OPEN_ENDED:
                wrong.append(f"{where} takes **{parameter.name}")
            elif parameter.annotation is parameter.empty:
                wrong.append(f"{where} does not say what {parameter.name} is")
        if signature.return_annotation is signature.empty and function.__name__ != "__init__":
            wrong.append(f"{where} does not say what it returns")
        if not function.__doc__:
            wrong.append(f"{where} has no docstring")
    assert not wrong, "\n".join(wrong)


OPEN_ENDED: set[str] = set()
