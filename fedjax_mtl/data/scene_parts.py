"""What the rendered scenes are made of: painted shapes with labels, and where objects stand."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

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
    """One shape of an object. ``instance`` numbers the objects, ``label`` is the class or 255, ``part`` the
    human part or 0.
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
    rng, colour, *, scale=1.0, contrast=0.1, stripes=None, grain=0.0, glow=0.0, jitter=0.1
) -> Paint:
    """Paint near a colour. ``scale`` is the texture's wavelength in metres; ``stripes`` the direction across
    stripes.
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
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])


def about_right(angle: float) -> np.ndarray:
    """Takes a level world into the view of a camera that looks down by ``angle``."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])


def point_at(place: Place, right: float, up: float, forward: float) -> np.ndarray:
    """World coordinates of a point given in the frame of an object that stands at ``place``, a point and a
    heading.
    """
    return place[0] + about_down(place[1]) @ np.array([right, -up, forward])


def block_at(place: Place, low: tuple, high: tuple) -> Box:
    """The box between two points given as (right, up, forward) in the frame of an object."""
    low, high = np.array(low), np.array(high)
    half = (high - low) / 2
    return Box(point_at(place, *(low + high) / 2), about_down(place[1]).T, half)


def turn_scene(scene: Scene, rotation: np.ndarray) -> Scene:
    """The scene as seen by a camera turned by the inverse rotation."""
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
