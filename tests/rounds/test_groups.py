"""Groups of clients with different tasks around one server."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close

from fedjax_mtl import (
    Group,
    Solver,
    algorithms,
    client_offsets,
    evaluate_clients,
    heterogeneous,
    local_trainer,
    make_execution,
    make_federation,
    models,
    relational,
    server,
    simulate,
    tasks,
)
from fedjax_mtl.core import batching, sampling, trees
from fedjax_mtl.rounds.engine import client_key, client_view, cohort_inputs

KEY = jax.random.key(0)
VMAP = make_execution("vmap")
PLAN = batching.epochs(1, 4)
DECODERS = trees.under("decoders")


def two_part_model(task, outputs):
    """A linear encoder of 3 features and a linear decoder of its own for each task."""

    def init(key):
        first, second = jax.random.split(key)
        return {
            "encoder": {"w": jax.random.normal(first, (4, 3))},
            "decoders": {task: {"w": jax.random.normal(second, (3, outputs))}},
        }

    def apply(params, inputs, key=None):
        del key
        return jnp.tanh(inputs @ params["encoder"]["w"]) @ params["decoders"][task]["w"]

    return models.Model(init, apply)


def group(task, outputs, num_clients, learner=None, **trainer):
    model = two_part_model(task, outputs)
    solver = Solver(optax.sgd(0.1), PLAN)
    client = local_trainer(model, learner or tasks.classification(), solver, **trainer)
    return Group(model.init, client, num_clients)


def federation(num_clients, outputs, seed, size=6):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(num_clients * size, 4)).astype(np.float32)
    labels = np.argmax(inputs[:, :outputs], axis=1).astype(np.int32)
    rows = list(np.arange(num_clients * size).reshape(num_clients, size))
    return make_federation({"inputs": inputs, "labels": labels}, rows)


def cohorts_of(population):
    return sampling.by_group(sampling.full_participation())(KEY, 0, population)


POPULATION = {"a": federation(2, 3, 0), "b": federation(3, 2, 1, size=4)}
PERSONAL = {
    "a": group("first", 3, 2, personal=DECODERS),
    "b": group("second", 2, 3, personal=DECODERS),
}


def make(groups=None, chain=None, **settings):
    return heterogeneous(
        groups or PERSONAL, chain or server.step_from(optax.sgd(1.0)), execution=VMAP, **settings
    )


def test_groups_of_one_task_are_one_federation():
    """The same clients in one federation and in two groups make the same round.

    Decoders are averaged or personal.
    """
    whole = federation(5, 3, 2)
    parts = {"a": whole.take(jnp.array([0, 1])), "b": whole.take(jnp.array([2, 3, 4]))}
    model = two_part_model("first", 3)
    for personal in (trees.nothing, DECODERS):
        # Full batches, so that keys do not matter.
        solver = Solver(optax.sgd(0.1), batching.steps(2, None))
        client = local_trainer(model, tasks.classification(), solver, personal=personal)
        groups = {name: Group(model.init, client, n) for name, n in (("a", 2), ("b", 3))}
        apart = make(groups)
        together = algorithms.fedavg(
            model,
            tasks.classification(),
            num_clients=5,
            solver=solver,
            personal=personal,
            execution=VMAP,
        )
        theirs = together.init(KEY)
        ours = apart.init(KEY)
        travelling = {name: theirs.params[name] for name in ours.params}
        ours = ours._replace(params=travelling)
        ours = ours._replace(
            clients={
                "a": jax.tree.map(lambda x: x[:2], theirs.clients),
                "b": jax.tree.map(lambda x: x[2:], theirs.clients),
            }
        )
        ours, metrics = apart.round(ours, cohorts_of(parts), KEY)
        cohort = sampling.make_cohort(whole, jnp.arange(5))
        theirs, reference = together.round(theirs, cohort, KEY)
        assert_trees_close(ours.params, {name: theirs.params[name] for name in travelling})
        joined = jax.tree.map(lambda *x: jnp.concatenate(x), ours.clients["a"], ours.clients["b"])
        assert_trees_close(joined, theirs.clients)
        np.testing.assert_allclose(metrics["loss"], reference["loss"], rtol=1e-5)


def test_nobody_holds_a_decoder_that_it_does_not_train():
    state = make().init(KEY)
    assert set(state.clients["a"].personal["decoders"]) == {"first"}
    assert set(state.clients["b"].personal["decoders"]) == {"second"}
    assert set(state.params) == {"encoder"}
    assert {name: set(own["decoders"]) for name, own in state.personal.items()} == {
        "a": {"first"},
        "b": {"second"},
    }
    assert not state.owners
    same = two_part_model("first", 3).init(KEY)["encoder"]["w"]
    np.testing.assert_array_equal(state.params["encoder"]["w"], same)


def test_decoders_of_owners_are_averaged_among_them():
    """Of three groups two own the task ``first``, whose decoder is the mean of their clients."""
    groups = {"a": group("first", 3, 2), "b": group("second", 2, 3), "c": group("first", 3, 1)}
    population = {**POPULATION, "c": federation(1, 3, 5)}
    algorithm = make(groups, weighting="uniform")
    state = algorithm.init(KEY)
    assert set(state.owners) == {"a+c", "b"}
    new, _ = jax.jit(algorithm.round)(state, cohorts_of(population), KEY)
    # The same two groups alone give the same decoder, whatever b does.
    alone = make({name: groups[name] for name in ("a", "c")}, weighting="uniform")
    reduced = {"a": population["a"], "c": population["c"]}
    params = {
        "encoder": state.params["encoder"],
        "decoders": {"first": state.params["decoders"]["first"]},
    }
    with_key = alone.init(KEY)._replace(params=params)
    # Keys differ by the groups' places: full-batch training would not care, these epochs do, so
    # compare the rule.
    results = []
    for client_state, (name, index) in zip((with_key,) * 2, (("a", 0), ("c", 2)), strict=True):
        own = groups[name].client
        train_key = jax.random.fold_in(jax.random.split(KEY)[0], index)
        for client in range(groups[name].num_clients):
            inputs = jax.tree.map(
                lambda x, c=client: x[c], cohort_inputs(cohorts_of(reduced)[name])
            )
            me = client_view(reduced[name].examples, inputs, jnp.int32(0), train_key)
            start = own.init(client_state.params)
            results.append(
                own.update(
                    params, start, me, client_key(train_key, jnp.int32(client))
                ).pseudo_gradient
            )
    mean = np.mean([r["decoders"]["first"]["w"] for r in results], axis=0)
    np.testing.assert_allclose(
        new.params["decoders"]["first"]["w"],
        params["decoders"]["first"]["w"] - mean,
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "mode",
    [make_execution("map"), make_execution("chunk", 2), make_execution("vmap", num_devices=2)],
)
def test_execution_has_no_influence(mode):
    reference, _ = make().round(make().init(KEY), cohorts_of(POPULATION), KEY)
    other = heterogeneous(PERSONAL, server.step_from(optax.sgd(1.0)), execution=mode)
    ours, _ = jax.jit(other.round)(other.init(KEY), cohorts_of(POPULATION), KEY)
    assert_trees_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_a_client_without_data_this_round_and_a_diverged_one():
    algorithm = make()
    state = algorithm.init(KEY)
    cohorts = cohorts_of(POPULATION)
    present = jnp.array([True, False, True])
    few = {"a": cohorts["a"], "b": sampling.make_cohort(POPULATION["b"], jnp.arange(3), present)}
    total = 24
    few["b"] = few["b"]._replace(shares=jnp.where(present, 4 / total, 0))
    absent, metrics = algorithm.round(state, few, KEY)
    assert metrics["diverged"] == 0
    untouched = jax.tree.map(lambda x: x[1], state.clients["b"])
    assert_trees_close(jax.tree.map(lambda x: x[1], absent.clients["b"]), untouched)
    broken = jax.tree.map(lambda x: x.at[1].set(jnp.nan), state.clients["b"])
    diverged, metrics = algorithm.round(
        state._replace(clients=state.clients | {"b": broken}), cohorts, KEY
    )
    assert metrics["diverged"] == 1
    assert all(np.isfinite(m) for m in metrics.values())
    assert_trees_close(diverged.params, absent.params, rtol=1e-4, atol=1e-5)


def test_nobody_comes():
    algorithm = make()
    state = algorithm.init(KEY)
    nobody = {
        name: sampling.make_cohort(f, jnp.arange(f.num_clients), jnp.zeros(f.num_clients, bool))
        for name, f in POPULATION.items()
    }
    new, metrics = algorithm.round(state, nobody, KEY)
    assert_trees_close(new._replace(round=state.round), state)
    assert metrics["participants"] == metrics["diverged"] == 0
    # The mean over nobody is no number.
    assert np.isnan([metrics[name] for name in ("loss", "loss/a", "num_steps")]).all()


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_sampled_groups_with_stragglers_failures_and_kept_optimisers(kind):
    """A sampled client keeps its momentum, and one that was not sampled keeps all that it had."""
    solver = Solver(optax.sgd(0.1, momentum=0.9), PLAN, keep_optimizer=True)
    groups = {
        name: Group(
            two_part_model(task, outputs).init,
            local_trainer(two_part_model(task, outputs), tasks.classification(), solver),
            count,
        )
        for name, task, outputs, count in (("a", "first", 3, 2), ("b", "second", 2, 3))
    }
    if kind == "shared":
        algorithm = make(groups)
    else:
        chain = optax.chain(server.mean_of_others(), optax.sgd(1.0))
        algorithm = relational(groups, chain, execution=VMAP)
    uneven = sampling.dropping(sampling.partial_work(sampling.uniform(2), 0.5), 0.3)
    run = simulate(algorithm, POPULATION, num_rounds=6, sampler=sampling.by_group(uneven))
    state = jax.tree.map(lambda x: x[0], run.state)
    assert state.round == 6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert run.metrics["participants"].min() < 4 and run.metrics["participants"].max() <= 4
    cohorts = cohorts_of(POPULATION) | {
        "b": sampling.make_cohort(POPULATION["b"], jnp.array([2, 0], jnp.int32))
    }
    new, _ = algorithm.round(state, cohorts, KEY)
    for old, kept in zip(
        jax.tree.leaves(state.clients["b"].optimizer),
        jax.tree.leaves(new.clients["b"].optimizer),
        strict=True,
    ):
        np.testing.assert_array_equal(old[1], kept[1])
        assert not np.allclose(old[0], kept[0])


def test_a_server_that_knows_its_clients_is_made_for_the_owners():
    """The server is told the owners of a leaf by their numbers in the whole population."""
    groups = {"a": group("first", 3, 2), "b": group("second", 2, 3), "c": group("first", 3, 1)}
    owners = []

    def owners_server(clients):
        owners.append(clients.tolist())
        return optax.chain(server.mean_of_others(), optax.sgd(1.0))

    chain = optax.chain(server.mean_of_others(), optax.sgd(1.0))
    relational(groups, chain, owners_server=owners_server)
    assert sorted(owners) == [[0, 1, 5], [2, 3, 4]]


def test_server_chain_over_all_groups_learns_and_is_judged_by_group():
    chain = optax.chain(
        server.normalize_gradients(5, learning_rate=0.01),
        server.project_conflicts(),
        server.step_from(optax.adam(0.05)),
    )
    algorithm = make(chain=chain)
    judge = evaluate_clients(
        algorithm, {"a": tasks.classification(), "b": tasks.classification()}, VMAP
    )
    run = simulate(
        algorithm,
        POPULATION,
        num_rounds=15,
        seeds=(0, 1),
        evaluate=lambda _, state, population, key: judge(state, population),
        evaluation_data=POPULATION,
        eval_every=15,
        sampler=sampling.by_group({"a": sampling.full_participation(), "b": sampling.uniform(2)}),
    )
    first, last = run.evaluations[0], run.evaluations[-1]
    assert last["a"]["accuracy"].shape == (2, 2) and last["b"]["accuracy"].shape == (2, 3)
    for name in ("a", "b"):
        assert last[name]["loss"].mean() < first[name]["loss"].mean()
    assert run.metrics["loss/b"].shape == (2, 15)
    assert client_offsets({"b": 3, "a": 2}) == {"a": 0, "b": 2}


def test_adapted_newcomers_are_served():
    groups = {
        n: group(t, o, c, personal=DECODERS, adaptation=batching.epochs(3, 4))
        for n, t, o, c in (("a", "first", 3, 2), ("b", "second", 2, 3))
    }
    algorithm = make(groups)
    state = algorithm.init(KEY)
    newcomers = {"a": federation(4, 3, 9)}
    adapted = algorithm.adapt(state, newcomers, KEY)
    judge = evaluate_clients(algorithm, {"a": tasks.classification()}, VMAP)
    before = judge(
        make(groups).adapt(state._replace(clients=state.clients), {}, KEY), {"a": POPULATION["a"]}
    )
    after = judge(adapted, newcomers)
    assert after["a"]["loss"].shape == (4,)
    assert after["a"]["loss"].mean() < before["a"]["loss"].mean()


def test_personal_leaves_of_one_name_may_differ_in_shape():
    """Two domains whose decoders of one task have different outputs share the encoder."""
    groups = {
        "a": group("first", 3, 2, personal=DECODERS),
        "b": group("first", 2, 3, personal=DECODERS),
    }
    algorithm = make(groups)
    state, _ = algorithm.round(algorithm.init(KEY), cohorts_of(POPULATION), KEY)
    assert state.clients["a"].personal["decoders"]["first"]["w"].shape == (2, 3, 3)
    assert state.clients["b"].personal["decoders"]["first"]["w"].shape == (3, 3, 2)


def test_servers_of_different_parts_draw_their_own_noise():
    groups = {"a": group("first", 3, 2), "b": group("second", 3, 3)}
    noisy = optax.chain(server.private_average(1e-6, 1e6), optax.sgd(1.0))
    algorithm = make(groups, noisy, owners_server=noisy)
    state = algorithm.init(KEY)
    new, _ = algorithm.round(state, cohorts_of(POPULATION), KEY)
    moved = optax.tree.sub(new.params, state.params)["decoders"]
    # Cohorts of 2 and 3 divide the same noise by different numbers; the noise itself must differ.
    assert not np.allclose(2 * moved["first"]["w"], 3 * moved["second"]["w"], rtol=1e-2)


def test_bad_groups():
    with pytest.raises(ValueError, match="groups is empty"):
        heterogeneous({}, server.average_clients())
    with pytest.raises(
        ValueError, match="group 'a' has 0 clients; a task without clients cannot be learned"
    ):
        make({"a": group("first", 3, 0)})
    with pytest.raises(
        ValueError, match=r"decoders/first/w is \(3, 3\) in group 'a' but \(3, 2\) in group 'b'"
    ):
        make({"a": group("first", 3, 1), "b": group("first", 2, 1)})
    with pytest.raises(ValueError, match="contains '\\+'"):
        make({"a+b": group("first", 3, 1)})
    with pytest.raises(
        ValueError, match=r"cohorts are of groups \['a'\], the algorithm is for \['a', 'b'\]"
    ):
        make().round(make().init(KEY), {"a": cohorts_of(POPULATION)["a"]}, KEY)
    with pytest.raises(ValueError, match="group 'b' has no task to be judged on"):
        evaluate_clients(make(), {"a": tasks.classification()}, VMAP)(make().init(KEY), POPULATION)
    with pytest.raises(ValueError, match="group 'b' has no sampler"):
        sampling.by_group({"a": sampling.full_participation()})(KEY, 0, POPULATION)
    with pytest.raises(
        ValueError, match="made for {'a': 2, 'b': 3} clients but the federation has {'a': 2"
    ):
        simulate(make(), {"a": POPULATION["a"], "b": federation(1, 2, 0)}, num_rounds=1)
