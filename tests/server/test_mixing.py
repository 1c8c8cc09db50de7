"""Transformations that keep the client axis: golden values, independent numpy, their algebra."""

import json
import pathlib

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from fedjax_mtl import server
from fedjax_mtl.core import trees
from fedjax_mtl.relations import graphs
from fedjax_mtl.server import mixing
from fedjax_mtl.server.hyper import HyperOptimizer, cross_attention

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
AGGREGATION = json.loads((GOLDEN / "aggregation.json").read_text())
MIRA = json.loads((GOLDEN / "mira.json").read_text())


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def step(transformation, starts, results, population=None, state=None, **facts):
    """The new models of the cohort, and the state.

    The clients went from ``starts`` to ``results``.
    """
    starts, results = (jax.tree.map(jnp.asarray, tree) for tree in (starts, results))
    population = starts if population is None else jax.tree.map(jnp.asarray, population)
    state = transformation.init(population) if state is None else state
    updates = optax.tree.sub(starts, results)
    moves, state = transformation.update(
        updates, state, starts, population_params=population, **facts
    )
    return optax.tree.sub(starts, moves), state


def mixed(transformation, results, **facts):
    results = jnp.asarray(results, jnp.float64)
    return step(transformation, jnp.zeros_like(results) + 0.5, results, **facts)[0]


# --- Golden values.


@pytest.mark.parametrize("case", AGGREGATION["fedamp"]["cases"])
def test_fedamp(case):
    given_, expected = case["inputs"], case["outputs"]
    models = jnp.asarray(given_["params"], jnp.float64)
    distances = graphs.squared_distances(models)
    np.testing.assert_allclose(distances, expected["squared_distances"], rtol=1e-6)
    weights = mixing.attention_coefficients(
        jnp.asarray(expected["squared_distances"]),
        jnp.ones(len(models), bool),
        given_["alphak"],
        given_["sigma"],
    )
    np.testing.assert_allclose(weights, expected["attention"], atol=1e-9)
    clouds = mixed(
        server.attention_mixing(scale=given_["alphak"], bandwidth=given_["sigma"]), models
    )
    np.testing.assert_allclose(clouds, expected["cloud_params"], atol=1e-6)
    pull = given_["lamda"] / given_["alphak"] * (models - jnp.asarray(expected["cloud_params"]))
    np.testing.assert_allclose(pull, expected["prox_gradient_squared_form"], atol=1e-8)


@pytest.mark.parametrize("case", AGGREGATION["matfl"]["cases"])
def test_matfl(case):
    given_, expected = case["inputs"], case["outputs"]
    models = jnp.asarray(given_["params"])
    there = jnp.ones(len(models), bool)
    distances = 1 - mixing.deviation_cosines(models, there)
    np.testing.assert_allclose(distances, np.array(expected["cosine_distance"]), atol=1e-8)
    labels = np.asarray(mixing.average_linkage(distances, there, given_["n_clusters"]))
    found = {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}
    assert found == {frozenset(cluster) for cluster in expected["clusters"]}
    hard = mixed(server.cluster_mixing(given_["n_clusters"]), models)
    np.testing.assert_allclose(hard, expected["new_params"], atol=1e-9)
    soft = mixed(
        server.cluster_mixing(given_["n_clusters"], soft=True, threshold=given_["th"]), models
    )
    np.testing.assert_allclose(soft, expected["soft_new_params"], atol=1e-9)


def fedhca2_trees(case):
    """The clients of the golden run.

    Each has an encoder, and the decoders that it owns among those of four tasks.
    """
    tasks = ["depth", "edge", "normals", "semseg"]
    slots = [name.split(":") for name in case["decoder_order"]]
    clients = [int(client[-1]) for client, _ in slots]
    columns = [tasks.index(task) for _, task in slots]
    owned = np.zeros((4, 4), bool)
    owned[clients, columns] = True

    def scatter(values):
        tree = {}
        for name, rows in values.items():
            layer, leaf = name.split(".")
            for task in range(4):
                full = np.zeros((4, *np.shape(rows)[1:]))
                for row, (client, column) in enumerate(zip(clients, columns, strict=True)):
                    if column == task:
                        full[client] = rows[row]
                tree.setdefault(tasks[task], {}).setdefault(layer, {})[leaf] = jnp.asarray(full)
        return tree

    def gather(tree, name):
        layer, leaf = name.split(".")
        return np.stack(
            [
                np.asarray(tree[tasks[c]][layer][leaf][k])
                for k, c in zip(clients, columns, strict=True)
            ]
        )

    return tasks, owned, clients, columns, scatter, gather


