"""What the rendered scenes are made of: painted shapes with labels, and where objects stand."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fedjax_mtl.data import ray_casting
from fedjax_mtl.data.ray_casting import Box, Light, Paint, Shape

IGNORE = 255
CLASSES = {
    "A": (
        *("floor", "wall", "ceiling", "cabinet", "table", "sofa"),
        *("ball", "lamp", "bin", "picture", "window", "cushion"),
    ),
    "B": ("background", "person", "animal", "ball", "crate", "tree", "car", "pole"),
}
PARTS = ("background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs")


class Piece(NamedTuple):
    """One shape of an object.

    Attributes:
        shape: in camera coordinates.
        paint: how it looks.
        instance: the number of its object.
        label: the class, or 255.
        part: the human part, or 0.
    """

    shape: Shape
    paint: Paint
    instance: int = 0
    label: int = 0
    part: int = 0


class Scene(NamedTuple):
    """What there is to see, in camera coordinates.

    Attributes:
        pieces: everything with a surface.
        light: that shines on it.
        down: float ``[3]``, unit vector of gravity.
        sky: float ``[2, 3]``, colours at the horizon and overhead.
        landmarks: float ``[points, 3]``, corners that belong to no piece, such as the room's.
    """

    pieces: list[Piece]
    light: Light
    down: np.ndarray
    sky: np.ndarray
    landmarks: np.ndarray


Place = tuple[np.ndarray, float]
Builder = Callable[[np.random.Generator, Place], list[Piece]]


def paint_near(
    rng: np.random.Generator,
    colour: ArrayLike,
    *,
    scale: float = 1.0,
    contrast: float = 0.1,
    stripes: ArrayLike | None = None,
    grain: float = 0.0,
    glow: float = 0.0,
    jitter: float = 0.1,
) -> Paint:
    """Draws a paint near a colour.

    Args:
        rng: the source of randomness.
        colour: RGB in 0..255.
        scale: the texture's wavelength in metres.
        contrast: relative strength of the texture.
        stripes: the direction across stripes, ``[3]``; None for no stripes.
        grain: relative strength of white noise.
        glow: lower bound of the light that the shape reflects.
        jitter: how far the colour may be from ``colour``, relatively.
    """
    shift = rng.uniform(1 - jitter, 1 + jitter) * rng.uniform(1 - jitter, 1 + jitter, 3)
    waves = rng.standard_normal((2, 3))
    waves *= 2 * np.pi / scale / np.linalg.norm(waves, axis=1, keepdims=True)
    phases = rng.uniform(0, 2 * np.pi, 2)
    if stripes is not None:
        waves = np.stack([np.asarray(stripes) * 2 * np.pi / scale, np.zeros(3)])
        phases[1] = np.pi / 2
    return Paint(np.array(colour) * shift, waves, phases, contrast, grain, glow)


def about_down(angle: float) -> np.ndarray:
    """Returns the rotation by ``angle`` about the downward axis, ``[3, 3]``."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])


def about_right(angle: float) -> np.ndarray:
    """Returns the rotation that takes a level world into the view of a camera, ``[3, 3]``.

    The camera looks down by ``angle``.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])


def point_at(place: Place, right: float, up: float, forward: float) -> np.ndarray:
    """Returns world coordinates of a point given in the frame of an object.

    The object stands at ``place``, a point and a heading.
    """
    return place[0] + about_down(place[1]) @ np.array([right, -up, forward])


def block_at(place: Place, low: ArrayLike, high: ArrayLike) -> Box:
    """Returns the box between two points in the frame of an object.

    The points are given as (right, up, forward).
    """
    first, last = np.array(low), np.array(high)
    half = (last - first) / 2
    return Box(point_at(place, *(first + last) / 2), about_down(place[1]).T, half)


def turn_scene(scene: Scene, rotation: np.ndarray) -> Scene:
    """Returns the scene as seen by a camera turned by the inverse rotation."""
    pieces = []
    for piece in scene.pieces:
        paint = piece.paint._replace(waves=piece.paint.waves @ rotation.T)
        pieces.append(piece._replace(shape=ray_casting.turn(piece.shape, rotation), paint=paint))
    place = np.append(rotation @ scene.light.place[:3], scene.light.place[3])
    return scene._replace(
        pieces=pieces,
        light=scene.light._replace(place=place),
        down=rotation @ scene.down,
        landmarks=scene.landmarks @ rotation.T,
    )
