"""Corners of the mixtures of models.

They are clients that are alike, absent or alone, default widths, and weights learned over rounds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforming import first_update

from fedjax_mtl import server
from fedjax_mtl.core import trees
from fedjax_mtl.relations import graphs
from fedjax_mtl.server import hyper, mixing

RNG = np.random.default_rng(0)
RESULTS = RNG.normal(size=(5, 4))
STARTS = RNG.normal(size=(5, 4))
EVERYBODY = np.ones(5, bool)
FOUR = np.array([True, True, False, True, True])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def mixed(transformation, results=RESULTS, present=None, **facts):
    """The models after the server's step, if clients went from STARTS to ``results``."""
    starts = STARTS[: len(results)]
    facts["present"] = None if present is None else jnp.asarray(present)
    return starts - first_update(transformation, starts - results, starts, **facts)[0]


# --- Clusters.


@pytest.mark.parametrize("settings", [{"soft": True}, {"soft": True, "threshold": 0.3}, {}])
def test_clusters_of_identical_models_stay_as_they_are(settings):
    """Nobody deviates from the mean, so there is no direction to compare."""
    same = np.tile(RESULTS[:1], (5, 1))
    after = mixed(server.cluster_mixing(**settings), same)
    np.testing.assert_allclose(after, same, rtol=1e-9)


def soft(results, threshold):
    deviations = results - results.mean(axis=0)
    norms = np.linalg.norm(deviations, axis=1, keepdims=True)
    cosines = (deviations / norms) @ (deviations / norms).T
    scores = np.maximum(cosines + threshold, 0)
    return scores / scores.sum(axis=1, keepdims=True) @ results


@pytest.mark.parametrize("threshold", [0.0, 0.25])
def test_soft_clusters(threshold):
    ours = mixed(server.cluster_mixing(soft=True, threshold=threshold))
    np.testing.assert_allclose(ours, soft(RESULTS, threshold), rtol=1e-6)
    # Those who came are compared with the mean of those who came.
    few = mixed(server.cluster_mixing(soft=True, threshold=threshold), present=FOUR)
    np.testing.assert_allclose(few[FOUR], soft(RESULTS[FOUR], threshold), rtol=1e-6)
    np.testing.assert_allclose(few[~FOUR], STARTS[~FOUR], rtol=1e-9)


def test_a_client_at_the_mean_resembles_nobody():
    """A client at the mean keeps its model where the others share theirs."""
    pair = np.array([[1.0, 2, 0, 0], [3.0, 0, 0, 1], [2.0, 1, 0, 0.5]])
    ours = mixed(server.cluster_mixing(soft=True), pair)
    np.testing.assert_allclose(ours, pair, rtol=1e-9)


def test_clustering_is_hard_and_into_two_by_default():
    """By default there is no threshold, which only soft clusters would need."""
    apart = np.array([[5.0, 0, 0, 0], [5.1, 0, 0, 0], [-5.0, 0, 0, 0], [-5.0, 0.1, 0, 0]])
    ours = mixed(server.cluster_mixing(), apart)
    means = np.stack([apart[:2].mean(axis=0)] * 2 + [apart[2:].mean(axis=0)] * 2)
    np.testing.assert_allclose(ours, means, rtol=1e-9)
    np.testing.assert_allclose(
        mixed(server.cluster_mixing(soft=True)), soft(RESULTS, 0.0), rtol=1e-6
    )


# --- Attention.


def attention(results, scale, bandwidth, divisor=1):
    distances = np.square(results[:, None] - results).sum(axis=-1) / divisor
    weights = scale * np.exp(-distances / bandwidth) / bandwidth
    np.fill_diagonal(weights, 0)
    return (weights + np.diag(1 - weights.sum(axis=1))) @ results


def median(results):
    distances = np.square(results[:, None] - results).sum(axis=-1)
    return np.median(distances[~np.eye(len(results), dtype=bool)])


def test_attention():
    """Width and scale are 1 by default.

    With the median as width the scale counts in medians. Distances are over all parameters, or are
    divided by their number.
    """
    close = 0.5 * RESULTS
    np.testing.assert_allclose(
        mixed(server.attention_mixing(), close), attention(close, 1.0, 1.0), rtol=1e-5
    )
    ours = mixed(server.attention_mixing(scale=0.3, bandwidth=2.0, per_parameter=True))
    np.testing.assert_allclose(ours, attention(RESULTS, 0.3, 2.0, divisor=4), rtol=1e-5)
    width = median(RESULTS)
    ours = mixed(server.attention_mixing(scale=0.3, bandwidth="median"))
    np.testing.assert_allclose(ours, attention(RESULTS, 0.3 * width, width), rtol=1e-5)
    width = median(RESULTS[FOUR])
    ours = mixed(server.attention_mixing(scale=0.3, bandwidth="median"), present=FOUR)
    np.testing.assert_allclose(ours[FOUR], attention(RESULTS[FOUR], 0.3 * width, width), rtol=1e-5)


