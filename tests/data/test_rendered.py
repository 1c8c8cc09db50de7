"""Rendered rooms and outdoor figures: exact geometry, labels that agree, and conventions."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from fedjax_mtl.data import ray_casting, rendered
from fedjax_mtl.data.ray_casting import Box, Capsule, Cylinder, Sphere

COUNT = 160


def make(domain, split="train", count=COUNT, size="tiny", **options):
    return [rendered.render(domain, split, index, size, **options) for index in range(count)]


@pytest.fixture(scope="module")
def samples():
    return {domain: make(domain) for domain in "AB"}


def look_up(sample, name):
    return sample[name][..., 0]


# ---- ray casting ----


def rotation(rng):
    return np.linalg.qr(rng.normal(size=(3, 3)))[0]


def draw_shapes(seed):
    """Draws one shape of each kind, in view or partly out of it."""
    rng = np.random.default_rng(seed)
    place, other = rng.uniform((-1.5, -1.5, 3), (1.5, 1.5, 5), (2, 3))
    return [
        Sphere(place, rng.uniform(0.2, 1)),
        Box(place, rotation(rng), rng.uniform(0.2, 0.8, 3)),
        Capsule(place, other, rng.uniform(0.1, 0.5)),
        Cylinder(place, other, rng.uniform(0.1, 0.5)),
    ]


def signed_distance(shape, points):
    """The distance to a shape's surface, which is negative inside.

    It is exact enough near the surface to differentiate it there.
    """
    if isinstance(shape, Sphere):
        return np.linalg.norm(points - shape.centre, axis=-1) - shape.radius
    if isinstance(shape, Box):
        return (np.abs((points - shape.centre) @ shape.axes.T) - shape.half).max(axis=-1)
    length = np.linalg.norm(shape.end - shape.start)
    axis = (shape.end - shape.start) / length
    height = (points - shape.start) @ axis
    across = points - shape.start - height[..., None] * axis
    if isinstance(shape, Capsule):
        along = (height - np.clip(height, 0, length))[..., None] * axis
        return np.linalg.norm(across + along, axis=-1) - shape.radius
    beyond = np.abs(height - length / 2) - length / 2
    return np.maximum(np.linalg.norm(across, axis=-1) - shape.radius, beyond)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", range(4))
def test_rays_hit_where_the_distance_to_the_shape_is_zero(kind, seed):
    shape = draw_shapes(seed)[kind]
    rays = ray_casting.pixel_rays(24, 30, 25.0)
    hits = ray_casting.cast([shape], rays)
    hit = hits.index == 0
    assert hit.any() and not hit.all()
    points = rays[hit] * hits.depth[hit][:, None]
    np.testing.assert_allclose(signed_distance(shape, points), 0, atol=1e-9)
    # Nothing is inside of the shape before the hit, or anywhere along a miss.
    before = np.linspace(0.01, 0.999, 200)[:, None, None]
    assert (signed_distance(shape, before * points) > 0).all()
    assert (signed_distance(shape, 10 * before * rays[~hit]) > 0).all()
    # The normal is the gradient of the distance; kinks are avoided by taking the median.
    step = 1e-6
    gradient = [
        signed_distance(shape, points + step * side) - signed_distance(shape, points - step * side)
        for side in np.eye(3)
    ]
    difference = np.abs(np.stack(gradient, axis=-1) / (2 * step) - hits.normals[hit]).max(axis=-1)
    assert np.median(difference) < 1e-6 and (difference < 1e-4).mean() > 0.97
    np.testing.assert_allclose(np.linalg.norm(hits.normals[hit], axis=-1), 1, atol=1e-9)
    assert (np.einsum("nc,nc->n", hits.normals[hit], rays[hit]) <= 1e-12).all()
    assert np.isinf(hits.depth[~hit]).all() and not hits.normals[~hit].any()


def test_sphere_against_the_formula():
    centre, radius, focal = np.array([0.3, -0.2, 4.0]), 0.8, 40.0
    rays = ray_casting.pixel_rays(33, 41, focal)
    hits = ray_casting.cast([Sphere(centre, radius)], rays)
    a, b = (rays**2).sum(axis=-1), rays @ centre
    discriminant = b**2 - a * (centre @ centre - radius**2)
    np.testing.assert_array_equal(hits.index == 0, discriminant >= 0)
    hit = hits.index == 0
    depth = (b[hit] - np.sqrt(discriminant[hit])) / a[hit]
    np.testing.assert_allclose(hits.depth[hit], depth, rtol=1e-12)
    normals = (rays[hit] * depth[:, None] - centre) / radius
    np.testing.assert_allclose(hits.normals[hit], normals, atol=1e-9)
    np.testing.assert_allclose(hits.curvature[hit], 1 / radius)
    assert not hits.curvature[~hit].any()


def test_curvature_of_capsules_and_cylinders():
    rays = ray_casting.pixel_rays(41, 41, 40.0)
    up, down = np.array([0.0, -1.0, 4.0]), np.array([0.0, 1.0, 4.0])
    middle, top = (20, 20), (9, 20)
    capsule = ray_casting.cast([Capsule(up, down, 0.25)], rays).curvature
    np.testing.assert_allclose(capsule[middle], [4, 0])
    np.testing.assert_allclose(capsule[top], [4, 4])
    # From above, the cylinder shows its flat cap.
    low = np.array([0.0, 0.8, 4.0])
    cylinder = ray_casting.cast([Cylinder(low, down + [0, 1, 0], 0.6)], rays)
    seen = cylinder.index == 0
    flat = seen & (cylinder.normals[..., 1] < -0.99)
    assert flat.sum() > 5 and not cylinder.curvature[flat].any()
    np.testing.assert_allclose(
        cylinder.curvature[seen & ~flat], [[1 / 0.6, 0]] * (seen & ~flat).sum()
    )


def test_the_nearer_shape_wins():
    rays = ray_casting.pixel_rays(9, 9, 9.0)
    shapes = [Sphere(np.array([0, 0, 6.0]), 1.0), Sphere(np.array([0, 0, 3.0]), 0.5)]
    for order in (shapes, shapes[::-1]):
        hits = ray_casting.cast(order, rays)
        assert hits.depth[4, 4] == 2.5 and order[hits.index[4, 4]].radius == 0.5


def test_turning_a_shape_turns_its_points():
    rng = np.random.default_rng(0)
    matrix = rotation(rng)
    points = rng.normal(size=(50, 3)) * 3
    for shape in draw_shapes(0):
        moved = ray_casting.turn(shape, matrix)
        np.testing.assert_allclose(
            signed_distance(moved, points @ matrix.T), signed_distance(shape, points), atol=1e-9
        )
        if not isinstance(shape, Sphere):
            expected = ray_casting.corners(shape) @ matrix.T
            np.testing.assert_allclose(ray_casting.corners(moved), expected, atol=1e-9)


# ---- interface ----


@pytest.mark.parametrize("domain", "AB")
def test_the_same_arguments_give_the_same_bytes(domain):
    def draw(index, **options):
        return rendered.render(domain, options.pop("split", "train"), index, "tiny", **options)

    first = {index: draw(index, extras=True) for index in (0, 1, 5)}
    for index in (5, 0, 1):
        again = draw(index, extras=True)
        assert first[index].keys() == again.keys()
        assert all(
            values.tobytes() == again[name].tobytes() for name, values in first[index].items()
        )
    # Extras change nothing else, and everything in the key changes the image.
    image = draw(0)["image"]
    np.testing.assert_array_equal(image, first[0]["image"])
    for other in (draw(1), draw(0, seed=1), draw(0, split="test")):
        assert np.abs(image - other["image"]).mean() > 5


@pytest.mark.parametrize("domain", "AB")
@pytest.mark.parametrize("size", ["tiny", "small", "full", (20, 28)])
def test_keys_shapes_and_types(domain, size):
    sample = rendered.render(domain, "test", 3, size, extras=True)
    height, width = rendered.SIZES[size][domain] if isinstance(size, str) else size
    channels = {name: 1 for name in (*rendered.TASKS[domain], *rendered.EXTRAS)}
    channels |= {"image": 3, "normals": 3, "curvature": 2, "autoencode": 3}
    assert set(sample) == {*channels, "meta"}
    for name, count in channels.items():
        assert sample[name].shape == (height, width, count) and sample[name].dtype == np.float32
        assert np.isfinite(sample[name]).all()
    np.testing.assert_array_equal(sample["meta"], [0, "AB".index(domain), 1, 3, height, width])
    assert (
        0 <= sample["image"].min() and sample["image"].max() <= 255 and sample["image"].std() > 10
    )


def test_the_scene_does_not_depend_on_the_size():
    for domain in "AB":
        small, large = (rendered.render(domain, "train", 2, size) for size in ((32, 32), (96, 96)))
        # Three pixels in a row of the large image cover one of the small one, around its centre.
        same = small["semseg"] == large["semseg"][1::3, 1::3]
        assert same.all()


def test_profiles():
    assert rendered.SIZES["full"] == {"A": (448, 576), "B": (512, 512)}
    assert rendered.LENGTHS["full"]["B"] == {"train": 4998, "test": 5105}
    assert rendered.LENGTHS["small"]["A"] == {"train": 400, "test": 200}
    assert rendered.NUM_SEMSEG == {"A": 12, "B": 8}
    assert list(rendered.LENGTHS) == list(rendered.SIZES)


BAD = {
    "domain": (("C", "train", 0, "tiny"), "domain is 'C'; give one of"),
    "split": (("A", "val", 0, "tiny"), "split is 'val'; give one of"),
    "size": (("A", "train", 0, "huge"), "size is 'huge'; give one of"),
    "triple": (("A", "train", 0, (3, 4, 5)), r"size is \(3, 4, 5\)"),
    "number": (("B", "train", 0, 64), "size is 64"),
    "empty": (("B", "train", 0, (0, 4)), r"size is \(0, 4\)"),
    "index": (("A", "train", -1, "tiny"), "index is -1"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        rendered.render(*arguments)


# ---- labels ----


def rays_of(domain, sample):
    height, width = sample["image"].shape[:2]
    return ray_casting.pixel_rays(height, width, {"A": 0.9, "B": 1.3}[domain] * width)


def test_normals_are_unit_and_face_the_camera(samples):
    for domain, made in samples.items():
        for sample in made:
            length = np.linalg.norm(sample["normals"], axis=-1)
            valid = length > 0
            np.testing.assert_allclose(length[valid], 1, atol=1e-5)
            assert (
                np.einsum("hwc,hwc->hw", sample["normals"], rays_of(domain, sample)) <= 1e-5
            ).all()
            if domain == "A":
                assert valid.all()
            else:
                unknown = np.isin(look_up(sample, "semseg"), [2, 3, 5])
                assert not valid[unknown].any()
                assert valid[np.isin(look_up(sample, "semseg"), [1, 4, 6, 7])].all()


def spreads_over_walls(sample, depth):
    """How much ``n . (r depth)`` varies on each wall seen, and each wall's normal."""
    rays, found = rays_of("A", sample), []
    wall = (look_up(sample, "semseg") == 1) & (depth > 0)
    directions = np.round(sample["normals"][wall], 3)
    for normal in np.unique(directions, axis=0):
        own = (directions == normal).all(axis=-1)
        values = np.einsum("nc,nc->n", sample["normals"][wall], rays[wall] * depth[wall][:, None])[
            own
        ]
        if len(values) > 20:
            found.append((np.ptp(values), normal))
    return found


