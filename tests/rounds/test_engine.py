"""The engine and the one composition: own models in groups, an outside driver, rounds of nobody."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PLAN, TASK, VMAP, assert_trees_close, small_federation

from fedjax_mtl import Group, Model, Solver, federated, local_trainer, models, sampling, server
from fedjax_mtl.core import trees
from fedjax_mtl.rounds import engine
from fedjax_mtl.rounds.sections import make_sections
from fedjax_mtl.rounds.serving import serve_results

SOLVER = Solver(optax.sgd(0.1), PLAN)
KEY = jax.random.key(5)
BASE = models.mlp((4,), 3, (5,))
SIZES = {"a": 3, "b": 2, "c": 1}
TASKS_OF = {"a": ("x",), "b": ("x", "y"), "c": ("y",)}


def with_decoders(names):
    """The small model with a decoder for each of these tasks.

    The output is that of the first decoder.
    """

    def init(key):
        params = BASE.init(key)
        decoders = {
            name: BASE.init(jax.random.fold_in(key, ord(name)))["decoder"] for name in names
        }
        return {"encoder": params["encoder"], "decoders": decoders}

    def apply(params, inputs, key=None):
        outputs = [
            BASE.apply({"encoder": params["encoder"], "decoder": params["decoders"][name]}, inputs)
            for name in names
        ]
        return sum(outputs[1:], outputs[0])

    return Model(init, apply)


def groups(**trainer):
    return {
        name: Group(
            with_decoders(TASKS_OF[name]).init,
            local_trainer(with_decoders(TASKS_OF[name]), TASK, SOLVER, **trainer),
            SIZES[name],
        )
        for name in SIZES
    }


def population():
    whole, starts = small_federation(), {"a": 0, "b": 3, "c": 5}
    return {n: whole.take(jnp.arange(starts[n], starts[n] + SIZES[n])) for n in SIZES}


def cohorts(ids=None, present=None):
    data = population()
    ids = {n: jnp.arange(SIZES[n], dtype=jnp.int32) for n in SIZES} | (ids or {})
    return sampling.by_group({n: _fixed(ids[n], (present or {}).get(n)) for n in SIZES})(
        KEY, jnp.int32(0), data
    )


def _fixed(ids, present):
    return lambda key, index, federation: sampling.make_cohort(federation, ids, present)


def test_sections_are_what_all_have_and_what_some_own():
    templates = {n: jax.eval_shape(with_decoders(TASKS_OF[n]).init, KEY) for n in SIZES}
    travels = dict.fromkeys(SIZES, trees.everything)
    common, ab, bc = make_sections(templates, travels)
    assert (common.name, ab.name, bc.name) == ("", "a+b", "b+c")
    assert (common.number, ab.number, bc.number) == (0, 1, 2)
    assert ab.members == ("a", "b") and common.members == ("a", "b", "c")
    assert {path[:2] for path in bc.shapes} == {("decoders", "y")}
    meeting = make_sections(templates, travels, trees.under("decoders"))
    assert len(meeting) == 1 and len(meeting[0].shapes) == len(common.shapes) + 2 * len(bc.shapes)


def test_own_models_of_groups_are_averaged_by_hand():
    """Full averaging of own models equals the means by hand.

    The encoder's mean is over everybody, and each decoder's mean is over its owners.
    """
    everybody = server.mix_models(
        lambda m: jnp.broadcast_to(m.present / jnp.sum(m.present), (len(m.present),) * 2)
    )
    algorithm = federated(
        groups(), optax.chain(everybody, optax.sgd(1.0)), models="own", execution=VMAP
    )
    state = algorithm.init(KEY)
    alone = federated(groups(), optax.sgd(1.0), models="own", execution=VMAP)
    trained, _ = jax.jit(alone.round)(state, cohorts(), KEY)
    mixed, _ = jax.jit(algorithm.round)(state, cohorts(), KEY)

    def mean(members, *path):
        rows = [trees.leaves_by_path(trained.params[n])[path] for n in members]
        return np.concatenate(rows).mean(axis=0)

    for start, members in (
        (("encoder",), "abc"),
        (("decoders", "x"), "ab"),
        (("decoders", "y"), "bc"),
    ):
        for path in trees.leaves_by_path(trained.params["b"]):
            if path[: len(start)] != start:
                continue
            expected = mean(members, *path)
            for name in members:
                own = trees.leaves_by_path(mixed.params[name])[path]
                np.testing.assert_allclose(
                    own, np.broadcast_to(expected, own.shape), rtol=1e-5, atol=1e-7
                )


def test_own_models_of_absent_clients_stay_and_count_for_nobody():
    algorithm = federated(
        groups(), optax.chain(server.mean_of_others(), optax.sgd(1.0)), models="own", execution=VMAP
    )
    state = algorithm.init(KEY)
    state, _ = jax.jit(algorithm.round)(state, cohorts(), KEY)
    some = cohorts({"a": jnp.array([2, 0], jnp.int32)})
    holes = cohorts(present={"a": jnp.array([True, False, True])})
    first, second = (jax.jit(algorithm.round)(state, c, KEY)[0] for c in (some, holes))
    assert_trees_close(first.params, second.params, rtol=1e-5, atol=1e-6)
    for before, after in zip(
        jax.tree.leaves(state.params["a"]), jax.tree.leaves(first.params["a"]), strict=True
    ):
        np.testing.assert_array_equal(before[1], after[1])


def test_leaves_that_meet_are_zero_where_nobody_owns_them():
    seen = {}

    def look(updates, state, params=None, *, owned, population_params, **extra):
        seen.update(updates=updates, owned=owned, params=params, population=population_params)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), look)
    algorithm = federated(
        groups(),
        optax.chain(spy, optax.sgd(1.0)),
        models="own",
        meeting=trees.under("decoders"),
        execution=VMAP,
    )
    state = algorithm.init(KEY)
    new, _ = algorithm.round(state, cohorts(), KEY)
    assert [leaf.shape[0] for leaf in jax.tree.leaves(seen["updates"])] == [6] * 6
    x_owners = jax.tree.leaves(seen["owned"]["decoders"]["x"])[0]
    np.testing.assert_array_equal(x_owners, [1, 1, 1, 1, 1, 0])
    for leaf in jax.tree.leaves(seen["updates"]["decoders"]["y"]):
        np.testing.assert_array_equal(leaf[:3], 0)
        assert np.abs(leaf[3:]).max() > 0
    alone = federated(groups(), optax.sgd(1.0), models="own", execution=VMAP)
    expected, _ = jax.jit(alone.round)(alone.init(KEY), cohorts(), KEY)
    assert_trees_close(new.params, expected.params)


def test_the_average_of_groups_is_summed_as_it_comes():
    """The fused average of groups equals the one that holds every client's update."""
    held = optax.chain(server.clip_clients(1e9), server.step_from(optax.adam(0.1)))
    fused = federated(groups(), server.step_from(optax.adam(0.1)), execution=VMAP)
    apart = federated(groups(), held, owners_server=held, execution=VMAP)
    assert fused.parts.summed and not apart.parts.summed
    owners = federated(
        groups(),
        server.step_from(optax.adam(0.1)),
        owners_server=server.step_from(optax.adam(0.1)),
        execution=VMAP,
    )
    cohort = cohorts(present={"b": jnp.array([False, True])})
    state, other = owners.init(KEY), apart.init(KEY)
    for index in range(2):
        state, info = jax.jit(owners.round)(state, cohort, jax.random.fold_in(KEY, index))
        other, same = jax.jit(apart.round)(other, cohort, jax.random.fold_in(KEY, index))
    assert_trees_close(state.params, other.params, rtol=1e-4, atol=1e-5)
    assert_trees_close(info, same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_another_driver_can_collect_the_results(kind):
    """Clients that run one by one outside, and then the server's half, make the same round."""
    from helpers import MODEL

    client = local_trainer(MODEL, TASK, SOLVER)
    chain = {
        "shared": optax.chain(server.project_conflicts(), server.step_from(optax.adam(0.1))),
        "own": optax.chain(server.mean_of_others(), optax.sgd(1.0)),
    }[kind]
    algorithm = federated(Group(MODEL.init, client, 6), chain, models=kind, execution=VMAP)
    cohort = sampling.make_cohort(small_federation(), jnp.array([4, 1, 2], jnp.int32))
    state = algorithm.init(KEY)
    parts = algorithm.parts
    assert parts.groups[""].client is client and parts.weighting
    client_half, server_half = jax.random.split(KEY)
    results = []
    for slot in range(3):
        inputs = jax.tree.map(lambda x, i=slot: x[i], engine.cohort_inputs(cohort))
        view = engine.client_view(cohort.federation.examples, inputs, state.round, client_half)
        params, kept = state.params, state.clients
        if kind == "own":
            params = jax.tree.map(lambda x, v=view: x[v.client_id], params)
        kept = jax.tree.map(lambda x, v=view: x[v.client_id], kept)
        key = engine.client_key(client_half, view.client_id)
        results.append(client.update(params, kept, view, key))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *results)
    outside, info = serve_results(parts, state, stacked, cohort, server_half)
    inside, expected = jax.jit(algorithm.round)(state, cohort, KEY)
    assert_trees_close(outside, inside)
    assert_trees_close(info, expected)


