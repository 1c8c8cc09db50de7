"""Rendered rooms and outdoor figures with exact dense labels: they stand in for the two data sets of
FMTL-Bench, arXiv 2402.12876.

Domain A ("rooms") takes the place of NYUD-v2, domain B ("figures outdoors") that of PASCAL-Context, neither
of which may be redistributed. Nothing is stored: an image follows from (seed, domain, split, index) alone,
and the scene does not depend on the image size.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from fedjax_mtl.data import ray_casting
from fedjax_mtl.data.ray_casting import Box, Capsule, Cylinder, Hits, Light, Paint, Plane, Shape, Sphere

IGNORE = 255
TASKS = {
    "A": ("semseg", "normals", "edge", "depth"),
    "B": ("semseg", "human_parts", "normals", "edge", "sal"),
}
EXTRAS = ("keypoints", "edge_texture", "edge_occlusion", "reshading", "curvature", "autoencode")
CLASSES = {
    "A": (
        *("floor", "wall", "ceiling", "cabinet", "table", "sofa"),
        *("ball", "lamp", "bin", "picture", "window", "cushion"),
    ),
    "B": ("background", "person", "animal", "ball", "crate", "tree", "car", "pole"),
}
PARTS = ("background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs")
NUM_SEMSEG = {domain: len(names) for domain, names in CLASSES.items()}
NUM_PARTS = len(PARTS)
SIZES = {
    "tiny": {"A": (32, 32), "B": (32, 32)},
    "small": {"A": (64, 64), "B": (64, 64)},
    "full": {"A": (448, 576), "B": (512, 512)},
}
LENGTHS = {
    "tiny": {"A": {"train": 40, "test": 20}, "B": {"train": 60, "test": 20}},
    "small": {"A": {"train": 400, "test": 200}, "B": {"train": 1000, "test": 400}},
    "full": {"A": {"train": 795, "test": 654}, "B": {"train": 4998, "test": 5105}},
}

_DOMAINS = {"A": 0, "B": 1}
_SPLITS = {"train": 0, "test": 1}
_FOCAL = {"A": 0.9, "B": 1.3}  # in image widths
_NOISE = {"A": 4.0, "B": 7.0}
_UNLABELLED, _MISSING, _PERSONS = 0.05, 0.02, 0.42
# Of 3 to 7 objects. In crowded rooms the edges would fill the smallest images.
_COUNTS_OF_A = (0.45, 0.27, 0.14, 0.08, 0.06)
# Where the pseudo-labels of the real domain B know the surface, and so do these.
_NORMALS_OF_B = [CLASSES["B"].index(name) for name in ("background", "person", "crate", "car", "pole")]


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


def _paint(rng, colour, *, scale=1.0, contrast=0.1, stripes=None, grain=0.0, glow=0.0, jitter=0.1) -> Paint:
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


def _about_down(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])


def _about_right(angle: float) -> np.ndarray:
    """Takes a level world into the view of a camera that looks down by ``angle``."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])


def _at(place: Place, right: float, up: float, forward: float) -> np.ndarray:
    """World coordinates of a point given in the frame of an object that stands at ``place``, a point and a
    heading.
    """
    return place[0] + _about_down(place[1]) @ np.array([right, -up, forward])


def _block(place: Place, low: tuple, high: tuple) -> Box:
    """The box between two points given as (right, up, forward) in the frame of an object."""
    low, high = np.array(low), np.array(high)
    half = (high - low) / 2
    return Box(_at(place, *(low + high) / 2), _about_down(place[1]).T, half)


# ---- domain A: rooms ----


class _Room(NamedTuple):
    """Walls at ``low`` and ``high`` in x and z, ``floor`` and ``ceiling`` in y, around the camera; ``yaw``
    is where it looks.
    """

    low: np.ndarray
    high: np.ndarray
    floor: float
    ceiling: float
    yaw: float


