"""Clients that come in groups with decoders of their own, under the systems with own models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    GROUP_COUNTS,
    GROUP_MODELS,
    GROUP_TASKS,
    NUM_CLIENTS,
    TASK,
    VMAP,
    assert_trees_close,
    decoder_model,
    make_grouped_algorithms,
    small_federation,
    small_population,
)

from fedjax_mtl import Solver, algorithms, sampling, trees
from fedjax_mtl.algorithms._fedmtl import fedmtl_pull
from fedjax_mtl.clients.updates import ClientResult
from fedjax_mtl.core import batching
from fedjax_mtl.relations import graphs
from fedjax_mtl.rounds.serving import serve_results

KEY = jax.random.key(1)
# Whole local sets and no shuffles: keys do not matter.
SOLVER = Solver(optax.sgd(0.1), batching.steps(2, None))
ADJACENCY = graphs.random(NUM_CLIENTS, seed=2)
NAMES = ("ditto", "fedamp", "fedhca2", "fedmtl", "fedu", "fedu_all", "matfl", "sheaf_fmtl")

MAKERS = {
    "ditto": functools.partial(algorithms.ditto, penalty=0.5),
    "fedamp": functools.partial(
        algorithms.fedamp, bandwidth="median", parts=("encoder", "decoders")
    ),
    "fedhca2": algorithms.fedhca2,
    "fedmtl": functools.partial(algorithms.fedmtl, penalty=0.05),
    "fedmtl_mean": functools.partial(algorithms.fedmtl, regulariser="mean"),
    "fedu": functools.partial(algorithms.fedu, graph=graphs.fixed(ADJACENCY), strength=0.1),
    "matfl": algorithms.matfl,
    "sheaf_fmtl": functools.partial(
        algorithms.sheaf_fmtl, adjacency=ADJACENCY, strength=0.05, map_step=0.01, deviation=0.3
    ),
}


COHORTS = sampling.by_group(sampling.full_participation())(KEY, 0, small_population())
grouped_algorithms = functools.cache(make_grouped_algorithms)


def rounds(algorithm, cohort, count=2):
    state, one_round = algorithm.init(KEY), jax.jit(algorithm.round)
    for index in range(count):
        state, _ = one_round(state, cohort, jax.random.fold_in(KEY, index))
    return state


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_groups_of_one_task_are_one_federation(name):
    """The same clients in one federation and in two groups end with the same models."""
    whole = small_federation()
    model = decoder_model("labels", 3)
    make = functools.partial(MAKERS[name], model, TASK, solver=SOLVER, execution=VMAP)
    together, apart = make(num_clients=NUM_CLIENTS), make(num_clients={"a": 2, "b": 4})
    ids = {"a": jnp.arange(2), "b": jnp.arange(2, NUM_CLIENTS)}
    parts = {group: whole.take(own) for group, own in ids.items()}
    cohorts = sampling.by_group(sampling.full_participation())(KEY, 0, parts)
    theirs = rounds(together, sampling.make_cohort(whole, jnp.arange(NUM_CLIENTS)))
    ours = rounds(apart, cohorts)
    inputs = jax.random.normal(KEY, (NUM_CLIENTS, 5, 4))
    expected = together.predict(theirs, jnp.arange(NUM_CLIENTS), inputs)
    numbers = {group: jnp.arange(len(own)) for group, own in ids.items()}
    found = apart.predict(ours, numbers, {group: inputs[own] for group, own in ids.items()})
    joined = jnp.concatenate([found["a"], found["b"]])
    np.testing.assert_allclose(joined, expected, rtol=1e-3, atol=1e-5)
    assert apart.traffic(ours) == together.traffic(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_groups_with_decoders_of_their_own_learn(name):
    algorithm = grouped_algorithms()[name]
    one_round = jax.jit(algorithm.round)
    state, losses = algorithm.init(KEY), []
    for index in range(12):
        state, info = one_round(state, COHORTS, jax.random.fold_in(KEY, index))
        losses.append([float(info[f"loss/{group}"]) for group in ("first", "second")])
    losses = np.array(losses)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert (losses[-3:].mean(axis=0) < losses[:2].mean(axis=0)).all()
    newcomers = {"second": small_population()["second"]}
    adapted = algorithm.adapt(state, newcomers, KEY)
    outputs = algorithm.predict(adapted, {"second": jnp.arange(2)}, {"second": jnp.ones((2, 3, 4))})
    assert outputs["second"].shape == (2, 3, 1)
    assert min(algorithm.traffic(state)) > 0


# --- What the server makes of given updates.


def served(algorithm, seed=0):
    """Random updates of everybody, and the models before and after the server's half of a round."""
    rng = np.random.default_rng(seed)
    state = algorithm.init(KEY)

    def drawn(tree):
        return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)

    start = drawn(state.params)
    updates = drawn(state.params)
    results = {
        name: ClientResult(
            updates[name],
            state.clients[name],
            {"loss": jnp.ones(count), "num_steps": jnp.ones(count)},
        )
        for name, count in GROUP_COUNTS.items()
    }
    after, _ = serve_results(algorithm.parts, state._replace(params=start), results, COHORTS, KEY)
    return jax.tree.map(np.asarray, (start, updates, after.params))