@pytest.mark.parametrize("variant", ["homo", "plain"])
def test_fedhca2(variant):
    case = AGGREGATION["fedhca2"]
    given_ = case["inputs"]
    tasks, owned, clients, columns, scatter, gather = fedhca2_trees(case)
    hyper = HyperOptimizer(
        given_["alpha_init"], given_["hyper_lr"], given_["hyper_momentum"], given_["hyper_wd"]
    )
    groups = jnp.array([0, 1, 2, 2]) if variant == "homo" else None
    chain = optax.chain(
        server.only(
            trees.under("encoder"),
            server.hyper_conflict_averse(alpha=given_["ca_c"], groups=groups, hyper=hyper),
        ),
        server.only(
            trees.under("decoders"),
            server.hyper_attention(
                decoders=[("decoders", task) for task in tasks],
                owned=jnp.asarray(owned),
                hyper=hyper,
            ),
        ),
    )
    params = {
        "encoder": jnp.asarray(given_["encoder_init"]),
        "decoders": scatter(given_["decoder_init"]),
    }
    state = chain.init(params)
    for deltas, expected in zip(given_["rounds"], case["variants"][variant], strict=True):
        change = {
            "encoder": jnp.asarray(deltas["encoder_deltas"]),
            "decoders": scatter(deltas["decoder_deltas"]),
        }
        updates, state = chain.update(jax.tree.map(jnp.negative, change), state, params)
        params = optax.tree.sub(params, updates)
        encoder, decoders = (part.inner for part in state)
        np.testing.assert_allclose(encoder.weights.values, expected["alpha_used"], atol=1e-5)
        layers = {"fuse": 0, "lin": 1}
        for layer, index in layers.items():
            values = np.asarray(decoders.weights.values)[clients, columns, index]
            np.testing.assert_allclose(values, expected["beta_used"][layer], atol=1e-9)
        np.testing.assert_allclose(-encoder.direction["encoder"], expected["U"], atol=5e-3)
        np.testing.assert_allclose(params["encoder"], expected["new_encoder"], atol=1e-3)
        for name, rows in expected["new_decoder"].items():
            np.testing.assert_allclose(gather(params["decoders"], name), rows, atol=1e-8)
            attention = cross_attention(
                jnp.asarray(deltas["decoder_deltas"][name], jnp.float64), jnp.ones(6, bool)
            )
            np.testing.assert_allclose(attention, expected["attention"][name], atol=1e-9)


def flat_adapters(adapters):
    return np.array([np.concatenate([np.ravel(a["A"]), np.ravel(a["B"])]) for a in adapters])


def stacked_adapters(adapters):
    return {name: jnp.asarray([a[name] for a in adapters]) for name in ("A", "B")}


def flatten(models):
    return np.concatenate(
        [np.asarray(models[n]).reshape(len(models[n]), -1) for n in ("A", "B")], axis=1
    )