def _cabinet(rng, place):
    width, height, depth = rng.uniform((0.6, 0.9, 0.35), (1.2, 1.9, 0.5))
    wood = _paint(rng, (104, 66, 40), scale=0.3, stripes=(0, 1, 0), contrast=0.18)
    return [Piece(_block(place, (-width / 2, 0, -depth), (width / 2, height, 0)), wood)]


def _table(rng, place):
    width, height, depth = rng.uniform((0.45, 0.65, 0.35), (0.75, 0.8, 0.5))
    wood = _paint(rng, (198, 138, 62), scale=0.25, stripes=(1, 0, 0), contrast=0.12)
    top = _block(place, (-width, height - 0.07, -depth), (width, height, depth))
    corners = [(x, z) for x in (-width + 0.06, width - 0.06) for z in (-depth + 0.06, depth - 0.06)]
    legs = [_block(place, (x - 0.05, 0, z - 0.05), (x + 0.05, height - 0.07, z + 0.05)) for x, z in corners]
    return [Piece(shape, wood) for shape in [top, *legs]]


def _sofa(rng, place):
    width, depth = rng.uniform((0.7, 0.7), (1.0, 0.85))
    cloth = _paint(rng, (124, 74, 96), scale=0.5, contrast=0.12)
    arms = [(-width, 0.16 - width), (width - 0.16, width)]
    boxes = [
        _block(place, (-width, 0, -depth), (width, 0.42, 0)),
        _block(place, (-width, 0, -0.22), (width, 0.85, 0)),
        *[_block(place, (left, 0, -depth), (right, 0.62, 0)) for left, right in arms],
    ]
    return [Piece(box, cloth) for box in boxes]


def _indoor_ball(rng, place):
    radius = rng.uniform(0.22, 0.36)
    red = _paint(rng, (186, 72, 48), scale=0.4, contrast=0.2)
    return [Piece(Sphere(_at(place, 0, radius, 0), radius), red)]


def _lamp(rng, place):
    height, radius = rng.uniform((1.2, 0.16), (1.6, 0.24))
    bulb = _paint(rng, (255, 240, 176), contrast=0.02, glow=1.0, jitter=0.03)
    metal = _paint(rng, (120, 112, 90))
    stand = Cylinder(_at(place, 0, 0, 0), _at(place, 0, height - radius, 0), 0.035)
    return [Piece(Sphere(_at(place, 0, height, 0), radius), bulb), Piece(stand, metal)]


def _bin(rng, place):
    radius, height = rng.uniform((0.2, 0.45), (0.28, 0.65))
    metal = _paint(rng, (84, 100, 112), scale=0.1, stripes=(0, 1, 0), contrast=0.15)
    return [Piece(Cylinder(_at(place, 0, 0, 0), _at(place, 0, height, 0), radius), metal)]


def _picture(rng, place):
    width, height, up = rng.uniform((0.3, 0.25, 1.3), (0.55, 0.4, 1.7))
    frame = _paint(rng, (58, 42, 30))
    canvas = _paint(rng, (76, 122, 92), scale=0.4, contrast=0.35)
    inner = _block(
        place, (-width + 0.07, up - height + 0.07, -0.05), (width - 0.07, up + height - 0.07, -0.01)
    )
    outer = _block(place, (-width, up - height, -0.04), (width, up + height, 0.0))
    return [Piece(outer, frame), Piece(inner, canvas)]


def _window(rng, place):
    width, height, up = rng.uniform((0.4, 0.45, 1.35), (0.65, 0.6, 1.6))
    glass = _paint(rng, (172, 210, 240), scale=2.0, contrast=0.06, glow=1.0, jitter=0.04)
    bar = _paint(rng, (240, 240, 236), contrast=0.02, jitter=0.03)
    pane = _block(place, (-width, up - height, -0.03), (width, up + height, 0.0))
    upright = _block(place, (-0.035, up - height, -0.06), (0.035, up + height, 0.0))
    level = _block(place, (-width, up - 0.035, -0.06), (width, up + 0.035, 0.0))
    return [Piece(pane, glass), Piece(upright, bar), Piece(level, bar)]


