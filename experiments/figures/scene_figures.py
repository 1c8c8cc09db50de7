"""A figure of dense samples: image, every label and, with a trained run, every prediction.

python -m experiments.figures.scene_figures --domain=A --index=3 --output=scene.png
python -m experiments.figures.scene_figures --workdir=runs/fedbone/fedbone --output=predictions.png
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments import build
from experiments.outputs.checkpoints import Checkpoints
from experiments.problems.base import PopulationProblem
from fedjax_mtl.data import rendered

Panels = list[tuple[str, np.ndarray]]

_DISCRETE = {"semseg": max(rendered.NUM_SEMSEG.values()), "human_parts": rendered.NUM_PARTS}


def shown(task: str, values: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """A label or decoded prediction ``[h, w, channels]`` as an image, and how to draw it; 255 is blank."""
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
    """A model's outputs ``[h, w, channels]`` in the form of the task's labels."""
    if task in _DISCRETE:
        return outputs.argmax(-1)[..., None].astype(np.float32)
    if task == "sal":
        return 1 / (1 + np.exp(outputs[..., :1] - outputs[..., 1:]))
    if task == "edge":
        return 1 / (1 + np.exp(-outputs))
    return outputs


def draw(rows: list[Panels], path: pathlib.Path) -> None:
    """One row of panels a sample, each ``(title, [h, w, channels])`` whose title starts with the task."""
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
    """The panels of one rendered scene with all its labels."""
    sample = rendered.preprocess(rendered.render(domain, "test", index, size, extras=extras))
    return [(name, values) for name, values in sample.items() if name != "meta"]


def of_run(directory: pathlib.Path, index: int) -> list[Panels]:
    """For every group of a finished run: an image of its test set, its labels and its first client's predictions, of the first seed.

    Raises:
        ValueError: the run was not on scenes, or has no checkpoint.
    """
    config = ml_collections.ConfigDict(json.loads((directory / "config.json").read_text()))
    problem = build.make_problem(config)
    if not isinstance(problem, PopulationProblem) or config.data.name != "scenes":
        raise ValueError(f"{directory} is no run on scenes; its data are {config.data.name!r}")
    algorithm, _ = build.make_algorithm(config, problem)
    checkpoints = Checkpoints(directory / "checkpoints")
    last = checkpoints.latest_round()
    if last is None:
        raise ValueError(f"{directory} holds no checkpoint; run it first")
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), len(config.seeds)))
    state, _ = checkpoints.restore(last, jax.eval_shape(jax.vmap(algorithm.init), keys))
    state = jax.tree.map(lambda leaf: leaf[0], state)
    rows = []
    for name, federation in sorted(problem.splits.test.items()):
        row = federation.indices[0, index % federation.capacity]
        example = jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), federation.examples)
        inputs = {name: example["inputs"][None, None]}
        outputs = algorithm.predict(state, {name: np.zeros(1, np.int32)}, inputs)[name]
        panels: Panels = [("image", (example["inputs"] + 1) * 127.5)]
        for task in problem.outputs[name]:
            panels.append((f"{task} ({name})", example["labels"][task]))
            panels.append((f"{task} predicted", decoded(task, np.asarray(outputs[task][0, 0]))))
        rows.append(panels)
    return rows


def main(argv: list[str] | None = None) -> None:
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
    try:
        rows = (
            of_run(arguments.workdir, arguments.index)
            if arguments.workdir
            else [of_scene(arguments.domain, arguments.index, arguments.size)]
        )
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    draw(rows, arguments.output)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
