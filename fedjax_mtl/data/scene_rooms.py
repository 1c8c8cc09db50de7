"""Domain A of the rendered scenes: furnished rooms."""

from typing import NamedTuple

import numpy as np

from fedjax_mtl.data.ray_casting import Capsule, Cylinder, Light, Plane, Sphere
from fedjax_mtl.data.scene_parts import (
    CLASSES,
    IGNORE,
    Builder,
    Piece,
    Place,
    Scene,
    about_down,
    about_right,
    block_at,
    paint_near,
    point_at,
    turn_scene,
)

_UNLABELLED = 0.05
# Of 3 to 7 objects. In crowded rooms the edges would fill the smallest images.
_COUNTS = (0.45, 0.27, 0.14, 0.08, 0.06)


class _Room(NamedTuple):
    """Walls, floor and ceiling around the camera.

    Attributes:
        low: where the walls are in x and z, on the negative side.
        high: where they are on the positive side.
        floor: in y.
        ceiling: in y.
        yaw: where the camera looks.
    """

    low: np.ndarray
    high: np.ndarray
    floor: float
    ceiling: float
    yaw: float


def _cabinet(rng: np.random.Generator, place: Place) -> list[Piece]:
    width, height, depth = rng.uniform((0.6, 0.9, 0.35), (1.2, 1.9, 0.5))
    wood = paint_near(rng, (104, 66, 40), scale=0.3, stripes=(0, 1, 0), contrast=0.18)
    return [Piece(block_at(place, (-width / 2, 0, -depth), (width / 2, height, 0)), wood)]


def _table(rng: np.random.Generator, place: Place) -> list[Piece]:
    width, height, depth = rng.uniform((0.45, 0.65, 0.35), (0.75, 0.8, 0.5))
    wood = paint_near(rng, (198, 138, 62), scale=0.25, stripes=(1, 0, 0), contrast=0.12)
    top = block_at(place, (-width, height - 0.07, -depth), (width, height, depth))
    corners = [(x, z) for x in (-width + 0.06, width - 0.06) for z in (-depth + 0.06, depth - 0.06)]
    legs = [
        block_at(place, (x - 0.05, 0, z - 0.05), (x + 0.05, height - 0.07, z + 0.05))
        for x, z in corners
    ]
    return [Piece(shape, wood) for shape in [top, *legs]]


def _sofa(rng: np.random.Generator, place: Place) -> list[Piece]:
    width, depth = rng.uniform((0.7, 0.7), (1.0, 0.85))
    cloth = paint_near(rng, (124, 74, 96), scale=0.5, contrast=0.12)
    arms = [(-width, 0.16 - width), (width - 0.16, width)]
    boxes = [
        block_at(place, (-width, 0, -depth), (width, 0.42, 0)),
        block_at(place, (-width, 0, -0.22), (width, 0.85, 0)),
        *[block_at(place, (left, 0, -depth), (right, 0.62, 0)) for left, right in arms],
    ]
    return [Piece(box, cloth) for box in boxes]


def _indoor_ball(rng: np.random.Generator, place: Place) -> list[Piece]:
    radius = rng.uniform(0.22, 0.36)
    red = paint_near(rng, (186, 72, 48), scale=0.4, contrast=0.2)
    return [Piece(Sphere(point_at(place, 0, radius, 0), radius), red)]


def _lamp(rng: np.random.Generator, place: Place) -> list[Piece]:
    height, radius = rng.uniform((1.2, 0.16), (1.6, 0.24))
    bulb = paint_near(rng, (255, 240, 176), contrast=0.02, glow=1.0, jitter=0.03)
    metal = paint_near(rng, (120, 112, 90))
    stand = Cylinder(point_at(place, 0, 0, 0), point_at(place, 0, height - radius, 0), 0.035)
    return [Piece(Sphere(point_at(place, 0, height, 0), radius), bulb), Piece(stand, metal)]


def _bin(rng: np.random.Generator, place: Place) -> list[Piece]:
    radius, height = rng.uniform((0.2, 0.45), (0.28, 0.65))
    metal = paint_near(rng, (84, 100, 112), scale=0.1, stripes=(0, 1, 0), contrast=0.15)
    return [Piece(Cylinder(point_at(place, 0, 0, 0), point_at(place, 0, height, 0), radius), metal)]


def _picture(rng: np.random.Generator, place: Place) -> list[Piece]:
    width, height, up = rng.uniform((0.3, 0.25, 1.3), (0.55, 0.4, 1.7))
    frame = paint_near(rng, (58, 42, 30))
    canvas = paint_near(rng, (76, 122, 92), scale=0.4, contrast=0.35)
    inner = block_at(
        place, (-width + 0.07, up - height + 0.07, -0.05), (width - 0.07, up + height - 0.07, -0.01)
    )
    outer = block_at(place, (-width, up - height, -0.04), (width, up + height, 0.0))
    return [Piece(outer, frame), Piece(inner, canvas)]


def _window(rng: np.random.Generator, place: Place) -> list[Piece]:
    width, height, up = rng.uniform((0.4, 0.45, 1.35), (0.65, 0.6, 1.6))
    glass = paint_near(rng, (172, 210, 240), scale=2.0, contrast=0.06, glow=1.0, jitter=0.04)
    bar = paint_near(rng, (240, 240, 236), contrast=0.02, jitter=0.03)
    pane = block_at(place, (-width, up - height, -0.03), (width, up + height, 0.0))
    upright = block_at(place, (-0.035, up - height, -0.06), (0.035, up + height, 0.0))
    level = block_at(place, (-width, up - 0.035, -0.06), (width, up + 0.035, 0.0))
    return [Piece(pane, glass), Piece(upright, bar), Piece(level, bar)]


