"""What every algorithm promises to clients that come in groups with different tasks."""

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
    make_algorithms,
    make_grouped_algorithms,
    poisoned,
    small_federation,
    small_population,
)

from fedjax_mtl import Solver, algorithms, evaluate_clients, make_execution, simulate
from fedjax_mtl.core import batching, sampling

GROUPED = make_grouped_algorithms()
# One of each kind by default, and all others with the claims: every round is a compilation.
KINDS = {"ditto", "fedamp", "fedavg", "fedem", "fedhca2", "fedrep", "matfl"}


def walk(names, by_default):
    """Parameters of which only some are tried by default, and the others with the claims."""
    return [
        name if name in by_default else pytest.param(name, marks=pytest.mark.claim)
        for name in names
    ]


NAMES = walk(sorted(GROUPED), KINDS)
KEY = jax.random.key(3)
POPULATION = small_population()
EVERYBODY = {name: jnp.ones(count, bool) for name, count in GROUP_COUNTS.items()}
FEW = {"first": jnp.array([True, False, True, True]), "second": jnp.array([False, True])}
WHOLE = ("clustered", "decentralized_fedem", "fedmtl", "l2sgd", "pfedme_released")


def cohorts_of(present=EVERYBODY, population=POPULATION):
    """Cohorts with all slots of both groups, of which those are filled that are ``present``."""

    def all_of(key, round_index, federation):
        ids = jnp.arange(federation.num_clients, dtype=jnp.int32)
        name = "first" if federation.num_clients == GROUP_COUNTS["first"] else "second"
        return sampling.make_cohort(federation, ids, present[name])

    return sampling.by_group(all_of)(KEY, 0, population)


@functools.cache
def compiled(name):
    """Init and round, compiled once for all the tests that share their shapes."""
    return jax.jit(GROUPED[name].init), jax.jit(GROUPED[name].round)


def two_rounds(name, cohorts):
    init, one_round = compiled(name)
    state, _ = one_round(init(KEY), cohorts, jax.random.fold_in(KEY, 1))
    return one_round(state, cohorts, jax.random.fold_in(KEY, 2))


def rows(tree, ids):
    return jax.tree.map(lambda x: x[jnp.array(ids)], tree)


@pytest.mark.parametrize("name", NAMES)
def test_finite_and_learning(name):
    init, one_round = compiled(name)
    cohorts, state, losses = cohorts_of(), init(KEY), []
    start = jax.tree.structure(state)
    for index in range(12):
        state, info = one_round(state, cohorts, jax.random.fold_in(KEY, index))
        losses.append(float(info["loss"]))
    assert jax.tree.structure(state) == start
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert np.mean(losses[-3:]) < np.mean(losses[:2])
    assert {"loss/first", "loss/second", "participants", "diverged"} <= set(info)


@pytest.mark.parametrize("name", NAMES)
def test_absent_and_diverged_clients(name):
    """A client that diverges counts as absent, and what absent clients keep stays as it was."""
    bad = {"first": poisoned(POPULATION["first"], 1), "second": poisoned(POPULATION["second"], 0)}
    absent, reference = two_rounds(name, cohorts_of(FEW))
    diverged, info = two_rounds(name, cohorts_of(population=bad))
    assert info["diverged"] == 2 and info["participants"] == NUM_CLIENTS - 2
    np.testing.assert_allclose(info["loss"], reference["loss"], rtol=1e-4)
    assert_trees_close(diverged, absent, rtol=1e-4, atol=1e-5)
    start = compiled(name)[0](KEY)
    for group, gone in (("first", [1]), ("second", [0])):
        assert_trees_close(rows(absent.clients[group], gone), rows(start.clients[group], gone))


@pytest.mark.parametrize("name", NAMES)
def test_a_group_that_nobody_attends_and_a_round_that_nobody_attends(name):
    init, one_round = compiled(name)
    state, _ = one_round(init(KEY), cohorts_of(), KEY)
    nobody = {group: jnp.zeros_like(there) for group, there in EVERYBODY.items()}
    new, info = one_round(state, cohorts_of(nobody), KEY)
    assert_trees_close(new._replace(round=state.round), state)
    assert np.isnan(info["loss"]) and info["participants"] == 0
    new, info = one_round(state, cohorts_of({**EVERYBODY, "second": nobody["second"]}), KEY)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    assert np.isnan(info["loss/second"]) and np.isfinite(info["loss"])
    assert_trees_close(new.clients["second"], state.clients["second"])