def test_a_round_of_nobody_leaves_momentum_alone():
    from helpers import MODEL

    client = local_trainer(MODEL, TASK, SOLVER)
    for chain in (
        server.step_from(optax.adam(0.1)),
        optax.chain(server.clip_clients(1.0), server.step_from(optax.sgd(1.0, momentum=0.9))),
    ):
        algorithm = federated(Group(MODEL.init, client, 6), chain, execution=VMAP)
        cohort = sampling.make_cohort(small_federation(), jnp.arange(6, dtype=jnp.int32))
        state, _ = jax.jit(algorithm.round)(algorithm.init(KEY), cohort, KEY)
        nobody = sampling.make_cohort(
            small_federation(), jnp.arange(6, dtype=jnp.int32), jnp.zeros(6, bool)
        )
        after, info = jax.jit(algorithm.round)(state, nobody, KEY)
        assert_trees_close(after._replace(round=state.round), state, rtol=0, atol=0)
        assert np.isnan(info["loss"]) and info["participants"] == 0 and info["diverged"] == 0


def test_a_client_without_a_step_enters_no_mean():
    """A straggler whose budget is 0 is there, sends nothing, and has no loss to report."""
    from helpers import MODEL

    client = local_trainer(MODEL, TASK, SOLVER)
    algorithm = federated(
        Group(MODEL.init, client, 6), server.step_from(optax.sgd(1.0)), execution=VMAP
    )
    cohort = sampling.make_cohort(small_federation(), jnp.arange(6, dtype=jnp.int32))
    idle = jnp.array([0, 0, 100, 100, 100, 100], jnp.int32)
    state = algorithm.init(KEY)
    _, info = jax.jit(algorithm.round)(state, cohort._replace(budgets=idle), KEY)
    present = jnp.arange(6) >= 2
    without = sampling.make_cohort(small_federation(), jnp.arange(6, dtype=jnp.int32), present)
    _, expected = jax.jit(algorithm.round)(state, without, KEY)
    np.testing.assert_allclose(info["loss"], expected["loss"], rtol=1e-6)
    assert info["diverged"] == 0 and info["participants"] == 6
    _, info = jax.jit(algorithm.round)(state, cohort._replace(budgets=jnp.zeros(6, jnp.int32)), KEY)
    assert np.isnan(info["loss"])


