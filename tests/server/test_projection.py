"""PCGrad, GPAggregation and CAGrad against golden values, direct forms and their algebra."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import apply_server
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_mtl import server
from fedjax_mtl.server.projection import conflict_averse_weights, projection_coefficients

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
AGGREGATION = json.loads((GOLDEN / "aggregation.json").read_text())
FEDBONE = json.loads((GOLDEN / "fedbone.json").read_text())
SETTINGS = settings(deadline=None, max_examples=25)
UPDATES = hnp.arrays(np.float64, (4, 5), elements=st.floats(-10, 10).map(lambda x: round(x, 2)))


def pcgrad_direct(updates, orders):
    """Sequential PCGrad on the vectors themselves, in numpy."""
    rows = []
    for i, partners in enumerate(orders):
        v = updates[i].copy()
        for j in partners:
            if j != i and (product := v @ updates[j]) < 0:
                v = v - product / (updates[j] @ updates[j]) * updates[j]
        rows.append(v)
    return np.array(rows)


@pytest.mark.parametrize("index", range(len(AGGREGATION["pcgrad"]["cases"])))
def test_pcgrad_golden(index):
    case = AGGREGATION["pcgrad"]["cases"][index]
    with jax.enable_x64(True):
        deltas = jnp.asarray(case["inputs"]["deltas"], jnp.float64)
        if case["constants"]["normalise"]:
            deltas = deltas / (jnp.linalg.norm(deltas, axis=1, keepdims=True) + 1e-8)
        coefficients = projection_coefficients(
            deltas @ deltas.T, jnp.asarray(case["inputs"]["orders"])
        )
        projected = coefficients @ deltas
        np.testing.assert_allclose(projected, case["outputs"]["projected"], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(
            projected.mean(0), case["outputs"]["update"], rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("index", range(len(AGGREGATION["pcgrad"]["cases"])))
def test_pcgrad_golden_through_the_transformation(index):
    """The transformation reproduces the golden cases whose forced order is the index order.

    The released normalisation is an argument.
    """
    case = AGGREGATION["pcgrad"]["cases"][index]
    count = len(case["inputs"]["deltas"])
    if case["inputs"]["orders"] != [[j for j in range(count) if j != i] for i in range(count)]:
        pytest.skip("another order")
    normalise = "unit" if case["constants"]["normalise"] else "none"
    with jax.enable_x64(True):
        deltas = jnp.asarray(case["inputs"]["deltas"], jnp.float64)
        tree = {"a": deltas[:, :1], "b": deltas[:, 1:]}
        ours = apply_server(server.project_conflicts(order="index", normalise=normalise), tree)
        ours = np.concatenate([ours["a"], ours["b"]], axis=1)
        np.testing.assert_allclose(ours, case["outputs"]["projected"], rtol=1e-6, atol=2e-7)


@SETTINGS
@given(UPDATES, st.integers(0, 1000))
def test_gram_space_equals_the_sequential_form(updates, seed):
    rng = np.random.default_rng(seed)
    orders = np.array([rng.permutation(4) for _ in range(4)])
    with jax.enable_x64(True):
        ours = (
            projection_coefficients(jnp.asarray(updates @ updates.T), jnp.asarray(orders)) @ updates
        )
        # A product of exactly 0 may fall on either side of the test.
        np.testing.assert_allclose(ours, pcgrad_direct(updates, orders), atol=1e-7)


@SETTINGS
@given(UPDATES, st.permutations(range(4)), st.sampled_from(["index", "random"]))
def test_projection_is_equivariant(updates, order, visiting):
    """Another order of slots gives the same rows, as partners are visited by client number."""
    order, key = np.array(order), jax.random.key(0)
    with jax.enable_x64(True):
        project = server.project_conflicts(order=visiting)
        plain = apply_server(
            project, {"w": jnp.asarray(updates)}, key=key, client_ids=jnp.arange(4)
        )
        moved = apply_server(
            project, {"w": jnp.asarray(updates[order])}, key=key, client_ids=jnp.asarray(order)
        )
        np.testing.assert_allclose(moved["w"], plain["w"][order], atol=1e-8)


@SETTINGS
@given(hnp.arrays(np.float64, (2, 5), elements=st.floats(-10, 10).map(lambda x: round(x, 2))))
def test_two_clients_never_hurt_each_other(updates):
    with jax.enable_x64(True):
        rows = apply_server(server.project_conflicts(order="index"), {"w": jnp.asarray(updates)})[
            "w"
        ]
        assert np.all(rows.mean(0) @ updates.T >= -1e-8)
        assert np.all(np.linalg.norm(rows, axis=1) <= np.linalg.norm(updates, axis=1) + 1e-9)


def test_absent_clients_zero_updates_and_opposites():
    updates = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf], [-1.0, -2.0], [0.0, 0.0]])
    present = jnp.array([True, False, True, True])
    ours = apply_server(server.project_conflicts(order="index"), updates, present=present)
    np.testing.assert_allclose(ours, np.zeros((4, 2)), atol=1e-6)
    ours = apply_server(
        server.project_conflicts(order="index"), updates.at[2].set(1.0), present=present
    )
    np.testing.assert_allclose(ours, [[1, 2], [0, 0], [1, 1], [0, 0]], rtol=1e-6)


def test_granularity_and_restored_length():
    updates = {"a": jnp.array([[1.0], [-1.0]]), "b": jnp.array([[2.0], [3.0]])}
    per_leaf = apply_server(
        server.project_conflicts(order="index", granularity="per_leaf"), updates
    )
    np.testing.assert_allclose(per_leaf["a"], np.zeros((2, 1)), atol=1e-7)
    np.testing.assert_allclose(per_leaf["b"], updates["b"], rtol=1e-6)
    # No conflict over both leaves: every update at length 1, times the mean length.
    restored = apply_server(server.project_conflicts(order="index", normalise="restore"), updates)
    lengths = np.linalg.norm([restored["a"][:, 0], restored["b"][:, 0]], axis=0)
    np.testing.assert_allclose(lengths, (np.sqrt(5) + np.sqrt(10)) / 2, rtol=1e-5)


@pytest.mark.parametrize("normalise", ["none", "unit", "restore"])
@pytest.mark.parametrize("granularity", ["global", "per_leaf"])
@pytest.mark.parametrize("weights", [None, jnp.array([0.5, 0.0, 0.2, 0.3])])
def test_the_averaged_projection_is_the_projection_averaged(normalise, granularity, weights):
    rng = np.random.default_rng(0)
    updates = {"a": jnp.array(rng.normal(size=(4, 3))), "b": jnp.array(rng.normal(size=(4, 2, 2)))}
    facts = {
        "key": jax.random.key(0),
        "present": jnp.array([True, False, True, True]),
        "weights": weights,
    }
    choices = {"normalise": normalise, "granularity": granularity}
    projected = apply_server(server.project_conflicts(**choices), updates, **facts)
    expected = apply_server(server.average_clients(), projected, **facts)
    ours = apply_server(server.project_conflicts(**choices, average=True), updates, **facts)
    for name in updates:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5, atol=1e-6)


GP_KIND = {"softmax_cos": "softmax_cosine", "softmax_dot": "softmax_dot", "none": "none"}


def split(vector, sizes):
    return list(jnp.split(vector, np.cumsum(sizes)[:-1].tolist(), axis=-1))


@pytest.mark.parametrize("name", [case["name"] for case in FEDBONE["gpaggregation"]])
def test_gp_aggregation_golden(name):
    case = next(c for c in FEDBONE["gpaggregation"] if c["name"] == name)
    given_, expected = case["input"], case["expected"]
    if not isinstance(given_.get("order", "index"), str):
        orders = np.array(given_["order"])
        with jax.enable_x64(True):
            gradients = jnp.asarray(given_["gradients"], jnp.float64)
            scaled = jnp.asarray(expected["scaled"], jnp.float64)
            ours = projection_coefficients(scaled @ scaled.T, jnp.asarray(orders)) @ scaled
            np.testing.assert_allclose(ours, expected["projected"], rtol=1e-9, atol=1e-12)
            assert gradients.shape == ours.shape
        return
    with jax.enable_x64(True):
        two = "round1_gradients" in given_
        rounds = (
            [given_["round1_gradients"], given_["round2_gradients"]]
            if two
            else [given_["gradients"]]
        )
        outcomes = [expected["round1"], expected["round2"]] if two else [expected]
        transformation = server.gp_aggregation(
            attention=GP_KIND[given_.get("attention", "softmax_cos")],
            granularity=given_.get("granularity", "global"),
        )
        state, size = None, None
        for gradients, outcome in zip(rounds, outcomes, strict=True):
            gradients = jnp.asarray(gradients, jnp.float64)
            size = gradients.shape[1]
            sizes = given_.get("leaf_sizes") or [size]
            updates = split(gradients, sizes)
            if state is None:
                state = transformation.init([jnp.zeros(s, jnp.float64) for s in sizes])
                if given_.get("history") is not None:
                    history = split(jnp.asarray(given_.get("history"), jnp.float64), sizes)
                    state = state._replace(history=history, started=jnp.array(True))
            counts = given_.get("num_samples")
            weights = None if counts is None else jnp.asarray(counts, jnp.float64) / sum(counts)
            result, state = transformation.update(updates, state, weights=weights)
            np.testing.assert_allclose(
                jnp.concatenate(result), outcome["aggregated"], rtol=1e-9, atol=1e-12
            )


def test_attention_only_reweights_projected_updates():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        updates, history = jnp.asarray(rng.normal(size=(4, 6))), jnp.asarray(rng.normal(size=6))
        transformation = server.gp_aggregation()
        state = transformation.init(history)._replace(history=history, started=jnp.array(True))
        ours, _ = transformation.update(updates, state)
        cosines = updates @ history / jnp.linalg.norm(updates, axis=1) / jnp.linalg.norm(history)
        projected = apply_server(server.project_conflicts(order="index"), updates)
        np.testing.assert_allclose(ours, jax.nn.softmax(cosines) @ projected, rtol=1e-9)


def test_gp_aggregation_of_groups_and_absent_clients():
    """Two clients of one task count as their weighted mean.

    An absent client counts as nobody, also in the attention's factor.
    """
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        updates = jnp.asarray(rng.normal(size=(4, 6)))
        pairs = jnp.stack([(updates[0] + 2 * updates[1]) / 3, updates[2], updates[3]])
        grouped = server.gp_aggregation(groups=jnp.array([0, 0, 1, 2]))
        plain = server.gp_aggregation()
        weights = jnp.array([0.1, 0.2, 0.3, 0.4])
        state = grouped.init(updates[0])
        whole = plain.init(updates[0])
        for _ in range(2):
            ours, state = grouped.update(updates, state, weights=weights)
            theirs, whole = plain.update(pairs, whole, weights=jnp.array([0.3, 0.3, 0.4]))
            np.testing.assert_allclose(ours, theirs, rtol=1e-9)
        holes = updates.at[1].set(jnp.nan)
        present = jnp.array([True, False, True, True])
        few = jnp.array([0, 2, 3])
        state, whole = plain.init(updates[0]), plain.init(updates[0])
        for _ in range(2):
            ours, state = plain.update(holes, state, present=present)
            theirs, whole = plain.update(updates[few], whole)
            np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("index", range(len(AGGREGATION["cagrad"]["cases"])))
def test_cagrad_golden(index):
    case = AGGREGATION["cagrad"]["cases"][index]
    constants, expected = case["constants"], case["outputs"]
    with jax.enable_x64(True):
        deltas = jnp.asarray(case["inputs"]["deltas"], jnp.float64)
        gram = deltas @ deltas.T
        count = deltas.shape[0]
        there = jnp.ones(count, bool)
        weights, radius = conflict_averse_weights(
            gram, jnp.full(count, 1 / count), constants["alpha"], there, 400
        )
        np.testing.assert_allclose(
            weights, expected["weights_optimum"], atol=case["tolerance"]["weights"]
        )
        np.testing.assert_allclose(radius, expected["c"], rtol=1e-4)
        ours = apply_server(
            server.conflict_averse(alpha=constants["alpha"], rescale=constants["rescale"]), deltas
        )
        scale = np.abs(expected["update"]).max()
        np.testing.assert_allclose(
            ours, expected["update"], atol=case["tolerance"]["update_rel"] * scale
        )


def test_cagrad_against_scipy_and_limits():
    from scipy.optimize import minimize

    rng = np.random.default_rng(2)
    for count in (2, 5, 12):
        updates = rng.normal(size=(count, 30)) + 0.2
        gram, mean = updates @ updates.T, np.full(count, 1 / count)
        radius = 0.4 * np.sqrt(mean @ gram @ mean)

        def objective(w, gram=gram, mean=mean, radius=radius):
            return w @ gram @ mean + radius * np.sqrt(w @ gram @ w + 1e-12)

        exact = minimize(
            objective,
            mean,
            bounds=[(0, 1)] * count,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-12, "maxiter": 500},
        )
        with jax.enable_x64(True):
            ours, _ = conflict_averse_weights(
                jnp.asarray(gram), mean, 0.4, jnp.ones(count, bool), 400
            )
        assert objective(np.asarray(ours)) <= exact.fun * (1 + 1e-6)
    updates = jnp.asarray(updates, jnp.float32)
    np.testing.assert_allclose(
        apply_server(server.conflict_averse(alpha=0.0), updates),
        updates.mean(0),
        rtol=1e-4,
        atol=1e-6,
    )
    small = apply_server(server.conflict_averse(), 1e-6 * updates)
    np.testing.assert_allclose(
        small * 1e6, apply_server(server.conflict_averse(), updates), rtol=2e-3, atol=1e-4
    )


def test_cagrad_without_absent_clients():
    updates = jax.random.normal(jax.random.key(0), (4, 7))
    present = jnp.array([True, False, True, True])
    ours = apply_server(server.conflict_averse(), updates.at[1].set(jnp.nan), present=present)
    theirs = apply_server(server.conflict_averse(), updates[jnp.array([0, 2, 3])])
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    nobody = apply_server(server.conflict_averse(), updates, present=jnp.zeros(4, bool))
    np.testing.assert_array_equal(nobody, np.zeros(7))


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown order 'sorted'; expected one of index, random"):
        server.project_conflicts(order="sorted")
    with pytest.raises(ValueError, match="unknown granularity 'layer'"):
        server.gp_aggregation(granularity="layer")
    with pytest.raises(ValueError, match="unknown attention 'cosine'"):
        server.gp_aggregation(attention="cosine")
    with pytest.raises(ValueError, match="history_decay is 1"):
        server.gp_aggregation(history_decay=1)
    with pytest.raises(ValueError, match="rescale 0, 1 or 2 and alpha >= 0"):
        server.conflict_averse(rescale=3)
    with pytest.raises(ValueError, match="needs the extra argument key"):
        apply_server(server.project_conflicts(), jnp.ones((2, 3)))


def test_pcgrad_in_a_chain_is_an_optax_transformation():
    chain = optax.chain(server.project_conflicts(order="index"), server.step_from(optax.adam(0.1)))
    updates = {"w": jnp.array([[1.0, 0.5], [-1.0, 0.5]])}
    step = apply_server(chain, updates)
    assert step["w"].shape == (2,) and np.isfinite(step["w"]).all()