def test_mira_full_participation():
    given_, expected = MIRA["inputs"], MIRA["outputs"]
    results = stacked_adapters(given_["lora_after_local"])
    before = stacked_adapters(given_["server_copy_before"])
    adjacency = np.array(given_["adjacency"])
    np.testing.assert_allclose(graphs.laplacian(adjacency), expected["laplacian"], atol=1e-12)
    np.testing.assert_allclose(
        graphs.regulariser(adjacency, results), expected["regulariser_before"], rtol=1e-6
    )
    gradient = jax.grad(lambda w: graphs.regulariser(adjacency, w))(results)
    np.testing.assert_allclose(flatten(gradient), expected["regulariser_gradient_flat"], atol=1e-5)
    strength = given_["eta"] * given_["lambda"]
    mixing = server.laplacian_mixing(graphs.fixed(adjacency), strength)
    models, _ = step(mixing, before, results)
    full = expected["full_participation"]
    np.testing.assert_allclose(flatten(models), full["new_flat"], atol=1e-6)
    np.testing.assert_allclose(
        graphs.regulariser(adjacency, models), full["regulariser_after"], rtol=1e-6
    )
    np.testing.assert_allclose(flatten(models).mean(0), full["mean_before"], atol=1e-6)
    alone, _ = step(server.laplacian_mixing(graphs.fixed(adjacency), 0.0), before, results)
    np.testing.assert_allclose(
        flatten(alone), expected["local_only_lambda0"]["new_flat"], atol=1e-12
    )


@pytest.mark.parametrize(
    ("neighbours", "name"), [("sampled", "partial_sampled_only"), ("all", "partial_all_neighbours")]
)
def test_mira_partial_participation(neighbours, name):
    given_, expected = MIRA["inputs"], MIRA["outputs"][name]
    population = stacked_adapters(given_["server_copy_before"])
    results = stacked_adapters(given_["lora_after_local"])
    ids = jnp.array(expected["S"])
    cohort = jax.tree.map(lambda x: x[ids], population)
    mixing = server.laplacian_mixing(
        graphs.fixed(given_["adjacency"]), given_["eta"] * given_["lambda"], neighbours=neighbours
    )
    models, _ = step(
        mixing, cohort, jax.tree.map(lambda x: x[ids], results), population, client_ids=ids
    )
    np.testing.assert_allclose(
        flatten(models), np.array(expected["new_flat"])[np.asarray(ids)], atol=1e-6
    )
    # The same by a cohort of everybody in which one is absent.
    present = jnp.array([True, False, True, True])
    models, _ = step(mixing, population, results, population, present=present)
    np.testing.assert_allclose(flatten(models), expected["new_flat"], atol=1e-6)


# --- Algebra.


def models_of(seed, count=5, size=4):
    return np.random.default_rng(seed).normal(size=(count, size))


MIXINGS = {
    "attention": server.attention_mixing(scale=0.3, bandwidth="median"),
    "clusters": server.cluster_mixing(2),
    "soft": server.cluster_mixing(soft=True, threshold=0.2),
    "others": server.mean_of_others(),
    "by_updates": server.laplacian_mixing(graphs.by_updates(decay=0.3), 0.1),
    "learned": server.laplacian_mixing(graphs.learned(smoothness=0.5), 0.1),
    "hyper": server.hyper_conflict_averse(),
    "hyper_attention": server.hyper_attention(),
}


def as_tree(rows):
    return {"layer": {"kernel": jnp.asarray(rows)}}


@pytest.mark.parametrize("name", MIXINGS)
def test_permutation_of_clients(name):
    results, order = models_of(1), np.array([3, 0, 4, 1, 2])
    straight, _ = step(MIXINGS[name], as_tree(np.zeros_like(results)), as_tree(results))
    permuted, _ = step(MIXINGS[name], as_tree(np.zeros_like(results)), as_tree(results[order]))
    np.testing.assert_allclose(
        straight["layer"]["kernel"][order], permuted["layer"]["kernel"], atol=2e-6
    )


@pytest.mark.parametrize("name", MIXINGS)
def test_absent_clients_have_no_influence_and_stay(name):
    results = models_of(2)
    starts = as_tree(models_of(3))
    present = jnp.array([True, True, False, True, True])
    polluted = results.copy()
    polluted[2] = np.nan
    ours, _ = step(MIXINGS[name], starts, as_tree(results), present=present)
    theirs, _ = step(MIXINGS[name], starts, as_tree(polluted), present=present)
    np.testing.assert_allclose(ours["layer"]["kernel"], theirs["layer"]["kernel"], atol=1e-12)
    np.testing.assert_allclose(ours["layer"]["kernel"][2], starts["layer"]["kernel"][2], atol=1e-12)
    keep = np.array([0, 1, 3, 4])
    smaller, _ = step(
        MIXINGS[name],
        as_tree(starts["layer"]["kernel"][keep]),
        as_tree(results[keep]),
        starts,
        client_ids=jnp.asarray(keep),
    )
    np.testing.assert_allclose(ours["layer"]["kernel"][keep], smaller["layer"]["kernel"], atol=1e-6)


