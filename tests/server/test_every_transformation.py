"""Promises that every server transformation keeps, walked through one table of them all."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close
from jax.extend import core

from fedjax_mtl import server
from fedjax_mtl.core import trees
from fedjax_mtl.relations import gossip, graphs

CLIENTS = 4
ONE = {
    "encoder": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)},
    "decoder": {"kernel": jnp.zeros((2, 5))},
}
GRAPH = graphs.random(CLIENTS, seed=1, threshold=0.0)
RING = gossip.metropolis_weights(gossip.ring(CLIENTS))
GROUPS = jnp.array([0, 0, 1, 2])

# Those that serve one copy of the parameters: they see params [...] and updates [clients, ...].
SHARED = {
    "agnostic_average": server.agnostic_average(jnp.full(CLIENTS, 0.25), 0.1),
    "average_clients": server.average_clients(),
    "clip_clients": server.clip_clients(0.5),
    "compress_clients": server.compress_clients(server.top_entries(0.5), CLIENTS),
    "compress_clients levels": server.compress_clients(
        server.stochastic_levels(3), CLIENTS, error_feedback=False
    ),
    "conflict_averse": server.conflict_averse(iterations=5),
    "conflict_averse per leaf": server.conflict_averse(iterations=5, granularity="per_leaf"),
    "coordinate_median": server.coordinate_median(),
    "decouple_updates": server.decouple_updates(0.4, denominator="selected"),
    "gp_aggregation": server.gp_aggregation(groups=GROUPS),
    "gp_aggregation per leaf": server.gp_aggregation(
        attention="softmax_dot", order="random", granularity="per_leaf"
    ),
    "normalize_gradients": server.normalize_gradients(CLIENTS, learning_rate=0.05),
    "over_the_air_gradnorm": server.over_the_air_gradnorm(2, 2, learning_rate=0.05, power=1.0),
    "private_average": server.private_average(1.0, 0.1),
    "project_conflicts": server.project_conflicts(normalise="restore"),
    "project_conflicts averaged": server.project_conflicts(average=True, granularity="per_leaf"),
    "q_fair_average": server.q_fair_average(1.0, 0.1),
    "step_from": server.step_from(optax.adam(0.1)),
    "trimmed_mean": server.trimmed_mean(0.25),
}
# Those that serve a model for every client: they see both as [clients, ...].
OWN = {
    "attention_mixing": server.attention_mixing(scale=0.3, bandwidth="median"),
    "average_in_clusters": server.average_in_clusters(10.0, 0.0),
    "cluster_mixing": server.cluster_mixing(2),
    "cluster_mixing soft": server.cluster_mixing(soft=True),
    "gossip_mixing": server.gossip_mixing(jnp.asarray(RING)),
    "hyper_attention": server.hyper_attention(),
    "hyper_conflict_averse": server.hyper_conflict_averse(groups=GROUPS),
    "laplacian_mixing": server.laplacian_mixing(graphs.fixed(GRAPH), 0.1),
    "laplacian_mixing by updates": server.laplacian_mixing(graphs.by_updates(), 0.1),
    "laplacian_mixing learned": server.laplacian_mixing(graphs.learned(), 0.1, neighbours="all"),
    "mean_of_others": server.mean_of_others(),
    "mix_models": server.mix_models(lambda models: jnp.eye(CLIENTS)),
    "only": server.only(trees.under("encoder"), server.hyper_attention()),
    "sheaf_mixing": server.sheaf_mixing(
        GRAPH, key=jax.random.key(0), strength=0.1, map_step=0.1, compression=0.3, deviation=1.0
    ),
}
ALL = {**SHARED, **OWN}
NO_TRANSFORMATIONS = {
    "HyperOptimizer",
    "Report",
    "averages_first",
    "reported",
    "sheaf_traffic",
    "stochastic_levels",
    "top_entries",
}


def test_the_table_is_complete_and_names_are_the_package_s():
    assert {name.split()[0] for name in ALL} == set(server.__all__) - NO_TRANSFORMATIONS
    for name in server.__all__:
        assert not inspect.ismodule(getattr(server, name)), f"{name} is shadowed by its module"


def drawn(seed):
    stacked = trees.broadcast_clients(ONE, CLIENTS)
    return optax.tree.random_like(jax.random.key(seed), stacked)


def facts(**changes):
    """What a round says beside the updates."""
    given = {
        "weights": jnp.array([0.1, 0.2, 0.3, 0.4]),
        "losses": jnp.array([1.0, 2.0, 0.5, 3.0]),
        "client_ids": jnp.arange(CLIENTS),
        "present": jnp.ones(CLIENTS, bool),
        "key": jax.random.key(7),
        "reports": {},
    }
    return {**given, **changes}


def start(name):
    """The parameters that a transformation sees, and its first state."""
    params = drawn(1) if name in OWN else ONE
    return params, ALL[name].init(params)


def run(name, updates, rounds=2, **changes):
    """Returns the last step and state of two rounds.

    The losses of the first round are greater than those of the second.
    """
    params, state = start(name)
    step, extra = None, facts(**changes)
    if name in OWN:
        extra["population_params"] = params
    update = jax.jit(
        lambda updates, state, **extra: ALL[name].update(updates, state, params, **extra)
    )
    for index in range(rounds):
        step, state = update(updates, state, **extra)
        extra["losses"] = extra["losses"] / (index + 2)
    return step, state


# --- Products are of full precision.


def products(jaxpr):
    """The matrix products and convolutions of a program.

    Those inside loops and calls are among them.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated", "ragged_dot"):
            yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda leaf: isinstance(leaf, (core.Jaxpr, core.ClosedJaxpr)),
        ):
            if isinstance(value, core.ClosedJaxpr):
                yield from products(value.jaxpr)
            elif isinstance(value, core.Jaxpr):
                yield from products(value)