def test_planes_are_planar_and_stay_so_when_flipped(samples):
    slanted = 0
    for sample in samples["A"][:60]:
        flipped = rendered.horizontal_flip(sample)
        for made in (sample, flipped):
            assert all(
                spread < 1e-4 for spread, _ in spreads_over_walls(made, look_up(made, "depth"))
            )
        # Without the sign change of the x-component the flipped walls are not planar.
        wrong = flipped | {"normals": sample["normals"][:, ::-1]}
        for spread, normal in spreads_over_walls(wrong, look_up(wrong, "depth")):
            if abs(normal[0]) > 0.2:
                slanted += 1
                assert spread > 1e-3
    assert slanted > 20


def test_floor_and_ground_are_planar():
    for domain in "AB":
        view = rendered.look(domain, "train", 0, "small", 0)
        ground = view.hits.index == 0
        assert ground.sum() > 50
        points = view.rays[ground] * view.hits.depth[ground][:, None]
        heights = np.einsum("nc,nc->n", view.hits.normals[ground], points)
        np.testing.assert_allclose(heights, heights[0], rtol=1e-9)
        assert 1.2 <= -heights[0] <= 1.8


@pytest.mark.parametrize("domain", "AB")
def test_flipping(domain):
    raw = rendered.render(domain, "train", 1, "small", extras=True)
    for sample in (raw, rendered.preprocess(raw)):
        flipped = rendered.horizontal_flip(sample)
        for name, values in sample.items():
            if name == "normals":
                known = values != rendered.IGNORE
                expected = np.where(known, values * np.float32([-1, 1, 1]), values)[:, ::-1]
                np.testing.assert_array_equal(flipped[name], expected)
            elif name != "meta":
                np.testing.assert_array_equal(flipped[name], values[:, ::-1])
        again = rendered.horizontal_flip(flipped)
        assert all(values.tobytes() == again[name].tobytes() for name, values in sample.items())


