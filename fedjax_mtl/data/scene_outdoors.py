"""Domain B of the rendered scenes: figures outdoors."""

import numpy as np

from fedjax_mtl.data.ray_casting import Capsule, Cylinder, Light, Plane, Sphere
from fedjax_mtl.data.scene_parts import (
    CLASSES,
    Builder,
    Piece,
    Place,
    Scene,
    about_right,
    block_at,
    paint_near,
    point_at,
    turn_scene,
)

_PERSONS = 0.42


def _limb(angle: float, spread: float, length: float) -> np.ndarray:
    """Returns the offset (right, up, forward) along a hanging limb.

    ``angle`` swings it forward, ``spread`` to the right.
    """
    return length * np.array(
        [np.sin(spread), -np.cos(spread) * np.cos(angle), np.cos(spread) * np.sin(angle)]
    )


def _person(rng: np.random.Generator, place: Place) -> list[Piece]:
    tall = rng.uniform(0.9, 1.1)
    skin = paint_near(rng, (236, 176, 140), contrast=0.05, grain=0.04, jitter=0.06)
    shirt = paint_near(rng, (214, 40, 70), scale=0.15, contrast=0.2, grain=0.05)
    sleeve = paint_near(rng, (250, 120, 130), scale=0.15, contrast=0.1, grain=0.05, jitter=0.06)
    trousers = paint_near(rng, (40, 44, 130), scale=0.15, contrast=0.1, grain=0.05)
    boots = paint_near(rng, (64, 30, 34), contrast=0.1, grain=0.05)
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
        first, last = (
            point_at(place, *tall * (point - np.array([0, lowest, 0]))) for point in (start, end)
        )
        pieces.append(Piece(Capsule(first, last, tall * radius), paint, part=part))
    return pieces


def _animal(rng: np.random.Generator, place: Place) -> list[Piece]:
    size, half = rng.uniform((0.8, 0.3), (1.25, 0.42))
    fur = paint_near(rng, (150, 92, 40), scale=0.2, stripes=(1, 0, 0), contrast=0.4, grain=0.1)
    limbs: list[tuple[tuple[float, ...], tuple[float, ...], float]] = [
        ((-half, 0.6, 0), (half, 0.6, 0), 0.19),
        ((half, 0.68, 0), (half + 0.2, 0.9, 0), 0.11),
        ((half + 0.2, 0.9, 0), (half + 0.36, 0.86, 0), 0.11),
        ((-half - 0.15, 0.65, 0), (-half - 0.35, 0.8, 0), 0.05),
    ]
    for right in (-half, half):
        for forward in (-0.1, 0.1):
            limbs.append(
                ((right, 0.5, forward), (right + rng.uniform(-0.15, 0.15), 0.07, forward), 0.07)
            )
    shapes = [
        Capsule(
            point_at(place, *size * np.array(start)),
            point_at(place, *size * np.array(end)),
            size * radius,
        )
        for start, end, radius in limbs
    ]
    return [Piece(shape, fur) for shape in shapes]


def _outdoor_ball(rng: np.random.Generator, place: Place) -> list[Piece]:
    radius = rng.uniform(0.25, 0.45)
    colours = paint_near(rng, (245, 210, 30), scale=0.4, contrast=0.4, grain=0.03)
    return [Piece(Sphere(point_at(place, 0, radius, 0), radius), colours)]


def _crate(rng: np.random.Generator, place: Place) -> list[Piece]:
    half = rng.uniform(0.3, 0.5)
    wood = paint_near(rng, (236, 128, 40), scale=0.2, stripes=(0, 1, 0), contrast=0.3, grain=0.06)
    return [Piece(block_at(place, (-half, 0, -half), (half, 2 * half, half)), wood)]


def _tree(rng: np.random.Generator, place: Place) -> list[Piece]:
    trunk, crown = rng.uniform((0.9, 0.7), (1.5, 1.1))
    bark = paint_near(rng, (96, 60, 36), scale=0.1, stripes=(0, 1, 0), contrast=0.2, grain=0.15)
    leaves = paint_near(rng, (14, 96, 34), scale=0.35, contrast=0.35, grain=0.25)
    top = point_at(place, 0, trunk + 0.8 * crown, 0)
    return [
        Piece(Cylinder(point_at(place, 0, 0, 0), point_at(place, 0, trunk + 0.3, 0), 0.16), bark),
        Piece(Sphere(top, crown), leaves),
    ]


def _car(rng: np.random.Generator, place: Place) -> list[Piece]:
    half = rng.uniform(1.1, 1.5)
    metal = paint_near(rng, (30, 120, 226), contrast=0.04, grain=0.02)
    glass = paint_near(rng, (20, 54, 84), contrast=0.04, grain=0.02)
    body = block_at(place, (-half, 0.15, -0.7), (half, 0.75, 0.7))
    cabin = block_at(place, (-0.6 * half, 0.75, -0.6), (0.5 * half, 1.25, 0.6))
    return [Piece(body, metal), Piece(cabin, glass)]


def _pole(rng: np.random.Generator, place: Place) -> list[Piece]:
    height, radius = rng.uniform((2.2, 0.09), (3.2, 0.14))
    rings = paint_near(
        rng, (190, 190, 200), scale=0.6, stripes=(0, 1, 0), contrast=0.45, grain=0.03
    )
    return [Piece(Cylinder(point_at(place, 0, 0, 0), point_at(place, 0, height, 0), radius), rings)]


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


def _stand(
    rng: np.random.Generator, eye: float, nearest: float, farthest: float, taken: list[np.ndarray]
) -> Place:
    """Finds a place in view that does not hide, and is not hidden by, the objects so far.

    If no try finds one, it is the best of them.
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


def outdoor_scene(rng: np.random.Generator) -> Scene:
    """Draws a scene outdoors: figures and objects on grass under a sky."""
    eye = rng.uniform(1.2, 1.8)
    grass = paint_near(rng, (112, 176, 60), scale=0.5, contrast=0.2, grain=0.12, jitter=0.15)
    pieces = [Piece(Plane(np.array([0.0, 1, 0]), eye), grass, instance=1)]
    others = [name for name in _OUTDOORS if name != "person"]
    # A person comes first, so that it finds a place in the open.
    count = int(rng.integers(1, 5))
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
    sun = np.array(
        [np.cos(above) * np.sin(side), -np.sin(above), -np.cos(above) * np.cos(side), 0.0]
    )
    sky = np.array([(200, 226, 250), (60, 130, 238)]) * rng.uniform(0.88, 1.02, 3)
    rotation = about_right(np.radians(rng.uniform(-3, 8)))
    scene = Scene(pieces, Light(sun, 0.45, 0.7), np.array([0.0, 1, 0]), sky, np.zeros((0, 3)))
    return turn_scene(scene, rotation)