def rounded(fn, *arguments):
    """The products of a function whose factors a device may round."""
    with jax.default_matmul_precision("bfloat16"):
        found = list(products(jax.make_jaxpr(fn)(*arguments).jaxpr))
    highest = jax.lax.Precision.HIGHEST
    return found, [x for x in found if x.params["precision"] not in (highest, (highest,) * 2)]


@pytest.mark.parametrize("name", ALL)
def test_products_are_of_the_highest_precision(name):
    params, state = start(name)
    extra = {"population_params": params} if name in OWN else {}
    _, wrong = rounded(
        lambda updates, state: ALL[name].update(updates, state, params, **facts(), **extra),
        drawn(0),
        state,
    )
    assert not wrong


def test_the_walk_finds_products():
    """This test makes sure that the one above does not pass because it sees nothing."""
    square = jnp.eye(2)

    def hidden(x):
        body = jax.vmap(lambda row: row @ square)
        return jax.lax.fori_loop(0, 2, lambda _, y: jax.jit(body)(y), x)

    found, wrong = rounded(hidden, square)
    assert len(found) == len(wrong) == 1
    params, state = start("sheaf_mixing")
    found, _ = rounded(
        lambda updates: OWN["sheaf_mixing"].update(updates, state, params, **facts()), drawn(0)
    )
    assert len(found) >= 4


# --- What is absent or has no loss.


@pytest.mark.parametrize("name", sorted(set(ALL) - {"average_in_clusters", "clip_clients", "only"}))
def test_absent_clients_may_have_sent_anything(name):
    """What absent clients sent has no influence.

    Transformations that pass rows on are left out, because the round masks those rows before, or
    other transformations do so after.
    """
    present = jnp.array([True, False, True, True])
    clean = trees.mask_clients(drawn(0), present)
    garbage = trees.where_clients(present, clean, jax.tree.map(lambda x: x + jnp.nan, clean))
    losses = facts()["losses"]
    ours = run(name, garbage, present=present, losses=losses.at[1].set(jnp.nan))
    theirs = run(name, clean, present=present, losses=losses)
    assert_trees_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ours))