@pytest.mark.parametrize(
    "name", ["attention", "clusters", "soft", "others", "by_updates", "learned"]
)
def test_one_client_keeps_its_model(name):
    results = models_of(4, count=1)
    np.testing.assert_allclose(mixed(MIXINGS[name], results), results, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.01, 0.99))
def test_laplacian_mixing_contracts(seed, share):
    results = jnp.asarray(models_of(seed))
    adjacency = graphs.random(5, seed)
    strength = share * graphs.largest_stable_step(adjacency)
    if not np.isfinite(strength):
        return
    after = mixed(server.laplacian_mixing(graphs.fixed(adjacency), strength), results)
    expected = results - strength * graphs.laplacian(adjacency) @ results
    np.testing.assert_allclose(after, expected, atol=1e-5)
    np.testing.assert_allclose(after.mean(0), results.mean(0), atol=1e-6)
    assert graphs.regulariser(adjacency, after) <= graphs.regulariser(adjacency, results) + 1e-5


def test_complete_graph_at_one_over_clients_averages():
    results = models_of(5)
    graph = graphs.fixed(graphs.complete_weights(5) + 3 * np.eye(5))  # the diagonal does not count
    after = mixed(server.laplacian_mixing(graph, 1 / 5), results)
    np.testing.assert_allclose(after, np.tile(results.mean(0), (5, 1)), atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 9), clusters=st.integers(1, 9))
def test_average_linkage_is_scipys(seed, count, clusters):
    clusters = min(clusters, count)
    points = np.random.default_rng(seed).normal(size=(count, 3))
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    labels = mixing.average_linkage(jnp.asarray(distances), jnp.ones(count, bool), clusters)
    expected = fcluster(
        linkage(squareform(distances, checks=False), "average"), clusters, "maxclust"
    )
    same = np.asarray(labels)[:, None] == np.asarray(labels)
    np.testing.assert_array_equal(same, expected[:, None] == expected)


def test_limits_of_clustering():
    results = models_of(6)
    np.testing.assert_allclose(mixed(server.cluster_mixing(5), results), results, atol=1e-12)
    np.testing.assert_allclose(
        mixed(server.cluster_mixing(1), results), np.tile(results.mean(0), (5, 1)), atol=1e-12
    )


def test_narrow_attention_is_nobodys():
    results = models_of(7)
    np.testing.assert_allclose(
        mixed(server.attention_mixing(bandwidth=1e-3), results), results, atol=1e-12
    )
    wide = mixing.attention_coefficients(jnp.zeros((5, 5)), jnp.ones(5, bool), 2.0, 1.0)
    assert wide[0, 0] < 0
    clipped = mixing.attention_coefficients(
        jnp.zeros((5, 5)), jnp.ones(5, bool), 2.0, 1.0, clip=True
    )
    assert clipped.min() >= 0
    np.testing.assert_allclose(clipped.sum(1), 1)


def test_frozen_zero_hyper_weights_are_training_alone():
    results = models_of(8)
    hyper = HyperOptimizer(initial=0.0, learning_rate=0.0)
    for rule in (server.hyper_conflict_averse(hyper=hyper), server.hyper_attention(hyper=hyper)):
        after, _ = step(rule, as_tree(np.zeros_like(results)), as_tree(results))
        np.testing.assert_allclose(after["layer"]["kernel"], results, atol=1e-12)


def test_hyper_weights_of_absent_clients_wait():
    starts = as_tree(np.zeros((3, 2)))
    mixing = server.hyper_conflict_averse()
    results = as_tree(np.ones((3, 2)))
    _, state = step(mixing, starts, results, present=jnp.array([True, True, False]))
    _, state = step(mixing, starts, results, starts, state)
    assert state.weights.values[0] > 0.1
    assert state.weights.values[2] == pytest.approx(0.1)