@pytest.mark.parametrize("name", NAMES)
def test_stragglers(name):
    """Clients do shares of their own planned steps. A client that makes none enters no mean."""
    init, one_round = compiled(name)
    cohorts = cohorts_of()
    work = {"first": jnp.array([1.0, 0.6, 0.0, 1.0]), "second": jnp.array([0.5, 0.0])}
    short = {name: own._replace(work=work[name]) for name, own in cohorts.items()}
    _, full = one_round(init(KEY), cohorts, KEY)
    state, info = one_round(init(KEY), short, KEY)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert np.isfinite(info["loss"]) and info["participants"] == NUM_CLIENTS
    assert info["num_steps"] < full["num_steps"]


@pytest.mark.parametrize("name", NAMES)
def test_predict_and_adapt(name):
    algorithm, state = GROUPED[name], compiled(name)[0](KEY)
    ids = {"first": jnp.array([1, 3]), "second": jnp.array([0])}
    inputs = {"first": jax.random.normal(KEY, (2, 5, 4)), "second": jnp.ones((1, 5, 4))}
    outputs = algorithm.predict(state, ids, inputs)
    assert outputs["first"].shape == (2, 5, 3) and outputs["second"].shape == (1, 5, 1)
    newcomers = {"first": POPULATION["first"].take(jnp.array([0, 2, 3]))}
    adapted = jax.jit(algorithm.adapt)(state, newcomers, KEY)
    outputs = algorithm.predict(adapted, {"first": jnp.arange(3)}, {"first": jnp.ones((3, 5, 4))})
    assert outputs["first"].shape == (3, 5, 3) and np.isfinite(outputs["first"]).all()
    assert_trees_close(adapted.clients["second"], state.clients["second"])
    up, down = algorithm.traffic(state)
    assert up >= 0 and down >= 0 and (up == 0) == (name == "local")


def joined(tree):
    """Joins the values of all groups along the client axis, group after group."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), tree["first"], tree["second"])


# FedAvg with another server, another loss or another solver needs no test of its own here.
VARIANTS = ("fedadam", "fedavg_tuned", "feddea", "fedem_released", "fedprox", "pfedme", "local")


@pytest.mark.parametrize(
    "name", walk(sorted(set(GROUPED) - set(VARIANTS)), {"ditto", "fedavg", "fedhca2"})
)
def test_groups_of_one_task_are_one_federation(name):
    """The same clients in one federation and in two groups make the same rounds."""
    # Full batches, because the clients' keys differ: they are folded from their group's.
    plan = batching.steps(2, None)
    one = {"model": GROUP_MODELS["first"], "task": TASK, "plan": plan}
    one["solver"] = Solver(optax.sgd(0.1, momentum=0.5), plan)
    together = make_algorithms(**one)[name]
    apart = make_grouped_algorithms(**one)[name]
    whole = small_federation()
    parts = {"first": whole.take(jnp.arange(4)), "second": whole.take(jnp.array([4, 5]))}
    theirs, ours = jax.jit(together.init)(KEY), jax.jit(apart.init)(KEY)
    round_together, round_apart = jax.jit(together.round), jax.jit(apart.round)
    there = jnp.concatenate([FEW["first"], FEW["second"]])
    for present, few in ((jnp.ones_like(there), EVERYBODY), (there, FEW)):
        cohort = sampling.make_cohort(whole, jnp.arange(NUM_CLIENTS), present)
        theirs, reference = round_together(theirs, cohort, KEY)
        ours, info = round_apart(ours, cohorts_of(few, parts), KEY)
    np.testing.assert_allclose(info["loss"], reference["loss"], rtol=1e-4)
    assert_trees_close(joined(ours.clients), theirs.clients, rtol=1e-4, atol=1e-5)
    # The structure may differ: a single federation's server knows of leaves that stay.
    servers = [jax.tree.leaves(state.server) for state in (ours, theirs)]
    assert_trees_close(*servers, rtol=1e-4, atol=1e-5)
    assert not ours.owners
    inputs = jax.random.normal(KEY, (NUM_CLIENTS, 3, 4))
    ids = {"first": jnp.arange(4), "second": jnp.arange(2)}
    outputs = jax.jit(apart.predict)(ours, ids, {"first": inputs[:4], "second": inputs[4:]})
    expected = jax.jit(together.predict)(theirs, jnp.arange(NUM_CLIENTS), inputs)
    np.testing.assert_allclose(joined(outputs), expected, rtol=1e-3, atol=1e-4)


SAMPLED = ("fedavg", "fedem", "ditto", "fedrep", "fedamp", "matfl", "fedhca2", "fedu")


@pytest.mark.parametrize("name", walk(SAMPLED, {"fedavg", "fedhca2"}))
def test_sampled_cohorts_with_stragglers_and_drops(name):
    draw = sampling.partial_work(sampling.dropping(sampling.uniform(2), 0.3), 0.2)
    run = simulate(
        GROUPED[name],
        POPULATION,
        num_rounds=6,
        sampler=sampling.by_group({"first": draw, "second": sampling.uniform(1)}),
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.state))
    assert np.max(run.metrics["participants"]) <= 3 and np.min(run.metrics["participants"]) < 3


@pytest.mark.parametrize("name", WHOLE)
def test_those_that_need_everybody_say_so(name):
    few = sampling.by_group(sampling.uniform(1))(KEY, 0, POPULATION)
    with pytest.raises(ValueError, match="needs all 4 clients in every round, the cohort has 1"):
        GROUPED[name].round(GROUPED[name].init(KEY), few, KEY)


@pytest.mark.parametrize("name", ["fedavg", "ditto", "apfl", "fedem", "fedmtl"])
def test_kept_optimizers(name):
    """Every client's counter of steps goes on, and that of an absent client stands still."""
    algorithm = getattr(algorithms, name)(
        GROUP_MODELS,
        GROUP_TASKS,
        num_clients=GROUP_COUNTS,
        solver=Solver(optax.adam(0.02), batching.epochs(1, 4), keep_optimizer=True),
        execution=VMAP,
    )
    state, one_round = algorithm.init(KEY), jax.jit(algorithm.round)
    for index in range(2):
        state, _ = one_round(state, cohorts_of(FEW), jax.random.fold_in(KEY, index))
    counts = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.clients)
        if "count" in jax.tree_util.keystr(path)
    ]
    assert counts
    for leaf in counts:
        steps = np.asarray(leaf).reshape(leaf.shape[0], -1).max(axis=1)
        gone = 1 if leaf.shape[0] == 4 else 0
        assert steps[gone] == 0 and np.all(np.delete(steps, gone) >= 2)


