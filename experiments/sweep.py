"""Many configs -> many work directories, and a report over them.

    python -m experiments.sweep --config=configs/fedem_digits.py --workdir=runs/digits \\
        --grid=algorithm.name=fedem,fedavg,local

Every combination of the grids is one run in a directory of its own below ``--workdir``; finished or
interrupted ones are continued, so a sweep can be started again at any time. Seeds are not swept:
they are vmapped inside each run (``--config.seeds``).
"""

import ast
import copy
import itertools
import pathlib
from typing import Any

import ml_collections
from absl import app, flags, logging

from experiments import report, run
from experiments.outputs import telemetry, workdir
from experiments.plan import make_plan
from fedjax_mtl.core.checks import InputError


def parse_grid(text: str) -> tuple[str, list[Any]]:
    """``"client.epochs=1,2"`` to ``("client.epochs", [1, 2])``.

    Commas inside brackets or quotes do not separate: ``model.hidden=(64,32),(32,)`` is two values.
    Values that are no Python literals are strings.

    Raises:
        InputError: no ``=``, or no value.
    """
    name, separator, values = text.partition("=")
    if not separator or not name or not values:
        raise InputError(f"--grid={text} does not look like field=value,value")
    return name, [_literal(value) for value in _separate(values)]


def _separate(values: str) -> list[str]:
    """The texts between the commas of Python's own grammar; between all commas elsewhere."""
    try:
        parsed = ast.parse(f"[{values}]", mode="eval").body
    except SyntaxError:
        return values.split(",")
    if not isinstance(parsed, ast.List):
        return values.split(",")
    return [ast.get_source_segment(f"[{values}]", element) or "" for element in parsed.elts]


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def set_field(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
    """Sets a dotted field.

    Raises:
        InputError: the config has no such field, or one of another type.
    """
    try:
        *parents, last = name.split(".")
        owner = config
        for parent in parents:
            owner = owner[parent]
        owner[last]  # a new field would be accepted without this
        owner[last] = value
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"--grid cannot set config.{name} to {value!r}: {error}") from error


def combinations(
    config: ml_collections.ConfigDict, grids: list[str]
) -> dict[str, ml_collections.ConfigDict]:
    """One config for each combination, by the name of its directory."""
    parsed = [parse_grid(text) for text in grids]
    configs = {}
    for values in itertools.product(*(values for _, values in parsed)):
        own = copy.deepcopy(config)
        parts = []
        for (name, _), value in zip(parsed, values, strict=True):
            set_field(own, name, value)
            parts.append(str(value) if name == "algorithm.name" else f"{name}={value}")
        configs["-".join(parts) or "run"] = own
    return configs


def sweep(config: ml_collections.ConfigDict, grids: list[str], directory: pathlib.Path) -> None:
    """Runs all combinations one after the other, then reports on them.

    All are prepared first: a mistake in the last one should not wait for the first to finish. Data
    and base models that several runs share are made once.
    """
    made, waiting = run.Made(), []
    for name, own in combinations(config, grids).items():
        plan = make_plan(own)
        workdir.check(directory / name, plan.settings)
        waiting.append((directory / name, run.prepare(plan, made)))
    done = []
    while waiting:
        own_directory, prepared = waiting.pop(0)
        run.run_prepared(prepared, made, own_directory)
        done.append(own_directory)
    report.report(done, directory)


_GRID = flags.DEFINE_multi_string("grid", [], "field=value,value; may be given several times")


def main(argv: list[str]) -> None:
    """Flags only; see :func:`sweep`."""
    logging.set_verbosity(logging.WARNING)  # orbax narrates every save
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected arguments {argv[1:]}; settings look like --config.num_rounds=10"
        )
    directory = pathlib.Path(flags.FLAGS.workdir)
    telemetry.exit_on_bad_input(lambda: sweep(flags.FLAGS.config, _GRID.value, directory))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=telemetry.parse_flags)