def test_depth_of_rooms(samples):
    for sample in samples["A"]:
        known = sample["depth"] > 0
        assert 0.5 <= sample["depth"][known].min() and sample["depth"].max() <= 9
        processed = rendered.preprocess(sample)["depth"]
        np.testing.assert_array_equal(processed[~known], rendered.IGNORE)
        np.testing.assert_array_equal(processed[known], sample["depth"][known])
    assert 0.017 < np.mean([(sample["depth"] == 0).mean() for sample in samples["A"]]) < 0.023
    true = rendered.look("A", "train", 0, "tiny", 0).hits.depth
    known = look_up(samples["A"][0], "depth") > 0
    assert np.isfinite(true).all()
    np.testing.assert_allclose(look_up(samples["A"][0], "depth")[known], true[known], rtol=1e-6)


def test_missing_depth_is_left_out_of_the_metric(samples):
    """Pixels marked 255 lie outside of 0 < depth < 80.

    The root mean square error counts only what lies inside.
    """
    labels = rendered.preprocess(samples["A"][0])["depth"]
    counted = (labels > 0) & (labels < 80)
    np.testing.assert_array_equal(counted, samples["A"][0]["depth"] > 0)
    assert not counted.all()


@pytest.mark.parametrize("domain", "AB")
def test_edge_fraction(samples, domain):
    for made in (samples[domain], make(domain, count=60, size="small")):
        assert 0.02 < np.mean([sample["edge"].mean() for sample in made]) < 0.15
        assert all(set(np.unique(sample["edge"])) <= {0, 1} for sample in made)