def test_sheaf_with_identity_maps_is_laplacian_mixing():
    results = jnp.asarray(models_of(9))
    adjacency = (graphs.random(5, 3) > 0).astype(float)
    mixing = server.sheaf_mixing(
        adjacency, key=jax.random.key(0), strength=0.1, map_step=0.0, compression=1.0
    )
    state = mixing.init(results)
    identity = state._replace(maps=jnp.broadcast_to(jnp.eye(4), state.maps.shape))
    after, same = step(mixing, jnp.zeros_like(results), results, results, identity)
    expected = mixed(server.laplacian_mixing(graphs.fixed(adjacency), 0.1), results)
    np.testing.assert_allclose(after, expected, atol=1e-6)
    np.testing.assert_array_equal(same.maps, identity.maps)


def test_sheaf_steps_are_gradient_steps():
    """Steps equal those of autodiff of the sheaf's objective, with an absent client."""
    results = jnp.asarray(models_of(10))
    adjacency = graphs.random(5, 4)
    mixing = server.sheaf_mixing(
        adjacency, key=jax.random.key(1), strength=0.3, map_step=0.2, compression=0.5, deviation=1.0
    )
    state = mixing.init(results)
    present = jnp.array([True, True, True, False, True])
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5) if adjacency[i, j] > 0]
    assert state.maps.shape == (len(pairs), 2, 2, 4)

    def objective(models, maps):
        return sum(
            jnp.sum(jnp.square(maps[e, 0] @ models[i] - maps[e, 1] @ models[j])) / 2
            for e, (i, j) in enumerate(pairs)
            if 3 not in (i, j)
        )

    after, moved = step(mixing, jnp.zeros_like(results), results, results, state, present=present)
    expected = results - 0.3 * jax.grad(objective)(results, state.maps)
    keep = np.array([0, 1, 2, 4])
    np.testing.assert_allclose(after[keep], expected[keep], atol=1e-9)
    maps = state.maps - 0.2 * jax.grad(objective, argnums=1)(expected, state.maps)
    np.testing.assert_allclose(moved.maps, maps, atol=1e-9)
    assert server.sheaf_traffic(np.ones((3, 3)) - np.eye(3), 100, 0.1) == 4 * 2 * 10


def test_mixing_composes_with_other_transformations():
    """The mixture is of the models that clipping and projection leave."""
    results = jnp.asarray(models_of(11))
    starts = jnp.asarray(models_of(12))
    graph = graphs.fixed(graphs.random(5, 2))
    chain = optax.chain(
        server.clip_clients(0.5),
        server.project_conflicts(order="index"),
        server.laplacian_mixing(graph, 0.1),
    )
    after, _ = step(chain, starts, results)
    updates = starts - results
    for transformation in (server.clip_clients(0.5), server.project_conflicts(order="index")):
        updates, _ = transformation.update(updates, transformation.init(starts))
    expected, _ = step(server.laplacian_mixing(graph, 0.1), starts, starts - updates)
    np.testing.assert_allclose(after, expected, atol=1e-7)


# --- Graphs.


def test_graphs_from_descriptions():
    groups = np.array([0, 0, 1, 1, 1])
    same = graphs.within_groups(groups)
    assert same[0, 1] == 1 and same[0, 2] == 0 and same[0, 0] == 0
    np.testing.assert_allclose(graphs.within_groups(groups, normalised=True).sum(1), 1)
    features = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    cosine = graphs.by_similarity(features)
    assert cosine[0, 1] > 0.9 and cosine[0, 3] == 0
    gaussian = graphs.by_similarity(features, kernel="gaussian")
    assert gaussian[0, 1] > gaussian[0, 2] > gaussian[0, 3] > 0
    matrix = graphs.random(6, seed=3)
    np.testing.assert_array_equal(matrix, matrix.T)
    assert (matrix[matrix > 0] >= 0.25).all()


