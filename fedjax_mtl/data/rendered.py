"""Rendered rooms and outdoor figures with exact dense labels.

They stand in for the two data sets of FMTL-Bench, arXiv 2402.12876. Domain A ("rooms") takes the
place of NYUD-v2, domain B ("figures outdoors") that of PASCAL-Context, neither of which may be
redistributed. Nothing is stored: an image follows from (seed, domain, split, index) alone, and the
scene does not depend on the image size.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.data import ray_casting
from fedjax_mtl.data.ray_casting import Hits
from fedjax_mtl.data.scene_outdoors import outdoor_scene
from fedjax_mtl.data.scene_parts import CLASSES, IGNORE, PARTS, Scene
from fedjax_mtl.data.scene_rooms import room_scene

TASKS = {
    "A": ("semseg", "normals", "edge", "depth"),
    "B": ("semseg", "human_parts", "normals", "edge", "sal"),
}
EXTRAS = ("keypoints", "edge_texture", "edge_occlusion", "reshading", "curvature", "autoencode")
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
_MISSING = 0.02
# Where the pseudo-labels of the real domain B know the surface, and so do these.
_NORMALS_OF_B = [
    CLASSES["B"].index(name) for name in ("background", "person", "crate", "car", "pole")
]


class View(NamedTuple):
    """What an image is made from.

    Attributes:
        scene: what there is to see.
        rays: that look at it, float ``[height, width, 3]``.
        focal: in pixels.
        hits: what the rays hit.
        rng: the generator that drew all so far.
    """

    scene: Scene
    rays: np.ndarray
    focal: float
    hits: Hits
    rng: np.random.Generator


def look(domain: str, split: str, index: int, size: str | tuple[int, int], seed: int) -> View:
    """Returns the view before any label is degraded: tests read the true depth here.

    The arguments are those of :func:`render`.
    """
    height, width = _image_size(domain, size)
    rng = np.random.default_rng([seed, _DOMAINS[domain], _SPLITS[split], index])
    scene = room_scene(rng) if domain == "A" else outdoor_scene(rng)
    focal = _FOCAL[domain] * width
    rays = ray_casting.pixel_rays(height, width, focal)
    hits = ray_casting.cast([piece.shape for piece in scene.pieces], rays)
    return View(scene, rays, focal, hits, rng)


def _image_size(domain: str, size: str | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, str) and size in SIZES:
        return SIZES[size][domain]
    if isinstance(size, str) or np.shape(size) != (2,) or min(size) < 1:
        raise InputError(f"size is {size!r}; give one of {list(SIZES)} or a pair (height, width)")
    return int(size[0]), int(size[1])


def _image(view: View, noise: float) -> np.ndarray:
    scene, rays, focal, hits, rng = view
    image = ray_casting.shade(
        hits, [piece.paint for piece in scene.pieces], scene.light, rays, focal, rng
    )
    rise = np.clip(-rays @ scene.down / np.linalg.norm(rays, axis=-1) / 0.6, 0, 1)[..., None]
    stretch = rng.uniform(4, 14, 2) * np.array([1, 2.5])
    clouds = np.sin(rays[..., 0] * stretch[0] + rng.uniform(0, 6)) * np.sin(
        rays[..., 1] * stretch[1] + 1
    )
    sky = scene.sky[0] * (1 - rise) + scene.sky[1] * rise + 24 * np.maximum(clouds, 0)[..., None]
    image = np.where((hits.index < 0)[..., None], sky, image)
    image += noise * rng.standard_normal(image.shape)
    return np.clip(image, 0, 255).astype(np.float32)


def _per_pixel(view: View, values: list[int], missed: int = 0) -> np.ndarray:
    """Returns a property of the pieces for every pixel, ``missed`` where the sky is seen."""
    # The index of a miss is -1 and so reads the last entry.
    return np.array([*values, missed])[view.hits.index]


def _salient(instances: np.ndarray, first_object: int) -> np.ndarray:
    """Finds the object with the largest product of visible area and centrality.

    Centrality is a Gaussian of its distance from the middle of the image.
    """
    height, width = instances.shape
    best, best_score = np.zeros_like(instances), 0.0
    for instance in range(first_object, instances.max() + 1):
        rows, columns = np.nonzero(instances == instance)
        if not len(rows):
            continue
        away = ((rows.mean() + 0.5) / height - 0.5) ** 2 + (
            (columns.mean() + 0.5) / width - 0.5
        ) ** 2
        score = len(rows) * np.exp(-away / (2 * 0.25**2))
        if score > best_score:
            best, best_score = instances == instance, score
    return best


def _labels_of_room(view: View) -> dict[str, np.ndarray]:
    pieces, rng = view.scene.pieces, view.rng
    missing = rng.random(view.hits.depth.shape) < _MISSING
    return {
        "semseg": _per_pixel(view, [piece.label for piece in pieces]),
        "normals": view.hits.normals,
        "edge": ray_casting.differs(_per_pixel(view, [piece.instance for piece in pieces])),
        "depth": np.where(missing | ~np.isfinite(view.hits.depth), 0, view.hits.depth),
    }


def _labels_of_outdoors(view: View) -> dict[str, np.ndarray]:
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


def _extras(view: View, image: np.ndarray) -> dict[str, np.ndarray]:
    scene, rays, focal, hits, _ = view
    corners = [ray_casting.corners(piece.shape) for piece in scene.pieces]
    points = np.concatenate([*corners, scene.landmarks])
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
    """Renders one image and its labels, always the same for the same arguments.

    Both domains have

    * ``image``: 3 channels, RGB in 0..255;
    * ``semseg``: 1 channel, class numbers of ``CLASSES``; in A about 5 % of the objects are 255,
      unlabelled;
    * ``normals``: 3 channels, unit, camera coordinates x right, y down, z forward, facing the
      camera; zero where unknown;
    * ``edge``: 1 channel, in {0, 1}.

    A also has

    * ``depth``: 1 channel, metres along z; 0 at about 2 % of the pixels, missing.

    B also has

    * ``human_parts``: 1 channel, numbers of ``PARTS``;
    * ``sal``: 1 channel, in {0, 1}.

    The extras are

    * ``keypoints``: 1 channel, in [0, 1];
    * ``edge_texture``: 1 channel, Sobel magnitude of the grey image in [0, 1] per pixel;
    * ``edge_occlusion``: 1 channel, in {0, 1};
    * ``reshading``: 1 channel, in [0, 1];
    * ``curvature``: 2 channels, principal curvatures in 1/m;
    * ``autoencode``: 3 channels, the image.

    Args:
        domain: ``A`` (rooms) or ``B`` (figures outdoors).
        split: ``train`` or ``test``.
        index: from 0; ``LENGTHS`` holds how many images a profile uses, more can be drawn.
        size: ``tiny``, ``small`` or ``full`` (see ``SIZES``), or a pair (height, width). It changes
            the resolution, not the scene.
        seed: of the whole data set.
        extras: adds the labels of ``EXTRAS``.

    Returns:
        float32 arrays ``[height, width, channels]``, and ``meta``, int64 ``[6]``: seed, domain,
        split (their places in A, B and train, test), index, height, width.

    Raises:
        InputError: an unknown domain, split or size, or a negative index.
    """
    if domain not in _DOMAINS:
        raise InputError(f"domain is {domain!r}; give one of {list(_DOMAINS)}")
    if split not in _SPLITS:
        raise InputError(f"split is {split!r}; give one of {list(_SPLITS)}")
    if index < 0:
        raise InputError(f"index is {index}; images are numbered from 0")
    view = look(domain, split, index, size, seed)
    image = _image(view, _NOISE[domain])
    labels = _labels_of_room(view) if domain == "A" else _labels_of_outdoors(view)
    if extras:
        labels |= _extras(view, image)
    labels = {
        name: np.atleast_3d(values).astype(np.float32)
        for name, values in {"image": image, **labels}.items()
    }
    height, width = image.shape[:2]
    return labels | {
        "meta": np.array([seed, _DOMAINS[domain], _SPLITS[split], index, height, width])
    }


def preprocess(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Marks with 255 what losses and metrics are to ignore.

    That is zero normals, missing depth, and the human parts of an image without any.
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
    """Mirrors image and labels, before or after ``preprocess``.

    The x-component of known normals changes its sign.
    """
    result = {
        name: values[:, ::-1].copy() if values.ndim == 3 else values
        for name, values in sample.items()
    }
    if "normals" in result:
        known = (result["normals"] != IGNORE).any(axis=-1)
        result["normals"][known, 0] *= -1
    return result
