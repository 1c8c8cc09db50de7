"""FedDEA: golden values of the reconstruction, and its algebra."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import apply_server
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_mtl import server
from fedjax_mtl.core import trees
from fedjax_mtl.server.decoupling import kth_largest, largest_entries

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "feddea.json").read_text())
SETTINGS = settings(deadline=None, max_examples=30)
UPDATES = hnp.arrays(np.float64, (3, 10), elements=st.floats(-10, 10).map(lambda x: round(x, 2)))
LAYERS = GOLDEN["inputs"]["layers"]


def layered(matrix):
    return [jnp.asarray(matrix)[:, a:b] for a, b in LAYERS]


@pytest.mark.parametrize("index", range(len(GOLDEN["outputs"]["cases"])))
def test_golden(index):
    case = GOLDEN["outputs"]["cases"][index]
    config = case["config"]
    counts = np.array(GOLDEN["inputs"]["num_samples"], float)
    with jax.enable_x64(True):
        weights = jnp.asarray(counts / counts.sum())
        transformation = server.decouple_updates(
            config["rho"],
            scope=config["scope"],
            rescale=config["rescale"],
            denominator=config["denominator"],
            rescale_cap=config.get("rescale_cap"),
        )
        deltas = layered(np.array(GOLDEN["inputs"]["deltas"]))
        ours = np.concatenate(apply_server(transformation, deltas, weights=weights), axis=1)
    if "transformed" in case:
        np.testing.assert_allclose(ours, case["transformed"], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(np.asarray(weights) @ ours, case["aggregate"], rtol=1e-6, atol=1e-12)
    if "masks" in case:
        np.testing.assert_array_equal(ours != 0, np.array(case["masks"], bool))
    if "masks" in case and config["denominator"] == "all":
        kept = np.array(GOLDEN["inputs"]["deltas"]) * np.array(case["masks"])
        np.testing.assert_allclose(
            np.abs(ours).sum(1) / np.abs(kept).sum(1), case["factor"], rtol=1e-6
        )


@SETTINGS
@given(
    UPDATES,
    st.sampled_from([0.1, 0.3, 0.55, 1.0]),
    st.sampled_from(["l1", "l2", "density", "none"]),
)
def test_algebra(updates, keep, rescale):
    with jax.enable_x64(True):
        transformation = server.decouple_updates(keep, rescale=rescale)
        ours = np.asarray(apply_server(transformation, {"w": jnp.asarray(updates)})["w"])
        scaled = apply_server(transformation, {"w": jnp.asarray(3.0 * updates)})["w"]
        np.testing.assert_allclose(scaled, 3 * ours, rtol=1e-9, atol=1e-9)
        assert np.all(ours * updates >= 0)
        assert np.all((ours != 0).sum(1) <= max(1, int(np.ceil(keep * 10 - 1e-9))))
        if rescale == "l1":
            np.testing.assert_allclose(
                np.abs(ours).sum(1), np.abs(updates).sum(1), rtol=1e-9, atol=1e-12
            )
        if rescale == "l2":
            np.testing.assert_allclose(
                np.linalg.norm(ours, axis=1), np.linalg.norm(updates, axis=1), rtol=1e-9, atol=1e-12
            )
        if keep == 1.0:
            np.testing.assert_allclose(ours, updates, rtol=1e-12, atol=1e-12)


@SETTINGS
@given(UPDATES)
def test_factors_are_ordered(updates):
    """The factors are ordered as 1 <= l2 <= l1 <= density."""
    with jax.enable_x64(True):
        factors = []
        for rescale in ("none", "l2", "l1", "density"):
            ours = apply_server(server.decouple_updates(0.3, rescale=rescale), jnp.asarray(updates))
            factors.append(np.abs(np.asarray(ours)).max(1))
        for low, high in zip(factors, factors[1:], strict=False):
            assert np.all(low <= high * (1 + 1e-9) + 1e-12)


@SETTINGS
@given(hnp.arrays(np.float32, 9, elements=st.floats(0, 2**100, width=32)), st.integers(1, 9))
def test_the_kth_largest_is_that_of_a_sort(values, count):
    assert kth_largest(jnp.asarray(values), count) == np.sort(values)[9 - count]
    mask = largest_entries(jnp.asarray(values), count)
    assert int(mask.sum()) == count
    expected = np.zeros(9, bool)
    expected[np.argsort(-values, kind="stable")[:count]] = True
    np.testing.assert_array_equal(mask, expected)


def test_exactly_as_many_under_ties():
    ours = apply_server(
        server.decouple_updates(0.5), jnp.array([[1.0, -1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0.0]])
    )
    np.testing.assert_allclose(ours, [[2, -2, 2, 0, 0, 0], [0] * 6])


def test_disjoint_supports_move_by_the_full_update_of_each_client():
    updates = jnp.kron(jnp.eye(3), jnp.array([[1.0, -2.0]]))
    transformation = server.decouple_updates(1 / 3, denominator="selected")
    weights = jnp.array([0.5, 0.3, 0.2])
    ours = weights @ apply_server(transformation, updates, weights=weights)
    np.testing.assert_allclose(ours, updates.sum(0), rtol=1e-6)


def test_thresholds_layers_and_untouched_leaves():
    updates = {"a": jnp.array([[4.0, 1.0, 0.2]]), "b": jnp.array([[8.0, 0.1]])}
    relative = apply_server(
        server.decouple_updates(select="relative", threshold=0.2, rescale="none"), updates
    )
    np.testing.assert_allclose(relative["a"], [[4, 0, 0]])
    per_layer = server.decouple_updates(
        select="relative", threshold=0.2, scope="layer", rescale="none"
    )
    np.testing.assert_allclose(apply_server(per_layer, updates)["a"], [[4, 1, 0]])
    deviation = server.decouple_updates(select="deviation", threshold=1.0, rescale=2.0)
    np.testing.assert_allclose(apply_server(deviation, updates)["b"], [[16, 0]])
    only_a = server.decouple_updates(
        0.3, applied_to=trees.under("a"), rescale_scope="layer", scope="layer"
    )
    ours = apply_server(only_a, updates)
    np.testing.assert_allclose(ours["a"], [[5.2, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(ours["b"], updates["b"])


def test_absent_clients():
    updates = jnp.array([[1.0, 2.0], [jnp.nan, 1.0]])
    present = jnp.array([True, False])
    for denominator in ("all", "selected"):
        ours = apply_server(
            server.decouple_updates(0.5, denominator=denominator), updates, present=present
        )
        assert np.isfinite(ours).all() and not ours[1].any()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"keep is 0; give a share in \(0, 1\]"):
        server.decouple_updates(0)
    with pytest.raises(ValueError, match="applied_to selects no leaf"):
        apply_server(server.decouple_updates(0.5, applied_to=trees.nothing), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="unknown rescale 'l3'"):
        server.decouple_updates(rescale="l3")
    with pytest.raises(ValueError, match="unknown denominator 'some'"):
        server.decouple_updates(denominator="some")