def test_own_weights_may_go_negative_unless_clipped():
    """The others weigh 4 together when everybody is alike, so the own weight is -3.

    If it is clipped, the own weight is 0 and the others share 1.
    """
    distances, there = jnp.zeros((5, 5)), jnp.asarray(EVERYBODY)
    free = mixing.attention_coefficients(distances, there, 1.0, 1.0)
    np.testing.assert_allclose(free, np.ones((5, 5)) - 4 * np.eye(5))
    clipped = mixing.attention_coefficients(distances, there, 1.0, 1.0, clip=True)
    np.testing.assert_allclose(clipped, (np.ones((5, 5)) - np.eye(5)) / 4)
    small = mixing.attention_coefficients(distances, there, 0.1, 1.0, clip=True)
    np.testing.assert_allclose(small, 0.1 * np.ones((5, 5)) + 0.5 * np.eye(5))
    free = mixed(server.attention_mixing(scale=40.0, bandwidth=10.0))
    np.testing.assert_allclose(free, attention(RESULTS, 40.0, 10.0), rtol=1e-4)


# --- Means of others, parts, graphs.


def test_the_mean_of_the_others_who_came():
    ours = mixed(server.mean_of_others(), present=FOUR)
    for client in np.flatnonzero(FOUR):
        others = [c for c in np.flatnonzero(FOUR) if c != client]
        np.testing.assert_allclose(ours[client], RESULTS[others].mean(axis=0), rtol=1e-9)
    alone = mixed(server.mean_of_others(), present=np.arange(5) == 1)
    np.testing.assert_allclose(alone[1], RESULTS[1], rtol=1e-9)


def test_only_cuts_the_populations_models_too():
    """Laplacian mixing with everybody's models is restricted to one part.

    The other part passes unchanged.
    """
    graph = graphs.fixed(graphs.complete_weights(5))
    ids = np.array([3, 0])
    population = {"a": STARTS, "b": STARTS + 1}
    cohort = jax.tree.map(lambda x: x[ids], population)
    updates = {"a": RESULTS[:2], "b": RESULTS[2:4]}
    inner = server.laplacian_mixing(graph, 0.1, neighbours="all")
    rule = server.only(trees.under("a"), inner)
    facts = {"client_ids": ids, "population_params": population}
    moves, _ = first_update(rule, updates, cohort, population, **facts)
    np.testing.assert_array_equal(moves["b"], updates["b"])
    facts["population_params"] = STARTS
    alone, _ = first_update(inner, updates["a"], cohort["a"], STARTS, **facts)
    np.testing.assert_allclose(moves["a"], alone, rtol=1e-9)
    assert not np.allclose(alone, updates["a"])


def test_laplacian_mixing_reads_those_who_came_by_default():
    rule = server.laplacian_mixing(graphs.fixed(graphs.complete_weights(5)), 0.1)
    ours = mixed(rule, present=FOUR)
    expected = RESULTS[FOUR] - 0.1 * (4 * RESULTS[FOUR] - RESULTS[FOUR].sum(axis=0))
    np.testing.assert_allclose(ours[FOUR], expected, rtol=1e-6)


# --- Hyper-weights.


def test_hyper_weights_over_rounds():
    """Weights are learned by SGD with momentum and decay.

    A weight learns where the client took part in the round before. Outside of [0, 1] a weight has
    no gradient.
    """
    rule = hyper.HyperOptimizer(initial=0.5, learning_rate=0.4, momentum=0.7, weight_decay=0.2)
    weights = rule.start((3,))
    ids, learn = jnp.arange(3), jax.jit(rule.learn)
    values, velocity, known = np.full(3, 0.5), np.zeros(3), np.zeros(3, bool)
    steps = [
        ([1.0, -2.0, 3.0], [True, True, True]),
        ([1.0, -2.0, 3.0], [True, True, False]),
        ([0.5, 4.0, 1.0], [True, True, True]),
        ([0.2, -1.0, 1.0], [True, True, True]),
    ]
    outside = 0
    for agreement, present in steps:
        agreement, present = np.array(agreement), np.array(present)
        weights = learn(weights, jnp.asarray(agreement), ids, jnp.asarray(present))
        due = present & known
        outside += np.sum(due & ((values < 0) | (values > 1)))
        slope = np.where((values >= 0) & (values <= 1), -agreement, 0)
        moved = 0.7 * velocity + slope + 0.2 * values
        values = np.where(due, values - 0.4 * moved, values)
        velocity = np.where(due, moved, velocity)
        known = present
        np.testing.assert_allclose(weights.values, values, rtol=1e-6)
        np.testing.assert_allclose(weights.velocity, velocity, rtol=1e-6)
        np.testing.assert_array_equal(weights.known, known)
    assert outside > 1