def _cushion(rng, place):
    half, radius = rng.uniform((0.2, 0.17), (0.32, 0.22))
    cloth = _paint(rng, (206, 176, 66), scale=0.12, stripes=(0.7, 0, 0.7), contrast=0.2)
    return [Piece(Capsule(_at(place, -half, radius, 0), _at(place, half, radius, 0), radius), cloth)]


_ON_FLOOR: dict[str, Builder] = {
    "table": _table, "sofa": _sofa, "ball": _indoor_ball, "lamp": _lamp, "bin": _bin, "cushion": _cushion,
}  # fmt: skip
_ON_WALL: dict[str, Builder] = {"cabinet": _cabinet, "picture": _picture, "window": _window}


def _to_wall(room: _Room, angle: float) -> tuple[float, Place]:
    """Distance from the camera to the wall in a horizontal direction, and the place there: floor point and
    heading away from the camera.
    """
    direction = np.array([np.sin(angle), 0, np.cos(angle)])
    sides = np.where(direction > 0, room.high, room.low)
    reach = np.where(np.abs(direction) > 1e-9, sides / np.where(direction == 0, 1, direction), np.inf)
    reach[1] = np.inf
    axis = int(np.argmin(reach))
    heading = np.pi / 2 * np.sign(direction[0]) if axis == 0 else 0.0
    point = direction * reach[axis]
    return float(reach[axis]), (point + np.array([0, room.floor, 0]), heading)


def _find_place(rng, room: _Room, taken: list[np.ndarray], on_wall: bool) -> Place:
    """A place in view, away from the camera and, if there is room within some tries, from the objects so
    far.
    """
    best, best_gap = None, -np.inf
    for _ in range(40):
        angle = room.yaw + rng.uniform(-0.43, 0.43)
        reach, place = _to_wall(room, angle)
        fits = reach > 2.2
        if not on_wall:
            away = rng.uniform(1.9, max(2.0, reach - 0.6))
            point = away * np.array([np.sin(angle), 0, np.cos(angle)]) + np.array([0, room.floor, 0])
            place = (point, angle + rng.uniform(-0.6, 0.6))
        gap = min((np.linalg.norm(place[0] - other) for other in taken), default=np.inf)
        # A place against a wall too close fills the view: it is the last resort.
        gap = gap if fits else reach - 10
        if gap > best_gap:
            best, best_gap = place, gap
        if best_gap > 1.1:
            break
    return best


def _shell(rng, room: _Room) -> list[Piece]:
    """Floor, ceiling and four walls; each wall is an instance of its own."""
    tint = rng.uniform(0.9, 1.08, 3)
    floor = _paint(rng, (148, 112, 84), scale=0.35, stripes=(1, 0, 0), contrast=0.1)
    ceiling = _paint(rng, (240, 236, 226), scale=3.0, contrast=0.02, jitter=0.02)
    pieces = [
        Piece(Plane(np.array([0.0, 1, 0]), room.floor), floor, 1, 0),
        Piece(Plane(np.array([0.0, -1, 0]), -room.ceiling), ceiling, 2, 2),
    ]
    for number, (axis, side) in enumerate([(2, room.high), (0, room.low), (0, room.high), (2, room.low)]):
        sign = np.sign(side[axis])
        wall = _paint(rng, np.array((206, 192, 168)) * tint, scale=1.5, contrast=0.04, jitter=0.04)
        pieces.append(Piece(Plane(sign * np.eye(3)[axis], sign * side[axis]), wall, 3 + number, 1))
    return pieces