def test_simplex_rows_minimise():
    rng = np.random.default_rng(0)
    distances = rng.random((6, 6))
    valid = ~np.eye(6, dtype=bool)
    valid[5] = False
    rows = np.asarray(graphs.simplex_rows(jnp.asarray(distances), 0.5, jnp.asarray(valid)))
    np.testing.assert_allclose(rows[:5].sum(1), 1, atol=1e-9)
    assert (rows[~valid] == 0).all()

    def value(a):
        return (a * distances[:5]).sum(1) + 0.25 * np.square(a).sum(1)

    for seed in range(200):
        other = np.where(valid[:5], np.random.default_rng(seed).dirichlet(np.full(6, 0.5), 5), 0)
        other /= other.sum(1, keepdims=True)
        assert (value(rows[:5]) <= value(other) + 1e-9).all()


def test_learned_graph_finds_the_groups():
    groups = np.array([0, 1, 0, 1, 0, 1])
    models = 3.0 * groups[:, None] + 0.1 * models_of(13, count=6)
    graph = graphs.learned(smoothness=0.2)
    everybody = jnp.arange(6), jnp.ones(6, bool)
    _, adjacency = graph.update(
        graph.init(6), jnp.zeros_like(models), jnp.asarray(models), *everybody
    )
    assert (np.asarray(adjacency) > 0).sum() > 0
    assert np.asarray(adjacency)[groups[:, None] != groups].max() < 1e-6


def test_graphs_remember_pairs_that_met():
    graph = graphs.by_updates(decay=0.5)
    state = graph.init(4)
    first = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    state, adjacency = graph.update(state, first, first, jnp.array([0, 2]), jnp.ones(2, bool))
    assert adjacency[0, 2] == pytest.approx(1) and adjacency[0, 1] == 0
    second = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    state, adjacency = graph.update(state, second, second, jnp.array([0, 2]), jnp.ones(2, bool))
    assert adjacency[2, 0] == pytest.approx(0.5)
    state, adjacency = graph.update(
        state, first, first, jnp.array([1, 3]), jnp.array([True, False])
    )
    assert adjacency[1, 3] == 0 and adjacency[0, 2] == pytest.approx(0.5)


# --- Who owns which decoder.


def decoders_of(seed):
    """An encoder and two decoders of the same structure, of four clients."""
    rng = np.random.default_rng(seed)

    def layer():
        return {"kernel": jnp.asarray(rng.normal(size=(4, 2, 2))), "bias": jnp.zeros((4, 2))}

    return {"encoder": layer(), "decoders": {"depth": {"out": layer()}, "edge": {"out": layer()}}}


OWNED = np.array([[True, True], [True, False], [False, True], [False, True]])


def owned_rows(tree):
    """The extra argument ``owned``.

    It is a tree like the updates, with bool ``[cohort]`` in every leaf.
    """
    columns = {"depth": OWNED[:, 0], "edge": OWNED[:, 1]}
    return trees.map_with_path(
        lambda path, leaf: jnp.asarray(columns.get(path[1], np.ones(4, bool))), tree
    )


def two_rounds(rule, present=None, **facts):
    starts, state = decoders_of(0), None
    for seed in (1, 2):
        results = decoders_of(seed)
        after, state = step(rule, starts, results, starts, state, present=present, **facts)
    return after, state