def make(name, **settings):
    return MAKERS[name](
        GROUP_MODELS,
        GROUP_TASKS,
        num_clients=GROUP_COUNTS,
        solver=SOLVER,
        execution=VMAP,
        **settings,
    )


def pulled(adjacency, models, strength=0.1):
    """The models after the pull of FedU's formula."""
    adjacency = adjacency * (1 - np.eye(len(adjacency)))
    degrees = adjacency.sum(axis=1)
    flat = models.reshape(len(models), -1)
    moved = flat - strength * (degrees[:, None] * flat - adjacency @ flat)
    return moved.reshape(models.shape)


def test_fedu_pulls_along_the_populations_edges():
    """Encoders are pulled among all clients, decoders among the clients that have them.

    Each client has its own place in the graph.
    """
    start, updates, after = served(make("fedu"))
    encoders = np.concatenate(
        [
            start[name]["encoder"]["kernel"] - updates[name]["encoder"]["kernel"]
            for name in ("first", "second")
        ]
    )
    expected = pulled(ADJACENCY, encoders)
    np.testing.assert_allclose(after["first"]["encoder"]["kernel"], expected[:4], rtol=1e-4)
    np.testing.assert_allclose(after["second"]["encoder"]["kernel"], expected[4:], rtol=1e-4)
    for name, task, own in (("first", "labels", slice(0, 4)), ("second", "value", slice(4, 6))):
        came_back = start[name]["decoders"][task]["outer"]["kernel"]
        came_back = came_back - updates[name]["decoders"][task]["outer"]["kernel"]
        expected = pulled(ADJACENCY[own, own], came_back)
        ours = after[name]["decoders"][task]["outer"]["kernel"]
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_learned_graph_is_learned_among_owners():
    algorithm = grouped_algorithms()["fedu_all"]
    _, info = jax.jit(algorithm.round)(algorithm.init(KEY), COHORTS, KEY)
    assert info["adjacency"].shape == (NUM_CLIENTS, NUM_CLIENTS)
    among = np.asarray(info["adjacency/second"])
    assert among.max() > 0