def _room_scene(rng: np.random.Generator) -> Scene:
    width, height, length = rng.uniform((3, 2.4, 3), (6, 3, 7))
    eye = rng.uniform(1.2, 1.6)
    left, behind = rng.uniform(1.1, width - 1.1), rng.uniform(0.15, 0.5)
    room = _Room(
        np.array([-left, 0, -behind]),
        np.array([width - left, 0, length - behind]),
        eye,
        eye - height,
        np.radians(rng.uniform(-30, 30)),
    )
    pieces = _shell(rng, room)
    builders = {**_ON_FLOOR, **_ON_WALL}
    count = rng.choice(5, p=_COUNTS_OF_A) + 3
    names = rng.permutation(list(builders))[:count]
    taken: list[np.ndarray] = []
    for name in names:
        place = _find_place(rng, room, taken, name in _ON_WALL)
        taken.append(place[0])
        label, instance = CLASSES["A"].index(name), len(taken) + 6
        pieces += [piece._replace(instance=instance, label=label) for piece in builders[name](rng, place)]
    unlabelled = rng.random(len(taken) + 7) < _UNLABELLED
    pieces = [piece._replace(label=IGNORE) if unlabelled[piece.instance] else piece for piece in pieces]
    lamp = np.array([rng.uniform(-0.6, 0.6), room.ceiling + 0.3, rng.uniform(0.8, 0.6 * length)])
    ends = np.stack([room.low, room.high])
    ends[:, 1] = room.ceiling, room.floor
    landmarks = np.stack(np.meshgrid(*ends.T), axis=-1).reshape(-1, 3)
    light = Light(np.append(lamp, 1.0), 0.5, 0.5)
    rotation = _about_right(np.radians(rng.uniform(-5, 15))) @ _about_down(-room.yaw)
    return _turn_scene(Scene(pieces, light, np.array([0.0, 1, 0]), np.zeros((2, 3)), landmarks), rotation)


# ---- domain B: figures outdoors ----


def _limb(angle: float, spread: float, length: float) -> np.ndarray:
    """Offset (right, up, forward) along a hanging limb: ``angle`` swings it forward, ``spread`` to the
    right.
    """
    return length * np.array(
        [np.sin(spread), -np.cos(spread) * np.cos(angle), np.cos(spread) * np.sin(angle)]
    )


def _person(rng, place):
    tall = rng.uniform(0.9, 1.1)
    skin = _paint(rng, (236, 176, 140), contrast=0.05, grain=0.04, jitter=0.06)
    shirt = _paint(rng, (214, 40, 70), scale=0.15, contrast=0.2, grain=0.05)
    sleeve = _paint(rng, (250, 120, 130), scale=0.15, contrast=0.1, grain=0.05, jitter=0.06)
    trousers = _paint(rng, (40, 44, 130), scale=0.15, contrast=0.1, grain=0.05)
    boots = _paint(rng, (64, 30, 34), contrast=0.1, grain=0.05)
    limbs = [
        (np.array([0, 1.62, 0]), np.array([0, 1.72, 0]), 0.13, skin, 1),
        (np.array([0, 1.02, 0]), np.array([0, 1.33, 0]), 0.18, shirt, 2),
    ]
    for side in (-1, 1):
        swing, spread = rng.uniform(-0.7, 1.2), side * rng.uniform(0.1, 1.1)
        shoulder = np.array([side * 0.23, 1.42, 0])
        elbow = shoulder + _limb(swing, spread, 0.3)
        hand = elbow + _limb(swing + rng.uniform(0, 1.5), spread, 0.3)
        limbs += [(shoulder, elbow, 0.075, sleeve, 3), (elbow, hand, 0.065, skin, 4)]
        stride, hip = rng.uniform(-0.6, 0.9), np.array([side * 0.11, 0.92, 0])
        apart = side * rng.uniform(0, 0.3)
        knee = hip + _limb(stride, apart, 0.42)
        foot = knee + _limb(stride - rng.uniform(0, 0.8), apart, 0.45)
        limbs += [(hip, knee, 0.1, trousers, 5), (knee, foot, 0.08, boots, 6)]
    lowest = min(min(start[1], end[1]) - radius for start, end, radius, _, _ in limbs)
    pieces = []
    for start, end, radius, paint, part in limbs:
        ends = [_at(place, *tall * (point - np.array([0, lowest, 0]))) for point in (start, end)]
        pieces.append(Piece(Capsule(*ends, tall * radius), paint, part=part))
    return pieces