def test_hyper_optimiser_of_the_released_codes():
    assert hyper.RELEASED == (0.1, 0.01, 0.9, 1e-4)
    for rule in (server.hyper_conflict_averse(), server.hyper_attention()):
        state = rule.init({"layer": jnp.zeros((3, 2))})
        np.testing.assert_allclose(state.weights.values, np.full_like(state.weights.values, 0.1))


def test_conflict_averse_help_has_the_radius_of_the_paper():
    """In the first round a tenth of CAGrad's direction is added, with an alpha of 0.4."""
    ours, state = first_update(server.hyper_conflict_averse(), RESULTS, STARTS)
    direction, _ = first_update(server.conflict_averse(alpha=0.4, rescale=1), RESULTS, STARTS)
    np.testing.assert_allclose(ours, RESULTS + 0.1 * direction, rtol=1e-6)
    np.testing.assert_allclose(state.direction, direction, rtol=1e-9)


def test_groups_of_one_domain_send_their_mean():
    """Groups of one domain send the mean of their clients that came.

    The means are taken after the common direction was found.
    """
    rule = server.hyper_conflict_averse(groups=np.array([0, 1, 0, 0, 1]))
    ours, state = first_update(rule, RESULTS, STARTS, present=FOUR)
    zero, one = RESULTS[[0, 3]].mean(axis=0), RESULTS[[1, 4]].mean(axis=0)
    expected = np.stack([zero, one, zero, zero, one]) + 0.1 * state.direction
    np.testing.assert_allclose(ours[FOUR], expected[FOUR], rtol=1e-6)


def test_attention_over_decoders_who_are_there():
    """The attention is a softmax over each row of inner products.

    The products are divided by the root of the size.
    """
    flat = jnp.asarray(RESULTS)
    ours = hyper.cross_attention(flat, jnp.asarray(FOUR))
    scores = np.exp(RESULTS[FOUR] @ RESULTS[FOUR].T / 2)
    expected = np.zeros((5, 5))
    expected[np.ix_(FOUR, FOUR)] = scores / scores.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


# --- Sheaf.


def test_maps_of_a_sheaf_start_small_and_narrow():
    """Edges carry a tenth of a model, and at least one number.

    The entries of maps are N(0, 0.01^2).
    """
    adjacency = np.ones((3, 3)) - np.eye(3)
    settings = {"key": jax.random.key(0), "strength": 0.1, "map_step": 0.1}

    def maps(graph, parameters):
        rule = server.sheaf_mixing(graph, **settings)
        return jax.eval_shape(rule.init, jnp.zeros((3, parameters))).maps.shape

    assert maps(adjacency, 59) == (3, 2, 5, 59)
    assert maps(adjacency, 4) == (3, 2, 1, 4)
    drawn = jax.jit(server.sheaf_mixing(adjacency, **settings).init)(jnp.zeros((3, 59))).maps
    np.testing.assert_allclose(drawn.std(), 0.01, rtol=0.05)
    assert server.sheaf_traffic(adjacency, 59) == 4 * 2 * 5
    assert server.sheaf_traffic(adjacency, 4) == 4 * 2 * 1
    one_way = np.array([[0, 0.5, 0.2], [0, 0, 0], [0, 0, 0]])
    assert server.sheaf_traffic(one_way, 40) == 4 * 2 * 4
    assert maps(one_way, 4) == (2, 2, 1, 4)


def test_edges_of_a_sheaf_in_a_sampled_cohort():
    """Of three clients, 2 and 0 come in this order.

    Only the edge between them pulls, and only its maps learn.
    """
    adjacency = np.ones((3, 3)) - np.eye(3)
    rule = server.sheaf_mixing(
        adjacency, key=jax.random.key(1), strength=0.3, map_step=0.2, compression=0.5, deviation=1.0
    )
    maps = np.asarray(rule.init(STARTS[:3]).maps)
    ids, results = np.array([2, 0]), RESULTS[:2]
    starts = STARTS[ids]
    moves, after = first_update(rule, starts - results, starts, STARTS[:3], client_ids=ids)
    first, second = maps[1]  # of the edge 0 - 2
    difference = second @ results[0] - first @ results[1]
    expected = results - 0.3 * np.stack([second.T @ difference, -first.T @ difference])
    np.testing.assert_allclose(starts - moves, expected, rtol=1e-6)
    np.testing.assert_array_equal(after.maps[[0, 2]], maps[[0, 2]])
    assert not np.allclose(after.maps[1], maps[1])


def test_steps_of_a_mixture_end_at_the_mixed_models():
    """An SGD step of rate 1 behind a mixture arrives at the mixed models.

    A smaller rate goes a part of the way.
    """
    chain = optax.chain(server.mean_of_others(), optax.sgd(0.25))
    steps, _ = first_update(chain, STARTS - RESULTS, STARTS)
    others = (RESULTS.sum(axis=0) - RESULTS) / 4
    np.testing.assert_allclose(STARTS + steps, STARTS + 0.25 * (others - STARTS), rtol=1e-6)