def test_work_is_a_share_of_the_planned_steps():
    from helpers import MODEL

    client = local_trainer(MODEL, TASK, SOLVER)
    algorithm = federated(
        Group(MODEL.init, client, 6), server.step_from(optax.sgd(1.0)), execution=VMAP
    )
    cohort = sampling.make_cohort(small_federation(), jnp.arange(6, dtype=jnp.int32))
    cohort = cohort._replace(work=jnp.array([0.5, 0.5, 0.5, 1.0, 0.26, 0.0]))
    sizes = np.array([5, 9, 3, 7, 4, 8])
    planned = 2 * np.ceil(sizes / 4)
    steps = np.floor(np.asarray(cohort.work) * planned)
    _, info = jax.jit(algorithm.round)(algorithm.init(KEY), cohort, KEY)
    np.testing.assert_allclose(info["num_steps"], np.sum(steps * sizes) / sizes.sum(), rtol=1e-6)


def test_newcomers_of_a_group_start_from_the_mean_of_all_who_have_a_leaf():
    algorithm = federated(
        groups(), optax.chain(server.mean_of_others(), optax.sgd(1.0)), models="own", execution=VMAP
    )
    state, _ = jax.jit(algorithm.round)(algorithm.init(KEY), cohorts(), KEY)
    newcomers = {"b": population()["b"].take(jnp.array([0, 1, 0]))}
    adapted = algorithm.adapt(state, newcomers, KEY)
    x = [trees.leaves_by_path(state.params[n]["decoders"]["x"]) for n in "ab"]
    ours = trees.leaves_by_path(adapted.params["b"]["decoders"]["x"])
    for path, leaf in ours.items():
        mean = np.concatenate([own[path] for own in x]).mean(axis=0)
        np.testing.assert_allclose(
            leaf, np.broadcast_to(mean, (3, *mean.shape)), rtol=1e-5, atol=1e-7
        )
    assert_trees_close(adapted.params["a"], state.params["a"], rtol=0, atol=0)
    outputs = algorithm.predict(adapted, {"b": jnp.array([2])}, {"b": jnp.ones((1, 5, 4))})
    assert outputs["b"].shape == (1, 5, 3)


def test_traffic_of_groups_is_the_mean_over_clients():
    shared = federated(groups(), server.step_from(optax.sgd(1.0)), execution=VMAP)
    own = federated(groups(), optax.sgd(1.0), models="own", execution=VMAP)
    sizes = {
        n: sum(
            x.size for x in jax.tree.leaves(jax.eval_shape(with_decoders(TASKS_OF[n]).init, KEY))
        )
        for n in SIZES
    }
    expected = int(round(sum(4 * sizes[n] * SIZES[n] for n in SIZES) / 6))
    for algorithm in (shared, own):
        assert algorithm.traffic(jax.eval_shape(algorithm.init, KEY)) == (expected, expected)


def test_refusals():
    with pytest.raises(ValueError, match="unknown models 'mine'"):
        federated(groups(), optax.sgd(1.0), models="mine")
    with pytest.raises(ValueError, match="groups is empty"):
        federated({}, optax.sgd(1.0))
    with pytest.raises(ValueError, match="'p\\+q' is empty or contains"):
        federated({"p+q": groups()["a"]}, optax.sgd(1.0))
    algorithm = federated(groups(), server.step_from(optax.sgd(1.0)), execution=VMAP)
    with pytest.raises(ValueError, match="the cohorts are of groups"):
        algorithm.round(algorithm.init(KEY), {"a": cohorts()["a"]}, KEY)