def test_edges_separate_the_classes(samples):
    for made in samples.values():
        for sample in made[:40]:
            change = ray_casting.differs(look_up(sample, "semseg"))
            assert (look_up(sample, "edge")[change] == 1).all()


def test_every_class_occurs(samples):
    for domain, made in samples.items():
        number = rendered.NUM_SEMSEG[domain]
        present = np.array(
            [[(s["semseg"] == label).any() for label in range(number)] for s in made]
        )
        assert (present.mean(axis=0) >= 0.03).all()
        labels = np.unique([sample["semseg"] for sample in made])
        assert set(labels) - {rendered.IGNORE} == set(range(number))
    unlabelled = np.mean([(sample["semseg"] == rendered.IGNORE).mean() for sample in samples["A"]])
    assert 0.01 < unlabelled < 0.1
    assert not any((sample["semseg"] == rendered.IGNORE).any() for sample in samples["B"])


def test_persons_and_their_parts(samples):
    with_person = 0
    for sample in samples["B"]:
        person = sample["semseg"] == 1
        np.testing.assert_array_equal(sample["human_parts"] > 0, person)
        assert sample["human_parts"].max() < rendered.NUM_PARTS
        processed = rendered.preprocess(sample)["human_parts"]
        if person.any():
            with_person += 1
            np.testing.assert_array_equal(processed, sample["human_parts"])
        else:
            assert (processed == rendered.IGNORE).all()
    assert 0.3 < with_person / COUNT < 0.5
    parts = np.mean(
        [[(s["human_parts"] == part).any() for part in range(7)] for s in samples["B"]], axis=0
    )
    assert (parts > 0.2).all()


def test_saliency_marks_one_object(samples):
    for sample in samples["B"]:
        marked = sample["sal"] == 1
        assert marked.any() and set(np.unique(sample["sal"])) <= {0, 1}
        assert (
            len(np.unique(sample["semseg"][marked])) == 1 and (sample["semseg"][marked] > 0).all()
        )


def test_preprocessed_normals(samples):
    for sample in samples["B"][:20]:
        processed = rendered.preprocess(sample)["normals"]
        unknown = ~sample["normals"].any(axis=-1)
        assert unknown.any() and (processed[unknown] == rendered.IGNORE).all()
        np.testing.assert_array_equal(processed[~unknown], sample["normals"][~unknown])