def _animal(rng, place):
    size, half = rng.uniform((0.8, 0.3), (1.25, 0.42))
    fur = _paint(rng, (150, 92, 40), scale=0.2, stripes=(1, 0, 0), contrast=0.4, grain=0.1)
    limbs = [
        ((-half, 0.6, 0), (half, 0.6, 0), 0.19),
        ((half, 0.68, 0), (half + 0.2, 0.9, 0), 0.11),
        ((half + 0.2, 0.9, 0), (half + 0.36, 0.86, 0), 0.11),
        ((-half - 0.15, 0.65, 0), (-half - 0.35, 0.8, 0), 0.05),
    ]
    for right in (-half, half):
        for forward in (-0.1, 0.1):
            limbs.append(((right, 0.5, forward), (right + rng.uniform(-0.15, 0.15), 0.07, forward), 0.07))
    shapes = [
        Capsule(_at(place, *size * np.array(start)), _at(place, *size * np.array(end)), size * radius)
        for start, end, radius in limbs
    ]
    return [Piece(shape, fur) for shape in shapes]


def _outdoor_ball(rng, place):
    radius = rng.uniform(0.25, 0.45)
    colours = _paint(rng, (245, 210, 30), scale=0.4, contrast=0.4, grain=0.03)
    return [Piece(Sphere(_at(place, 0, radius, 0), radius), colours)]


def _crate(rng, place):
    half = rng.uniform(0.3, 0.5)
    wood = _paint(rng, (236, 128, 40), scale=0.2, stripes=(0, 1, 0), contrast=0.3, grain=0.06)
    return [Piece(_block(place, (-half, 0, -half), (half, 2 * half, half)), wood)]


def _tree(rng, place):
    trunk, crown = rng.uniform((0.9, 0.7), (1.5, 1.1))
    bark = _paint(rng, (96, 60, 36), scale=0.1, stripes=(0, 1, 0), contrast=0.2, grain=0.15)
    leaves = _paint(rng, (14, 96, 34), scale=0.35, contrast=0.35, grain=0.25)
    top = _at(place, 0, trunk + 0.8 * crown, 0)
    return [
        Piece(Cylinder(_at(place, 0, 0, 0), _at(place, 0, trunk + 0.3, 0), 0.16), bark),
        Piece(Sphere(top, crown), leaves),
    ]


def _car(rng, place):
    half = rng.uniform(1.1, 1.5)
    metal = _paint(rng, (30, 120, 226), contrast=0.04, grain=0.02)
    glass = _paint(rng, (20, 54, 84), contrast=0.04, grain=0.02)
    body = _block(place, (-half, 0.15, -0.7), (half, 0.75, 0.7))
    cabin = _block(place, (-0.6 * half, 0.75, -0.6), (0.5 * half, 1.25, 0.6))
    return [Piece(body, metal), Piece(cabin, glass)]


def _pole(rng, place):
    height, radius = rng.uniform((2.2, 0.09), (3.2, 0.14))
    rings = _paint(rng, (190, 190, 200), scale=0.6, stripes=(0, 1, 0), contrast=0.45, grain=0.03)
    return [Piece(Cylinder(_at(place, 0, 0, 0), _at(place, 0, height, 0), radius), rings)]