@pytest.mark.parametrize("present", [None, jnp.array([True, True, True, False])])
def test_ownership_comes_with_the_round_or_the_constructor(present):
    """The round's account of who owns what and the constructor's give the same.

    ``only`` cuts the tree of owners to the decoders.
    """
    names = [("decoders", "depth"), ("decoders", "edge")]
    selected = trees.under("decoders")
    by_round = server.only(selected, server.hyper_attention(decoders=names))
    by_number = server.only(selected, server.hyper_attention(decoders=names, owned=OWNED))
    owned = owned_rows(decoders_of(0))
    ours, state = two_rounds(by_round, present, owned=owned)
    theirs, other = two_rounds(by_number, present)
    both, _ = two_rounds(by_number, present, owned=owned)
    everybody = jax.tree.map(lambda x: jnp.ones(4, bool), owned)
    narrowed, _ = two_rounds(by_number, present, owned=everybody)
    for result in (theirs, both, narrowed):
        jax.tree.map(np.testing.assert_array_equal, ours, result)
    jax.tree.map(np.testing.assert_array_equal, state, other)
    # Decoders that nobody owns come back as they were sent, the encoder too.
    returned = decoders_of(2)
    np.testing.assert_allclose(
        ours["decoders"]["edge"]["out"]["kernel"][1],
        returned["decoders"]["edge"]["out"]["kernel"][1],
    )
    np.testing.assert_allclose(ours["encoder"]["kernel"], returned["encoder"]["kernel"])
    all_own, _ = two_rounds(by_round, present)
    assert not np.allclose(
        all_own["decoders"]["edge"]["out"]["kernel"][0],
        ours["decoders"]["edge"]["out"]["kernel"][0],
    )


def test_only_cuts_what_has_the_form_of_the_parameters():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra, params=params)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tree = decoders_of(0)
    rule = server.only(trees.under("encoder"), spy)
    rule.update(
        tree,
        rule.init(tree),
        tree,
        population_params=tree,
        owned=owned_rows(tree),
        present=jnp.ones(4, bool),
    )
    for name in ("params", "population_params", "owned"):
        assert {path[0] for path in trees.leaves_by_path(seen[name])} == {"encoder"}
    assert seen["present"].shape == (4,)
    rule.update(tree, rule.init(tree), tree)
    assert seen["owned"] is None and seen["population_params"] is None


# --- Bad input.


@pytest.mark.parametrize(
    ("adjacency", "message"),
    [
        (np.ones((2, 3)), "must be \\[clients, clients\\]"),
        ([[0, -0.5], [0.2, 0]], "negative weight, -0.5 between clients 0 and 1"),
        ([[0, np.inf], [0.2, 0]], "not finite"),
    ],
)
def test_bad_adjacency(adjacency, message):
    with pytest.raises(ValueError, match=message):
        graphs.fixed(adjacency)


def test_adjacency_of_another_size():
    mixing = server.laplacian_mixing(graphs.fixed(np.ones((3, 3))), 0.1)
    with pytest.raises(ValueError, match="the adjacency is of 3 clients but there are 5"):
        mixing.init(jnp.zeros((5, 2)))


def test_mixing_needs_models_of_each_client():
    mixing = server.cluster_mixing(2)
    with pytest.raises(ValueError, match="use it in relational"):
        mixing.update(jnp.zeros((5, 2)), mixing.init(None))
    with pytest.raises(ValueError, match="meet parameters of shape"):
        mixing.update(jnp.zeros((5, 2)), mixing.init(None), jnp.zeros(2))


def test_only_needs_a_leaf():
    with pytest.raises(
        ValueError, match="selects none of the parameters; at the top they are layer"
    ):
        server.only(trees.under("encoder"), server.cluster_mixing(2)).init(
            as_tree(np.zeros((2, 2)))
        )


def test_decoders_of_different_structure():
    tree = {"a": {"kernel": jnp.zeros((2, 3))}, "b": {"kernel": jnp.zeros((2, 4))}}
    with pytest.raises(ValueError, match="decoder b has other layers than a"):
        server.hyper_attention(decoders=[("a",), ("b",)]).init(tree)
    with pytest.raises(ValueError, match="no parameters below c"):
        server.hyper_attention(decoders=[("c",)]).init(tree)


def test_bad_settings():
    for make in (
        lambda: server.cluster_mixing(0),
        lambda: server.attention_mixing(bandwidth="mean"),
        lambda: server.laplacian_mixing(graphs.fixed(np.eye(2)), 0.1, neighbours="some"),
        lambda: graphs.learned(smoothness=0),
        lambda: graphs.by_similarity(np.eye(2), kernel="dot"),
        lambda: server.sheaf_mixing(
            np.eye(2), key=jax.random.key(0), strength=1, map_step=1, compression=0
        ),
    ):
        with pytest.raises(ValueError):
            make()