def test_fedhca2_attends_over_the_decoders_of_all_groups():
    """One attention covers six decoders that have two names."""
    start, updates, after = served(make("fedhca2"))
    for leaf in ("kernel", "bias"):
        decoders = np.concatenate(
            [
                updates["first"]["decoders"]["labels"]["inner"][leaf],
                updates["second"]["decoders"]["value"]["inner"][leaf],
            ]
        ).reshape(NUM_CLIENTS, -1)
        scores = decoders @ decoders.T / np.sqrt(decoders.shape[1])
        attention = np.exp(scores - scores.max(axis=1, keepdims=True))
        attention /= attention.sum(axis=1, keepdims=True)
        helped = decoders + 0.1 * attention @ decoders
        for name, task, own in (("first", "labels", slice(0, 4)), ("second", "value", slice(4, 6))):
            before = start[name]["decoders"][task]["inner"][leaf]
            expected = before - helped[own].reshape(before.shape)
            ours = after[name]["decoders"][task]["inner"][leaf]
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_fedhca2_keeps_layers_that_differ_and_what_it_is_told():
    """The outer layers have 3 and 1 outputs, so they are personal and no attention sees them."""
    state = make("fedhca2").init(KEY)
    assert set(trees.leaves_by_path(state.params["first"])) == {
        ("encoder", "kernel"),
        ("encoder", "bias"),
        ("decoders", "labels", "inner", "kernel"),
        ("decoders", "labels", "inner", "bias"),
    }
    outer = state.clients["second"].personal["decoders"]["value"]["outer"]["kernel"]
    assert outer.shape == (2, 4, 1)
    biases = make("fedhca2", last=lambda path: "outer" in path or path[-1] == "bias")
    travelling = trees.leaves_by_path(biases.init(KEY).params["second"])
    assert ("decoders", "value", "inner", "kernel") in travelling
    assert ("decoders", "value", "inner", "bias") not in travelling
    with pytest.raises(ValueError, match="selects none"):
        make("fedhca2", last=trees.everything).init(KEY)


def test_fedmtl_counts_every_tensor_among_its_owners():
    """One step of full batches equals the one by hand.

    The encoder has six owners, and a decoder has four or two.
    """
    factor, rate = 0.05, 0.1
    solver = Solver(optax.sgd(rate), batching.steps(1, None))
    settings = {"num_clients": GROUP_COUNTS, "solver": solver, "execution": VMAP}
    algorithm = algorithms.fedmtl(GROUP_MODELS, GROUP_TASKS, penalty=factor, **settings)
    plain = algorithms.fedmtl(GROUP_MODELS, GROUP_TASKS, fidelity="released", **settings)
    start = algorithm.init(KEY)
    after = jax.jit(algorithm.round)(start, COHORTS, KEY)[0].clients
    without = jax.jit(plain.round)(plain.init(KEY), COHORTS, KEY)[0].clients
    for name, task in (("first", "labels"), ("second", "value")):
        own = start.clients[name].personal
        # All start alike: the mean of the others is the client's own model.
        pulls = {
            "encoder": fedmtl_pull(6, factor)(own["encoder"], own["encoder"]),
            "decoders": fedmtl_pull(GROUP_COUNTS[name], factor)(own["decoders"], own["decoders"]),
        }
        expected = optax.tree.sub(without[name].personal, optax.tree.scale(rate, pulls))
        assert_trees_close(after[name].personal, expected, rtol=1e-4, atol=1e-6)
        assert task in own["decoders"]


def test_fedmtl_traffic_of_groups():
    algorithm = make("fedmtl")
    state = algorithm.init(KEY)
    encoder, inner = 4 * 5 + 5, 5 * 4 + 4
    first, second = inner + 4 * 3 + 3, inner + 4 + 1
    up = (6 * encoder + 4 * first + 2 * second) * 4 / 6
    down = (6 * 5 * encoder + 4 * 3 * first + 2 * 1 * second) * 4 / 6
    assert algorithm.traffic(state) == (round(up), round(down))


def test_ditto_keeps_personal_leaves_of_both_models():
    algorithm = make("ditto", personal=trees.under("decoders"))
    state = algorithm.init(KEY)
    assert set(state.params) == {"encoder"}
    state, _ = jax.jit(algorithm.round)(state, COHORTS, KEY)
    kept = state.clients["first"]
    for own in (kept.shared.personal, kept.own.personal):
        kernels = own["decoders"]["labels"]["outer"]["kernel"]
        assert np.ptp(kernels, axis=0).max() > 1e-4


def test_parts_that_nobody_has_are_refused():
    with pytest.raises(ValueError, match="no client has a part 'decoder'; at the top"):
        algorithms.fedamp(
            GROUP_MODELS,
            GROUP_TASKS,
            num_clients=GROUP_COUNTS,
            solver=SOLVER,
            parts=("encoder", "decoder"),
        )