# Builder and the distances in metres at which an object fills a good part of the view.
_OUTDOORS: dict[str, tuple[Builder, float, float]] = {
    "person": (_person, 3.2, 5.5),
    "animal": (_animal, 2.8, 5.0),
    "ball": (_outdoor_ball, 2.4, 5.0),
    "crate": (_crate, 2.8, 6.0),
    "tree": (_tree, 5.0, 9.0),
    "car": (_car, 5.0, 9.0),
    "pole": (_pole, 3.5, 7.0),
}


def _stand(rng, eye: float, nearest: float, farthest: float, taken: list[np.ndarray]) -> Place:
    """A place in view that does not hide, and is not hidden by, the objects so far, if some tries find
    one.
    """
    best, best_gap = np.zeros(3), -np.inf
    for _ in range(10):
        angle, away = rng.uniform((-0.28, nearest), (0.28, farthest))
        point = np.array([away * np.tan(angle), eye, away])
        gap = min((abs(angle - np.arctan2(other[0], other[2])) for other in taken), default=np.inf)
        if gap > best_gap:
            best, best_gap = point, gap
        if best_gap > 0.14:
            break
    return best, rng.uniform(-np.pi, np.pi)


def _outdoor_scene(rng: np.random.Generator) -> Scene:
    eye = rng.uniform(1.2, 1.8)
    grass = _paint(rng, (112, 176, 60), scale=0.5, contrast=0.2, grain=0.12, jitter=0.15)
    pieces = [Piece(Plane(np.array([0.0, 1, 0]), eye), grass, instance=1)]
    others = [name for name in _OUTDOORS if name != "person"]
    # A person comes first, so that it finds a place in the open.
    count = rng.integers(1, 5)
    names = list(rng.permutation(others)[:count])
    if rng.random() < _PERSONS:
        persons = min(count, 1 + (rng.random() < 0.25))
        names = ["person"] * persons + names[: count - persons]
    taken: list[np.ndarray] = []
    for name in names:
        build, nearest, farthest = _OUTDOORS[name]
        place = _stand(rng, eye, nearest, farthest, taken)
        taken.append(place[0])
        label, instance = CLASSES["B"].index(name), len(taken) + 1
        pieces += [piece._replace(instance=instance, label=label) for piece in build(rng, place)]
    side, above = rng.uniform(0.5, 2.4) * rng.choice([-1, 1]), rng.uniform(0.5, 1.0)
    sun = np.array([np.cos(above) * np.sin(side), -np.sin(above), -np.cos(above) * np.cos(side), 0.0])
    sky = np.array([(200, 226, 250), (60, 130, 238)]) * rng.uniform(0.88, 1.02, 3)
    rotation = _about_right(np.radians(rng.uniform(-3, 8)))
    scene = Scene(pieces, Light(sun, 0.45, 0.7), np.array([0.0, 1, 0]), sky, np.zeros((0, 3)))
    return _turn_scene(scene, rotation)


def _turn_scene(scene: Scene, rotation: np.ndarray) -> Scene:
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


# ---- images and labels ----


class _View(NamedTuple):
    """A scene, the rays that look at it, what they hit, and the generator that drew it all so far."""

    scene: Scene
    rays: np.ndarray
    focal: float
    hits: Hits
    rng: np.random.Generator


def _look(domain: str, split: str, index: int, size: str | tuple[int, int], seed: int) -> _View:
    """The view before any label is degraded: tests read the true depth here."""
    height, width = _image_size(domain, size)
    rng = np.random.default_rng([seed, _DOMAINS[domain], _SPLITS[split], index])
    scene = _room_scene(rng) if domain == "A" else _outdoor_scene(rng)
    focal = _FOCAL[domain] * width
    rays = ray_casting.pixel_rays(height, width, focal)
    hits = ray_casting.cast([piece.shape for piece in scene.pieces], rays)
    return _View(scene, rays, focal, hits, rng)