def _cushion(rng: np.random.Generator, place: Place) -> list[Piece]:
    half, radius = rng.uniform((0.2, 0.17), (0.32, 0.22))
    cloth = paint_near(rng, (206, 176, 66), scale=0.12, stripes=(0.7, 0, 0.7), contrast=0.2)
    return [
        Piece(
            Capsule(point_at(place, -half, radius, 0), point_at(place, half, radius, 0), radius),
            cloth,
        )
    ]


_ON_FLOOR: dict[str, Builder] = {
    "table": _table,
    "sofa": _sofa,
    "ball": _indoor_ball,
    "lamp": _lamp,
    "bin": _bin,
    "cushion": _cushion,
}
_ON_WALL: dict[str, Builder] = {"cabinet": _cabinet, "picture": _picture, "window": _window}


def _to_wall(room: _Room, angle: float) -> tuple[float, Place]:
    """Returns the distance from the camera to the wall in a direction, and the place there.

    The direction is horizontal. The place is the point on the floor, and a heading away from the
    camera.
    """
    direction = np.array([np.sin(angle), 0, np.cos(angle)])
    sides = np.where(direction > 0, room.high, room.low)
    reach = np.where(
        np.abs(direction) > 1e-9, sides / np.where(direction == 0, 1, direction), np.inf
    )
    reach[1] = np.inf
    axis = int(np.argmin(reach))
    heading = np.pi / 2 * np.sign(direction[0]) if axis == 0 else 0.0
    point = direction * reach[axis]
    return float(reach[axis]), (point + np.array([0, room.floor, 0]), heading)


def _find_place(
    rng: np.random.Generator, room: _Room, taken: list[np.ndarray], on_wall: bool
) -> Place:
    """Finds a place in view, away from the camera.

    If there is room within some tries, it is also away from the objects so far.
    """
    best: Place = (np.zeros(3), 0.0)
    best_gap = -np.inf
    for _ in range(40):
        angle = room.yaw + rng.uniform(-0.43, 0.43)
        reach, place = _to_wall(room, angle)
        fits = reach > 2.2
        if not on_wall:
            away = rng.uniform(1.9, max(2.0, reach - 0.6))
            point = away * np.array([np.sin(angle), 0, np.cos(angle)]) + np.array(
                [0, room.floor, 0]
            )
            place = (point, angle + rng.uniform(-0.6, 0.6))
        gap = min((float(np.linalg.norm(place[0] - other)) for other in taken), default=np.inf)
        # A place against a wall too close fills the view: it is the last resort.
        gap = gap if fits else reach - 10
        if gap > best_gap:
            best, best_gap = place, gap
        if best_gap > 1.1:
            break
    return best


def _shell(rng: np.random.Generator, room: _Room) -> list[Piece]:
    """Returns floor, ceiling and four walls; each wall is an instance of its own."""
    tint = rng.uniform(0.9, 1.08, 3)
    floor = paint_near(rng, (148, 112, 84), scale=0.35, stripes=(1, 0, 0), contrast=0.1)
    ceiling = paint_near(rng, (240, 236, 226), scale=3.0, contrast=0.02, jitter=0.02)
    pieces = [
        Piece(Plane(np.array([0.0, 1, 0]), room.floor), floor, 1, 0),
        Piece(Plane(np.array([0.0, -1, 0]), -room.ceiling), ceiling, 2, 2),
    ]
    for number, (axis, side) in enumerate(
        [(2, room.high), (0, room.low), (0, room.high), (2, room.low)]
    ):
        sign = np.sign(side[axis])
        wall = paint_near(
            rng, np.array((206, 192, 168)) * tint, scale=1.5, contrast=0.04, jitter=0.04
        )
        pieces.append(Piece(Plane(sign * np.eye(3)[axis], sign * side[axis]), wall, 3 + number, 1))
    return pieces


def room_scene(rng: np.random.Generator) -> Scene:
    """Draws a furnished room."""
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
    count = rng.choice(5, p=_COUNTS) + 3
    names = rng.permutation(list(builders))[:count]
    taken: list[np.ndarray] = []
    for name in names:
        place = _find_place(rng, room, taken, name in _ON_WALL)
        taken.append(place[0])
        label, instance = CLASSES["A"].index(name), len(taken) + 6
        pieces += [
            piece._replace(instance=instance, label=label) for piece in builders[name](rng, place)
        ]
    unlabelled = rng.random(len(taken) + 7) < _UNLABELLED
    pieces = [
        piece._replace(label=IGNORE) if unlabelled[piece.instance] else piece for piece in pieces
    ]
    lamp = np.array([rng.uniform(-0.6, 0.6), room.ceiling + 0.3, rng.uniform(0.8, 0.6 * length)])
    ends = np.stack([room.low, room.high])
    ends[:, 1] = room.ceiling, room.floor
    landmarks = np.stack(np.meshgrid(*ends.T), axis=-1).reshape(-1, 3)
    light = Light(np.append(lamp, 1.0), 0.5, 0.5)
    rotation = about_right(np.radians(rng.uniform(-5, 15))) @ about_down(-room.yaw)
    return turn_scene(
        Scene(pieces, light, np.array([0.0, 1, 0]), np.zeros((2, 3)), landmarks), rotation
    )