@pytest.mark.parametrize("name", ALL)
def test_a_client_without_a_step_has_no_loss_and_spoils_nothing(name):
    """A client that was not asked for a single step is present.

    Its update is 0 and its loss is NaN.
    """
    losses = facts()["losses"].at[1].set(jnp.nan)
    updates = trees.mask_clients(drawn(0), jnp.array([True, False, True, True]))
    outcome = run(name, updates, losses=losses)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome))


@pytest.mark.parametrize(
    "name", ["agnostic_average", "normalize_gradients", "over_the_air_gradnorm", "q_fair_average"]
)
def test_a_client_without_a_loss_counts_like_an_absent_one(name):
    present = jnp.array([True, False, True, True])
    updates = trees.mask_clients(drawn(0), present)
    losses = facts()["losses"].at[1].set(jnp.nan)
    ours = run(name, updates, losses=losses)
    theirs = run(name, updates, losses=losses, present=present)
    assert_trees_close(ours, theirs)


# --- Reports.


@pytest.mark.parametrize("name", ALL)
def test_reports_have_one_form_from_the_start(name):
    _, before = start(name)
    _, after = run(name, drawn(0))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    told_before, told_after = server.reported(before), server.reported(after)
    assert set(told_before) == set(told_after)


REPORTS = {
    "agnostic_average": {"mixture"},
    "attention_mixing": {"own_weight"},
    "average_in_clusters": {"num_clusters"},
    "cluster_mixing": {"cluster"},
    "cluster_mixing soft": {"own_weight"},
    "conflict_averse": {"conflict_fraction", "mean_cosine"},
    "conflict_averse per leaf": {"conflict_fraction", "mean_cosine"},
    "gp_aggregation": {"conflict_fraction", "mean_cosine", "attention_spread", "norm_ratio"},
    "gp_aggregation per leaf": {
        "conflict_fraction",
        "mean_cosine",
        "attention_spread",
        "norm_ratio",
    },
    "hyper_attention": {"layer_hyper_weights"},
    "hyper_conflict_averse": {"hyper_weights"},
    "laplacian_mixing by updates": {"adjacency"},
    "laplacian_mixing learned": {"adjacency"},
    "normalize_gradients": {"loss_weights"},
    "only": {"layer_hyper_weights"},
    "over_the_air_gradnorm": {"loss_weights"},
    "project_conflicts": {"conflict_fraction", "mean_cosine"},
    "project_conflicts averaged": {"conflict_fraction", "mean_cosine"},
    "sheaf_mixing": {"disagreement"},
}


@pytest.mark.parametrize("name", ALL)
def test_what_is_reported(name):
    assert set(server.reported(start(name)[1])) == REPORTS.get(name, set())


def test_reports_of_a_chain_are_all_collected():
    report = server.Report
    state = (
        (report({"a": jnp.ones(())}), report({"a_b": jnp.zeros(2)})),
        {"inner": report({"a": 2 * jnp.ones(())})},
        report({"a": 3 * jnp.ones(()), "b": jnp.zeros(())}),
        (),
    )
    found = server.reported(state)
    assert set(found) == {"a", "a_2", "a_3", "a_b", "b"}
    assert [float(found[name]) for name in ("a", "a_2", "a_3")] == [1, 2, 3]


def test_weights_and_mixtures_are_told_by_the_client_s_number():
    _, state = run("normalize_gradients", drawn(0))
    np.testing.assert_array_equal(server.reported(state)["loss_weights"], state.weights)
    _, state = run("agnostic_average", drawn(0))
    np.testing.assert_array_equal(server.reported(state)["mixture"], state.mixture)
    order = jnp.array([2, 0, 3, 1])
    _, straight = run("over_the_air_gradnorm", drawn(0))
    _, moved = run(
        "over_the_air_gradnorm",
        trees.take_clients(drawn(0), order),
        client_ids=order,
        losses=facts()["losses"][order],
    )
    told = server.reported(moved)["loss_weights"]
    assert told.shape == (CLIENTS,)
    np.testing.assert_allclose(told, server.reported(straight)["loss_weights"], rtol=1e-5)