def _image_size(domain: str, size: str | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, str) and size in SIZES:
        return SIZES[size][domain]
    if np.shape(size) != (2,) or min(size) < 1:
        raise ValueError(f"size is {size!r}; give one of {list(SIZES)} or a pair (height, width)")
    return int(size[0]), int(size[1])


def _image(view: _View, noise: float) -> np.ndarray:
    scene, rays, focal, hits, rng = view
    image = ray_casting.shade(hits, [piece.paint for piece in scene.pieces], scene.light, rays, focal, rng)
    rise = np.clip(-rays @ scene.down / np.linalg.norm(rays, axis=-1) / 0.6, 0, 1)[..., None]
    stretch = rng.uniform(4, 14, 2) * np.array([1, 2.5])
    clouds = np.sin(rays[..., 0] * stretch[0] + rng.uniform(0, 6)) * np.sin(rays[..., 1] * stretch[1] + 1)
    sky = scene.sky[0] * (1 - rise) + scene.sky[1] * rise + 24 * np.maximum(clouds, 0)[..., None]
    image = np.where((hits.index < 0)[..., None], sky, image)
    image += noise * rng.standard_normal(image.shape)
    return np.clip(image, 0, 255).astype(np.float32)


def _per_pixel(view: _View, values: list[int], missed: int = 0) -> np.ndarray:
    """A property of the pieces for every pixel, ``missed`` where the sky is seen."""
    # The index of a miss is -1 and so reads the last entry.
    return np.array([*values, missed])[view.hits.index]


def _salient(instances: np.ndarray, first_object: int) -> np.ndarray:
    """The object with the largest product of visible area and centrality, a Gaussian of its distance from
    the middle of the image.
    """
    height, width = instances.shape
    best, best_score = np.zeros_like(instances), 0.0
    for instance in range(first_object, instances.max() + 1):
        rows, columns = np.nonzero(instances == instance)
        if not len(rows):
            continue
        away = ((rows.mean() + 0.5) / height - 0.5) ** 2 + ((columns.mean() + 0.5) / width - 0.5) ** 2
        score = len(rows) * np.exp(-away / (2 * 0.25**2))
        if score > best_score:
            best, best_score = instances == instance, score
    return best


def _labels_of_room(view: _View) -> dict[str, np.ndarray]:
    pieces, rng = view.scene.pieces, view.rng
    missing = rng.random(view.hits.depth.shape) < _MISSING
    return {
        "semseg": _per_pixel(view, [piece.label for piece in pieces]),
        "normals": view.hits.normals,
        "edge": ray_casting.differs(_per_pixel(view, [piece.instance for piece in pieces])),
        "depth": np.where(missing | ~np.isfinite(view.hits.depth), 0, view.hits.depth),
    }


def _labels_of_outdoors(view: _View) -> dict[str, np.ndarray]:
    pieces = view.scene.pieces
    semseg = _per_pixel(view, [piece.label for piece in pieces])
    instances = _per_pixel(view, [piece.instance for piece in pieces])
    known = np.isin(semseg, _NORMALS_OF_B)
    # The class map that edges come from tells the sky from the ground, as PASCAL-Context does.
    with_sky = np.where(instances == 0, -1, semseg)
    return {
        "semseg": semseg,
        "human_parts": _per_pixel(view, [piece.part for piece in pieces]),
        "normals": np.where(known[..., None], view.hits.normals, 0),
        "edge": ray_casting.differs(with_sky),
        "sal": _salient(instances, first_object=2),
    }


def _extras(view: _View, image: np.ndarray) -> dict[str, np.ndarray]:
    scene, rays, focal, hits, _ = view
    points = [ray_casting.corners(piece.shape) for piece in scene.pieces]
    points = np.concatenate([*points, scene.landmarks])
    grey = image.mean(axis=-1) / 255
    sobel = [ndimage.sobel(grey, axis=axis, mode="nearest") / 4 for axis in (0, 1)]
    return {
        "keypoints": ray_casting.heat_map(points, hits.depth, focal, slack=0.25, sigma=1.5),
        "edge_texture": np.hypot(*sobel),
        "edge_occlusion": ray_casting.occlusions(hits),
        "reshading": ray_casting.lambert(hits, rays),
        "curvature": hits.curvature,
        "autoencode": image,
    }


