"""Ray casting of planes, spheres, boxes, capsules and cylinders, vectorised over pixels.

Depth, normals and curvature are exact. The camera sits at the origin: x right, y down, z forward,
all lengths in metres. A pixel's ray is ``r = ((x - c_x)/f, (y - c_y)/f, 1)``, not normalised, so
that the ray parameter of a hit is its depth along z.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_NEAREST = 0.05


class Plane(NamedTuple):
    """The points p with ``p . normal = offset``.

    Attributes:
        normal: float ``[3]``, a unit vector.
        offset: metres.
    """

    normal: np.ndarray
    offset: float


class Sphere(NamedTuple):
    """A ball's surface.

    Attributes:
        centre: float ``[3]``.
        radius: metres.
    """

    centre: np.ndarray
    radius: float


class Box(NamedTuple):
    """A box in any orientation.

    Attributes:
        centre: float ``[3]``.
        axes: float ``[3, 3]``, orthonormal; the rows are the box's directions.
        half: float ``[3]``, half extents along the rows of ``axes``.
    """

    centre: np.ndarray
    axes: np.ndarray
    half: np.ndarray


class Capsule(NamedTuple):
    """All points at distance ``radius`` of the segment from ``start`` to ``end``.

    Attributes:
        start: float ``[3]``.
        end: float ``[3]``.
        radius: metres.
    """

    start: np.ndarray
    end: np.ndarray
    radius: float


class Cylinder(NamedTuple):
    """A solid cylinder around the segment from ``start`` to ``end``, with flat caps.

    Attributes:
        start: float ``[3]``.
        end: float ``[3]``.
        radius: metres.
    """

    start: np.ndarray
    end: np.ndarray
    radius: float


Shape = Plane | Sphere | Box | Capsule | Cylinder


@dataclasses.dataclass(frozen=True)  # a tuple has an ``index`` of its own
class Hits:
    """What each pixel sees.

    Attributes:
        depth: float ``[height, width]``, metres along z; infinite where nothing is hit.
        normals: float ``[height, width, 3]``, unit and facing the camera; zero where nothing is
            hit.
        curvature: float ``[height, width, 2]``, principal curvatures in 1/m, the larger first,
            positive where convex.
        index: int ``[height, width]``, which shape; -1 where nothing is hit.
    """

    depth: np.ndarray
    normals: np.ndarray
    curvature: np.ndarray
    index: np.ndarray


def pixel_rays(height: int, width: int, focal: float) -> np.ndarray:
    """Returns rays through all pixel centres, float ``[height, width, 3]``.

    The principal point is the middle of the image; ``focal`` is in pixels.
    """
    x = (np.arange(width) - (width - 1) / 2) / focal
    y = (np.arange(height) - (height - 1) / 2) / focal
    across, down = np.meshgrid(x, y)
    return np.stack([across, down, np.ones_like(across)], axis=-1)


def turn(shape: Shape, rotation: np.ndarray) -> Shape:
    """Rotates a shape about the camera: every point p moves to ``rotation @ p``."""
    match shape:
        case Plane(normal, offset):
            return Plane(rotation @ normal, offset)
        case Sphere(centre, radius):
            return Sphere(rotation @ centre, radius)
        case Box(centre, axes, half):
            return Box(rotation @ centre, axes @ rotation.T, half)
        case Capsule(start, end, radius) | Cylinder(start, end, radius):
            return type(shape)(rotation @ start, rotation @ end, radius)


def corners(shape: Shape) -> np.ndarray:
    """Returns the distinctive points of a shape, float ``[points, 3]``.

    They are a box's corners and the ends of a capsule's or cylinder's axis; planes and spheres have
    none.
    """
    match shape:
        case Box(centre, axes, half):
            signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), axis=-1).reshape(-1, 3)
            return centre + (signs * half) @ axes
        case Capsule() | Cylinder():
            return np.stack([shape.start, shape.end])
    return np.zeros((0, 3))


def cast(shapes: Sequence[Shape], rays: np.ndarray) -> Hits:
    """Finds the nearest shape along every ray.

    Args:
        shapes: in camera coordinates; the camera is outside of all of them.
        rays: from ``pixel_rays``.
    """
    depth = np.full(rays.shape[:2], np.inf)
    index = np.full(rays.shape[:2], -1)
    # Rays parallel to a face or an axis divide by zero; the comparisons below drop the outcome.
    with np.errstate(divide="ignore", invalid="ignore"):
        for number, shape in enumerate(shapes):
            window = _window(shape, rays)
            found = _distance(shape, rays[window])
            nearer = (found > _NEAREST) & (found < depth[window])
            depth[window] = np.where(nearer, found, depth[window])
            index[window] = np.where(nearer, number, index[window])
    normals, curvature = np.zeros(rays.shape), np.zeros((*rays.shape[:2], 2))
    for number, shape in enumerate(shapes):
        own = np.nonzero(index == number)
        if len(own[0]):
            normals[own], curvature[own] = _surface(shape, rays[own] * depth[own][:, None])
    away = np.einsum("hwc,hwc->hw", normals, rays) > 0
    normals[away] *= -1
    return Hits(depth, normals, curvature, index)


def _window(shape: Shape, rays: np.ndarray) -> tuple[slice, slice]:
    """Returns a part of the image that surely contains the shape.

    Most shapes are small, so this saves most of the work.
    """
    match shape:
        case Plane():
            return slice(None), slice(None)
        case Sphere(centre, radius):
            pass
        case Box(centre, _, half):
            radius = float(np.linalg.norm(half))
        case Capsule(start, end, radius) | Cylinder(start, end, radius):
            centre = (start + end) / 2
            radius = float(np.linalg.norm(end - start)) / 2 + 1.5 * radius
    near, far = centre[2] - radius, centre[2] + radius
    if near <= _NEAREST:
        return slice(None), slice(None)

    def interval(places: np.ndarray, middle: float) -> slice:
        low, high = middle - radius, middle + radius
        first = np.searchsorted(places, min(low / near, low / far))
        return slice(first, np.searchsorted(places, max(high / near, high / far), side="right"))

    return interval(rays[:, 0, 1], centre[1]), interval(rays[0, :, 0], centre[0])


def _distance(shape: Shape, rays: np.ndarray) -> np.ndarray:
    """Returns ray parameters of the first hits, ``[height, width]``.

    They are infinite or not a number for misses.
    """
    match shape:
        case Plane(normal, offset):
            return offset / (rays @ normal)
        case Sphere(centre, radius):
            return _sphere_distance(centre, radius, rays)
        case Box(centre, axes, half):
            middle, directions = axes @ centre, rays @ axes.T
            first, second = (middle - half) / directions, (middle + half) / directions
            enter = np.minimum(first, second).max(axis=-1)
            leave = np.maximum(first, second).min(axis=-1)
            return np.where(enter <= leave, enter, np.inf)
        case Capsule(start, end, radius):
            ends = [_sphere_distance(place, radius, rays) for place in (start, end)]
            return np.minimum(_side_distance(shape, rays), np.minimum(*ends))
        case Cylinder(start, end, radius):
            return np.minimum(_side_distance(shape, rays), _cap_distance(shape, rays))


def _sphere_distance(centre: np.ndarray, radius: float, rays: np.ndarray) -> np.ndarray:
    squared, along = np.einsum("hwc,hwc->hw", rays, rays), rays @ centre
    root = np.sqrt(along**2 - squared * (centre @ centre - radius**2))
    return np.nan_to_num((along - root) / squared, nan=np.inf)


def _side_distance(shape: Capsule | Cylinder, rays: np.ndarray) -> np.ndarray:
    """Hits the curved side alone.

    That is a quadratic across the axis, then a test of the height along it.
    """
    start, end, radius = shape
    length = np.linalg.norm(end - start)
    axis = (end - start) / length
    rising, offset = rays @ axis, start @ axis
    squared = np.einsum("hwc,hwc->hw", rays, rays) - rising**2
    along = rays @ start - rising * offset
    root = np.sqrt(along**2 - squared * (start @ start - offset**2 - radius**2))
    found = (along - root) / squared
    height = found * rising - offset
    return np.where((height >= 0) & (height <= length), found, np.inf)


def _cap_distance(shape: Cylinder, rays: np.ndarray) -> np.ndarray:
    axis = shape.end - shape.start
    nearest = np.full(rays.shape[:2], np.inf)
    for centre in (shape.start, shape.end):
        found = (centre @ axis) / (rays @ axis)
        inside = np.square(rays * found[..., None] - centre).sum(axis=-1) <= shape.radius**2
        nearest = np.where(inside, np.minimum(nearest, found), nearest)
    return nearest


def _surface(shape: Shape, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns outward normals ``[n, 3]`` and principal curvatures ``[n, 2]`` at surface points."""
    flat = np.zeros((len(points), 2))
    match shape:
        case Plane(normal, _):
            return np.broadcast_to(normal, points.shape), flat
        case Sphere(centre, radius):
            return _unit(points - centre), np.full_like(flat, 1 / radius)
        case Box(centre, axes, half):
            local = (points - centre) @ axes.T
            face = np.argmax(np.abs(local) / half, axis=-1)
            sign = np.sign(np.take_along_axis(local, face[:, None], axis=-1))
            return sign * axes[face], flat
    start, end, radius = shape
    axis = (end - start) / np.linalg.norm(end - start)
    height, length = (points - start) @ axis, np.linalg.norm(end - start)
    curvature = flat
    curvature[:, 0] = 1 / radius
    if isinstance(shape, Capsule):
        nearest = np.clip(height, 0, length)
        curvature[(height < 0) | (height > length), 1] = 1 / radius
        return _unit(points - start - nearest[:, None] * axis), curvature
    across = points - start - height[:, None] * axis
    # A point lies on the face that it is closest to.
    beyond = np.minimum(np.abs(height), np.abs(height - length))
    on_cap = beyond < np.abs(np.linalg.norm(across, axis=-1) - radius)
    curvature[on_cap] = 0
    outward = np.where(height > length / 2, 1.0, -1.0)[:, None] * axis
    return np.where(on_cap[:, None], outward, _unit(across)), curvature


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