def test_a_simple_classifier_tells_the_domains_apart(samples):
    def features(sample):
        image = sample["image"]
        steps = [np.abs(np.diff(image, axis=axis)).mean() for axis in (0, 1)]
        return [*image.mean(axis=(0, 1)), *steps]

    inputs = np.array([features(sample) for made in samples.values() for sample in made])
    labels = np.repeat([0, 1], COUNT)
    inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    model = LogisticRegression().fit(inputs[::2], labels[::2])
    assert model.score(inputs[1::2], labels[1::2]) > 0.9


# ---- extras ----


@pytest.fixture(scope="module", params="AB")
def with_extras(request):
    made = []
    for index in range(8):
        sample = rendered.render(request.param, "train", index, "small", extras=True)
        made.append((rendered.look(request.param, "train", index, "small", 0), sample))
    return made


def test_keypoints(with_extras):
    assert np.mean([sample["keypoints"].max() > 0.7 for _, sample in with_extras]) > 0.5
    for _, sample in with_extras:
        assert 0 <= sample["keypoints"].min() and sample["keypoints"].max() <= 1
    points = np.array([[0.0, 0.0, 2.0], [0.5, 0.0, 2.0], [-0.5, 0.0, 9.0], [0.0, 0.0, -1.0]])
    found = ray_casting.heat_map(points, np.full((21, 21), 3.0), 20.0, slack=0.1, sigma=1.5)
    # The third point is behind the surface, the fourth behind the camera.
    x, y = np.meshgrid(np.arange(21), np.arange(21))
    bumps = [np.exp(-((x - at) ** 2 + (y - 10) ** 2) / (2 * 1.5**2)) for at in (10, 15)]
    np.testing.assert_allclose(found, np.maximum(*bumps), atol=1e-12)


def test_occlusion_edges_are_jumps_of_depth(with_extras):
    for view, sample in with_extras:
        marked = look_up(sample, "edge_occlusion") == 1
        log_depth = np.log(np.minimum(view.hits.depth, 1e9))
        padded = np.pad(log_depth, ((0, 1), (0, 1)), mode="edge")
        jump = np.maximum(
            np.abs(np.diff(padded, axis=0))[:, :-1], np.abs(np.diff(padded, axis=1))[:-1]
        )
        assert (jump[marked] > 0.05).all()
        # Towards the horizon the ground itself recedes as quickly, which is no occlusion.
        assert marked[(jump > 1) & ray_casting.differs(view.hits.index)].all()
        ground = np.pad(view.hits.index == 0, ((0, 1), (0, 1)))
        assert not marked[ground[:-1, :-1] & ground[1:, :-1] & ground[:-1, 1:]].any()
    assert 0.005 < np.mean([sample["edge_occlusion"].mean() for _, sample in with_extras]) < 0.15


def test_reshading(with_extras):
    for view, sample in with_extras:
        shading = look_up(sample, "reshading")
        assert 0 <= shading.min() and shading.max() <= 1
        assert not shading[view.hits.index < 0].any() and shading.max() > 0.3
    # A sphere in front of the camera is brightest in its middle and dark at its rim.
    rays = ray_casting.pixel_rays(41, 41, 40.0)
    hits = ray_casting.cast([Sphere(np.array([0, 0, 4.0]), 1.5)], rays)
    shading = ray_casting.lambert(hits, rays)
    np.testing.assert_allclose(shading[20, 20], 1)
    assert shading[hits.index == 0].min() < 0.4


def test_texture_edges_and_autoencoding(with_extras):
    for _, sample in with_extras:
        np.testing.assert_array_equal(sample["autoencode"], sample["image"])
        grey = sample["image"].mean(axis=-1) / 255
        steep = np.abs(np.gradient(grey, axis=0)) + np.abs(np.gradient(grey, axis=1))
        assert np.corrcoef(steep.ravel(), sample["edge_texture"].ravel())[0, 1] > 0.7
        assert sample["edge_texture"].min() >= 0


def test_curvature_of_scenes(with_extras):
    for view, sample in with_extras:
        flat = (0, 1, 2) if len(view.scene.landmarks) else (0,)
        assert not sample["curvature"][np.isin(view.hits.index, flat)].any()
        assert (sample["curvature"] >= 0).all()
        for number, piece in enumerate(view.scene.pieces):
            if isinstance(piece.shape, Sphere):
                own = sample["curvature"][view.hits.index == number]
                np.testing.assert_allclose(own, 1 / piece.shape.radius, rtol=1e-6)