def render(
    domain: str,
    split: str,
    index: int,
    size: str | tuple[int, int],
    seed: int = 0,
    extras: bool = False,
) -> dict[str, np.ndarray]:
    """One image and its labels, always the same for the same arguments.

    Args:
        domain: ``A`` (rooms) or ``B`` (figures outdoors).
        split: ``train`` or ``test``.
        index: from 0; ``LENGTHS`` holds how many images a profile uses, more can be drawn.
        size: ``tiny``, ``small`` or ``full`` (see ``SIZES``), or a pair (height, width). It changes the
            resolution, not the scene.
        seed: of the whole data set.
        extras: adds the labels of ``EXTRAS``.

    Returns:
        float32 arrays ``[height, width, channels]``. Both domains have ``image`` (3, RGB in 0..255),
        ``semseg`` (1, class numbers of ``CLASSES``; in A about 5 % of the objects are 255, unlabelled),
        ``normals`` (3, unit, camera coordinates x right, y down, z forward, facing the camera; zero where
        unknown) and ``edge`` (1, in {0, 1}). A has ``depth`` (1, metres along z; 0 at about 2 % of the
        pixels, missing). B has ``human_parts`` (1, numbers of ``PARTS``) and ``sal`` (1, in {0, 1}). Extras:
        ``keypoints`` (1, in [0, 1]), ``edge_texture`` (1, Sobel magnitude of the grey image in [0, 1] per
        pixel), ``edge_occlusion`` (1, in {0, 1}), ``reshading`` (1, in [0, 1]), ``curvature`` (2, principal
        curvatures in 1/m) and ``autoencode`` (3, the image). ``meta`` is int64 ``[6]``: seed, domain, split
        (their places in A, B and train, test), index, height, width.

    Raises:
        ValueError: an unknown domain, split or size, or a negative index.
    """
    if domain not in _DOMAINS:
        raise ValueError(f"domain is {domain!r}; give one of {list(_DOMAINS)}")
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}; give one of {list(_SPLITS)}")
    if index < 0:
        raise ValueError(f"index is {index}; images are numbered from 0")
    view = _look(domain, split, index, size, seed)
    image = _image(view, _NOISE[domain])
    labels = _labels_of_room(view) if domain == "A" else _labels_of_outdoors(view)
    if extras:
        labels |= _extras(view, image)
    labels = {
        name: np.atleast_3d(values).astype(np.float32) for name, values in {"image": image, **labels}.items()
    }
    height, width = image.shape[:2]
    return labels | {"meta": np.array([seed, _DOMAINS[domain], _SPLITS[split], index, height, width])}


def preprocess(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Marks with 255 what losses and metrics are to ignore: zero normals, missing depth, human parts of an
    image without any.
    """
    result = dict(sample)
    if "normals" in sample:
        unknown = ~sample["normals"].any(axis=-1, keepdims=True)
        result["normals"] = np.where(unknown, np.float32(IGNORE), sample["normals"])
    if "depth" in sample:
        result["depth"] = np.where(sample["depth"] == 0, np.float32(IGNORE), sample["depth"])
    if "human_parts" in sample and not sample["human_parts"].any():
        result["human_parts"] = np.full_like(sample["human_parts"], IGNORE)
    return result


def horizontal_flip(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The mirrored image and labels, before or after ``preprocess``: the x-component of known normals
    changes its sign.
    """
    result = {name: values[:, ::-1].copy() if values.ndim == 3 else values for name, values in sample.items()}
    if "normals" in result:
        known = (result["normals"] != IGNORE).any(axis=-1)
        result["normals"][known, 0] *= -1
    return result