class Paint(NamedTuple):
    """How a shape looks.

    Attributes:
        colour: RGB in 0..255.
        waves: float ``[2, 3]``, wave vectors in rad/m of two sine waves whose product is the
            texture; a zero row leaves stripes.
        phases: float ``[2]``.
        contrast: relative strength of the waves.
        grain: relative strength of white noise, which looks rough at every resolution.
        glow: lower bound of the light that the shape reflects, for lamps and windows.
    """

    colour: np.ndarray
    waves: np.ndarray
    phases: np.ndarray
    contrast: float
    grain: float
    glow: float


class Light(NamedTuple):
    """A lamp or a sun.

    Attributes:
        place: float ``[4]``; the light is at ``place[:3]`` if ``place[3]`` is 1, and in direction
            ``place[:3]`` if it is 0.
        ambient: strength of the light from everywhere.
        diffuse: strength of the light from ``place``.
    """

    place: np.ndarray
    ambient: float
    diffuse: float


def shade(
    hits: Hits,
    paints: Sequence[Paint],
    light: Light,
    rays: np.ndarray,
    focal: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Returns colours of what the pixels see, float ``[height, width, 3]``.

    They are in 0..255 or above; zero where nothing is hit.

    Args:
        hits: what the pixels see.
        paints: of each shape.
        light: that shines on the shapes.
        rays: from ``pixel_rays``.
        focal: in pixels.
        rng: of the grain.
    """
    image = np.zeros(rays.shape)
    noise = rng.standard_normal(rays.shape[:2])
    seen = np.nonzero(hits.index >= 0)
    if not len(seen[0]):
        return image
    normals, own, directions = hits.normals[seen], hits.index[seen], rays[seen]
    points = directions * hits.depth[seen][:, None]
    colour, waves, phases, contrast, grain, glow = (
        np.stack(values)[own] for values in zip(*paints, strict=True)
    )
    towards = _unit(light.place[:3] - points * light.place[3])
    lit = light.ambient + light.diffuse * np.maximum(0, np.einsum("nc,nc->n", normals, towards))
    facing = np.abs(np.einsum("nc,nc->n", normals, _unit(directions)))
    # A wave shorter than two pixels would alias into noise, so it fades out.
    footprint = hits.depth[seen] / (focal * np.maximum(facing, 0.05))
    step = np.linalg.norm(waves, axis=-1).max(axis=-1) * footprint
    ripple = np.sin(np.einsum("nkc,nc->nk", waves, points) + phases).prod(axis=-1)
    texture = 1 + contrast * ripple / (1 + (step / 2) ** 4) + grain * noise[seen]
    image[seen] = colour * (np.maximum(lit, glow) * texture)[:, None]
    return image


def lambert(hits: Hits, rays: np.ndarray) -> np.ndarray:
    """Returns the brightness of white matt surfaces lit from the camera, float ``[height, width]``.

    It is in [0, 1]; 0 where nothing is hit.
    """
    return np.clip(-np.einsum("hwc,hwc->hw", hits.normals, _unit(rays)), 0, 1)


def differs(values: np.ndarray) -> np.ndarray:
    """Finds pixels whose value differs from the right or the lower neighbour's.

    Returns:
        bool ``[height, width]``.
    """
    found = np.zeros(values.shape, bool)
    found[:, :-1] |= values[:, :-1] != values[:, 1:]
    found[:-1] |= values[:-1] != values[1:]
    return found


def occlusions(hits: Hits, threshold: float = 0.05) -> np.ndarray:
    """Finds pixels where log depth jumps to another shape at the right or lower neighbour.

    Within one shape depth is continuous: ground near the horizon changes quickly from row to row
    and yet occludes nothing.

    Args:
        hits: what the pixels see.
        threshold: the least jump of log depth.

    Returns:
        bool ``[height, width]``.
    """
    # Any finite depth is far from that of a miss.
    log_depth = np.log(np.where(np.isfinite(hits.depth), hits.depth, 1e9))
    found = np.zeros(log_depth.shape, bool)
    for here, there in (
        ((slice(None), slice(-1)), (slice(None), slice(1, None))),
        ((slice(-1), slice(None)), (slice(1, None), slice(None))),
    ):
        jump = np.abs(log_depth[here] - log_depth[there]) > threshold
        found[here] |= jump & (hits.index[here] != hits.index[there])
    return found


def heat_map(
    points: np.ndarray, depth: np.ndarray, focal: float, slack: float, sigma: float
) -> np.ndarray:
    """Draws Gaussian bumps at the projections of visible points, the maximum where they meet.

    Args:
        points: float ``[points, 3]``.
        depth: of what the pixels see.
        focal: in pixels.
        slack: metres that a point may lie behind the surface: joints are inside of limbs.
        sigma: standard deviation in pixels.

    Returns:
        float ``[height, width]`` in [0, 1].
    """
    height, width = depth.shape
    points = points[points[:, 2] > _NEAREST]
    columns = points[:, 0] / points[:, 2] * focal + (width - 1) / 2
    rows = points[:, 1] / points[:, 2] * focal + (height - 1) / 2
    inside = (rows > -0.5) & (rows < height - 0.5) & (columns > -0.5) & (columns < width - 0.5)
    rows, columns, points = rows[inside], columns[inside], points[inside]
    surface = depth[np.rint(rows).astype(int), np.rint(columns).astype(int)]
    visible = points[:, 2] <= surface + slack
    across = np.exp(-((np.arange(width) - columns[visible, None]) ** 2) / (2 * sigma**2))
    down = np.exp(-((np.arange(height) - rows[visible, None]) ** 2) / (2 * sigma**2))
    result = np.zeros(depth.shape)
    for row, column in zip(down, across, strict=True):
        np.maximum(result, row[:, None] * column, out=result)
    return result