@pytest.mark.parametrize("name", ["project_conflicts", "conflict_averse", "gp_aggregation"])
def test_conflicts_are_counted(name):
    """One of three pairs of clients has a negative product, and the fourth client is away."""
    make = {
        "project_conflicts": server.project_conflicts(order="index"),
        "conflict_averse": server.conflict_averse(),
        "gp_aggregation": server.gp_aggregation(),
    }[name]
    updates = jnp.array([[1.0, 0.0], [-3.0, 3.0], [0.0, 2.0], [-9.0, -9.0]])
    present = jnp.array([True, True, True, False])
    _, state = make.update(updates, make.init(updates[0]), present=present)
    told = server.reported(state)
    np.testing.assert_allclose(told["conflict_fraction"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(told["mean_cosine"], 0.0, atol=1e-6)  # -1/sqrt2, 1/sqrt2 and 0


def two_and_two():
    """Models of four clients, of which 0 and 2 are alike, and so are 1 and 3."""
    return {"w": jnp.array([[1.0, 0.1], [-1.0, 0.1], [1.0, -0.1], [-1.0, -0.1]])}


def mixed_report(transformation, client_ids, present):
    models = trees.take_clients(two_and_two(), client_ids)
    starts = jax.tree.map(jnp.zeros_like, models)
    state = transformation.init(two_and_two())
    updates = optax.tree.sub(starts, models)
    _, state = transformation.update(updates, state, starts, client_ids=client_ids, present=present)
    return server.reported(state)


def test_clusters_are_named_by_their_first_client():
    ids, everybody = jnp.arange(4), jnp.ones(4, bool)
    rule = server.cluster_mixing(2)
    assert mixed_report(rule, ids, everybody)["cluster"].tolist() == [0, 1, 0, 1]
    shuffled = mixed_report(rule, jnp.array([3, 2, 0, 1]), everybody)
    assert shuffled["cluster"].tolist() == [0, 1, 0, 1]
    few = mixed_report(rule, jnp.array([3, 2, 1]), jnp.array([True, True, False]))
    assert few["cluster"].tolist() == [-1, -1, 2, 3]


def test_the_own_weight_tells_who_met_nobody():
    ids, present = jnp.array([3, 2, 1]), jnp.array([True, True, False])
    nobody = mixed_report(server.attention_mixing(bandwidth=1e-3), ids, present)["own_weight"]
    np.testing.assert_allclose(nobody, 1)
    half = mixed_report(server.attention_mixing(scale=0.5 * np.e, bandwidth="median"), ids, present)
    np.testing.assert_allclose(half["own_weight"], [1, 1, 0.5, 0.5], rtol=1e-5)


def test_the_sheaf_tells_its_objective():
    _, state = start("sheaf_mixing")
    params, updates = drawn(1), drawn(0)
    _, after = OWN["sheaf_mixing"].update(updates, state, params, **facts())
    models = np.asarray(trees.flat_clients(optax.tree.sub(params, updates)))
    maps = np.asarray(state.maps)
    pairs = [(i, j) for i in range(CLIENTS) for j in range(i + 1, CLIENTS) if GRAPH[i, j] > 0]
    apart = [maps[e, 0] @ models[i] - maps[e, 1] @ models[j] for e, (i, j) in enumerate(pairs)]
    objective = sum(np.sum(np.square(d)) for d in apart) / 2
    np.testing.assert_allclose(server.reported(after)["disagreement"], objective, rtol=1e-4)


def test_a_learned_graph_is_told():
    name = "laplacian_mixing by updates"
    _, state = run(name, drawn(0), rounds=1)
    told = np.asarray(server.reported(state)["adjacency"])
    gram = np.asarray(trees.inner_products(drawn(0), drawn(0)))
    lengths = np.sqrt(np.diagonal(gram))
    expected = np.maximum(gram / lengths[:, None] / lengths, 0) * (1 - np.eye(CLIENTS))
    np.testing.assert_allclose(told, expected, rtol=1e-4, atol=1e-6)
