r"""A figure of dense samples: image, every label and, with a trained run, every prediction.

    python -m experiments.figures.scene_figures --domain=A --index=3 --output=scene.png
    python -m experiments.figures.scene_figures --workdir=runs/fedbone/fedbone \
        --output=predictions.png
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments import assembly
from experiments.outputs import telemetry
from experiments.outputs.checkpoints import Checkpoints
from experiments.outputs.stages import first_shapes
from experiments.plan import Plan, make_plan
from fedjax_mtl import Algorithm
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.data import rendered
from fedjax_mtl.data.problem import ProblemGroup

PyTree = Any
Panels = list[tuple[str, np.ndarray]]

_DISCRETE = {"semseg": max(rendered.NUM_SEMSEG.values()), "human_parts": rendered.NUM_PARTS}


def shown(task: str, values: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """A label or a decoded prediction as an image, and how ``imshow`` draws it.

    Args:
        task: its name; ``image`` for the picture itself.
        values: ``[h, w, channels]``; pixels that are ``rendered.IGNORE`` everywhere stay blank.
    """
    blank = np.all(values == rendered.IGNORE, axis=-1)
    if task == "normals":
        return np.where(blank[..., None], 1.0, (values.clip(-1, 1) + 1) / 2), {}
    if values.shape[-1] == 3:
        return values.clip(0, 255) / 255, {}
    first = np.ma.masked_array(values[..., 0], blank)
    if task in _DISCRETE:
        return first, {
            "cmap": "tab20",
            "vmin": 0,
            "vmax": _DISCRETE[task] - 1,
            "interpolation": "nearest",
        }
    if task in ("edge", "sal"):
        return first, {"cmap": "gray", "vmin": 0, "vmax": 1}
    return first, {"cmap": "viridis"}


def decoded(task: str, outputs: np.ndarray) -> np.ndarray:
    """A prediction in the form of the task's labels, ``[h, w, channels]``.

    Args:
        task: its name.
        outputs: a model's outputs for one image, ``[h, w, output channels]``.
    """
    if task in _DISCRETE:
        return outputs.argmax(-1)[..., None].astype(np.float32)
    if task == "sal":
        return 1 / (1 + np.exp(outputs[..., :1] - outputs[..., 1:]))
    if task == "edge":
        return 1 / (1 + np.exp(-outputs))
    return outputs


def draw(rows: Sequence[Panels], path: pathlib.Path) -> None:
    """Draws one row of panels a sample.

    Args:
        rows: of each sample its panels, ``(title, values [h, w, channels])``. A title starts with
            the name of the task.
        path: of the figure.
    """
    from matplotlib.figure import Figure

    width = max(len(row) for row in rows)
    figure = Figure(figsize=(1.6 * width, 1.8 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), width, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, (title, values) in zip(line, row, strict=False):
            picture, style = shown(title.split(" ")[0], values)
            axis.imshow(picture, **style)
            axis.set_title(title, fontsize=7)
    figure.savefig(path, dpi=150)


def of_scene(domain: str, index: int, size: str, extras: bool = True) -> Panels:
    """The panels of one rendered scene, with all its labels.

    Args:
        domain: ``A`` or ``B``.
        index: which scene of the test set.
        size: one of ``rendered.SIZES``.
        extras: as for :func:`fedjax_mtl.data.rendered.render`.
    """
    sample = rendered.preprocess(rendered.render(domain, "test", index, size, extras=extras))
    return [(name, values) for name, values in sample.items() if name != "meta"]


def of_run(directory: pathlib.Path, index: int) -> list[Panels]:
    """The panels of every group of a finished run.

    Each group has an image, its labels, and the predictions of its first client, which are those
    of the run's first seed.

    Args:
        directory: of the run.
        index: which image of each group's test set.

    Raises:
        InputError: the run was not on scenes, or has no checkpoint.
        FileNotFoundError: there is no run.
    """
    plan = make_plan(json.loads((directory / "config.json").read_text()))
    if plan.data.name != "scenes":
        raise InputError(f"{directory} is no run on scenes; its data are {plan.data.name!r}")
    problem = assembly.make_problem(plan)
    algorithm, _ = assembly.make_algorithm(plan, problem)
    state = _first_state(directory, plan, algorithm)
    return [
        _of_group(algorithm, state, name, group, index)
        for name, group in sorted(problem.groups.items())
    ]


def _first_state(directory: pathlib.Path, plan: Plan, algorithm: Algorithm) -> PyTree:
    """The newest state of a run's first seed."""
    checkpoints = Checkpoints(directory / "checkpoints")
    last = checkpoints.latest_round()
    if last is None:
        raise InputError(f"{directory} holds no checkpoint; run it first")
    states, _ = checkpoints.restore(last, first_shapes(algorithm, len(plan.course.seeds)))
    checkpoints.close()
    return jax.tree.map(lambda leaf: leaf[0], states)


def _of_group(
    algorithm: Algorithm, state: PyTree, name: str, group: ProblemGroup, index: int
) -> Panels:
    """The panels of one group's image."""
    test = group.splits.test
    row = test.indices[0, index % test.capacity]
    example = jax.tree.map(lambda leaf: np.asarray(leaf[row]), test.examples)
    first = {name: np.zeros(1, np.int32)}
    outputs = algorithm.predict(state, first, {name: example["inputs"][None, None]})[name]
    panels: Panels = [("image", (example["inputs"] + 1) * 127.5)]
    assert isinstance(group.outputs, dict)  # scenes have outputs by task
    for task in group.outputs:
        panels.append((f"{task} ({name})", example["labels"][task]))
        panels.append((f"{task} predicted", decoded(task, np.asarray(outputs[task][0, 0]))))
    return panels


def _rows(arguments: argparse.Namespace) -> list[Panels]:
    """What the command line asks for."""
    if arguments.workdir is not None:
        return of_run(arguments.workdir, arguments.index)
    return [of_scene(arguments.domain, arguments.index, arguments.size)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domain", choices=sorted(rendered.TASKS), default="A")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--size", choices=sorted(rendered.SIZES), default="small")
    parser.add_argument(
        "--workdir", type=pathlib.Path, help="a finished run on scenes: show its predictions"
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("scene.png"))
    arguments = parser.parse_args(argv)
    telemetry.exit_on_bad_input(lambda: draw(_rows(arguments), arguments.output))
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