@pytest.mark.parametrize("name", ["fedavg", "clustered"])
@pytest.mark.parametrize(
    "execution", [make_execution("chunk", 3), make_execution("vmap", num_devices=2)]
)
def test_execution_has_no_influence(name, execution):
    algorithm = make_grouped_algorithms(execution)[name]
    cohorts = cohorts_of()
    reference, _ = compiled(name)[1](compiled(name)[0](KEY), cohorts, KEY)
    ours, _ = jax.jit(algorithm.round)(algorithm.init(KEY), cohorts, KEY)
    assert_trees_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_tuned_clients_are_judged_after_tuning():
    algorithm, state = GROUPED["fedavg_tuned"], compiled("fedavg_tuned")[0](KEY)
    assert algorithm.tuned
    judge = evaluate_clients(algorithm, GROUP_TASKS, VMAP)
    before, after = (
        judge(state, POPULATION),
        judge(algorithm.adapt(state, POPULATION, KEY), POPULATION),
    )
    for group, count in GROUP_COUNTS.items():
        assert after[group]["loss"].shape == (count,)
        assert after[group]["loss"].mean() < before[group]["loss"].mean()


def test_newcomers_join_the_cluster_that_fits_their_group():
    """A newcomer joins the best of the clusters that have a model of its task.

    Clusters that only have clients of the other group have no such model.
    """
    algorithm, state = GROUPED["clustered"], compiled("clustered")[0](KEY)
    members = jnp.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]], bool)
    clusters = state.server[0]._replace(members=members, num_clusters=jnp.int32(3))
    models = jax.tree.map(
        lambda x: x * (1 + jnp.arange(4.0).reshape(-1, *[1] * (x.ndim - 1))),
        state.params["first"],
    )
    params = {**state.params, "first": models}
    state = state._replace(params=params, server=(clusters, *state.server[1:]))
    judge = evaluate_clients(algorithm, GROUP_TASKS, VMAP)
    newcomers = {"first": POPULATION["first"], "second": POPULATION["second"]}
    adapted = algorithm.adapt(state, newcomers, KEY)
    losses = judge(adapted, newcomers)["first"]["loss"]
    options = []
    for leader in (0, 2):
        alike = jax.tree.map(lambda x, i=leader: jnp.repeat(x[i : i + 1], 4, axis=0), models)
        trial = state._replace(params={**params, "first": alike})
        options.append(judge(trial, POPULATION)["first"]["loss"])
    np.testing.assert_allclose(losses, np.min(options, axis=0), rtol=1e-5)
