"""What every algorithm promises, checked by walking all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ALGORITHMS,
    MODEL,
    NUM_CLIENTS,
    PLAN,
    SIZES,
    SOLVER,
    TASK,
    VMAP,
    assert_trees_close,
    make_algorithms,
    poisoned,
    small_federation,
)

from fedjax_mtl import Solver, algorithms, evaluate_clients, make_execution, simulate
from fedjax_mtl.core import sampling
from fedjax_mtl.relations import gossip, graphs

NAMES = sorted(ALGORITHMS)
KEY = jax.random.key(3)


def cohort_of(federation, ids=None, present=None):
    ids = jnp.arange(federation.num_clients, dtype=jnp.int32) if ids is None else jnp.asarray(ids)
    return sampling.make_cohort(federation, ids, present)


@functools.cache
def compiled(name):
    """Init and round of an algorithm, compiled once for all the tests that share their shapes."""
    return jax.jit(ALGORITHMS[name].init), jax.jit(ALGORITHMS[name].round)


def two_rounds(name, cohort, algorithm=None):
    init, one_round = compiled(name)
    if algorithm is not None:
        one_round = jax.jit(algorithm.round)
    state, _ = one_round(init(KEY), cohort, jax.random.fold_in(KEY, 1))
    return one_round(state, cohort, jax.random.fold_in(KEY, 2))


@pytest.fixture(scope="module")
def reference():
    """Two rounds of every algorithm, vmapped."""
    cohort = cohort_of(small_federation())
    return {name: two_rounds(name, cohort) for name in ALGORITHMS}


@pytest.mark.parametrize("name", NAMES)
def test_round_keeps_structure_shapes_and_types(name):
    algorithm, cohort = ALGORITHMS[name], cohort_of(small_federation())
    state = jax.eval_shape(algorithm.init, KEY)
    new, metrics = jax.eval_shape(algorithm.round, state, cohort, KEY)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, new, state)
    assert all(jax.tree.leaves(same))
    assert {"loss", "diverged", "participants"} <= set(metrics)


@pytest.mark.parametrize("name", NAMES)
def test_padding_has_no_influence(name, reference):
    padded = small_federation(capacity=21)
    garbage = padded.indices.at[:, 15:].set(7)  # what the padding points at must not matter
    cohort = cohort_of(padded._replace(indices=garbage))
    assert_trees_close(two_rounds(name, cohort), reference[name])


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_cohort_has_no_influence(name, reference):
    order = jnp.array([4, 2, 0, 5, 1, 3], jnp.int32)
    shuffled = two_rounds(name, cohort_of(small_federation(), order))
    assert_trees_close(shuffled, reference[name], rtol=1e-4, atol=1e-5)


EXECUTIONS = {
    "map": make_execution("map"),
    "chunk of 4": make_execution("chunk", 4),
    "loop": make_execution("loop"),
    "4 devices": make_execution("vmap", num_devices=4),
    "4 devices, chunk of 2": make_execution("chunk", 2, 4),
}


@pytest.mark.parametrize("execution", sorted(EXECUTIONS))
@pytest.mark.parametrize(
    "name", ["fedem", "fedavg", "apfl", "clustered", "decentralized_fedem", "local"]
)
def test_execution_has_no_influence(name, execution, reference):
    algorithm = make_algorithms(EXECUTIONS[execution])[name]
    result = two_rounds(name, cohort_of(small_federation()), algorithm)
    assert_trees_close(result, reference[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_finite_and_learning(name):
    init, one_round = compiled(name)
    cohort, state, losses = cohort_of(small_federation()), init(KEY), []
    for index in range(12):
        state, metrics = one_round(state, cohort, jax.random.fold_in(KEY, index))
        losses.append(float(metrics["loss"]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert np.mean(losses[-3:]) < np.mean(losses[:2])


WHOLE = ("clustered", "decentralized_fedem", "fedmtl", "l2sgd", "pfedme_released")
PARTIAL = [name for name in NAMES if name not in WHOLE]


@pytest.mark.parametrize("name", PARTIAL)
def test_absent_clients_have_no_influence_and_keep_their_state(name):
    """A cohort with two absent slots equals the cohort without them.

    What absent clients keep stays as it was.
    """
    federation = small_federation()
    some = two_rounds(name, cohort_of(federation, jnp.array([0, 2, 3, 5], jnp.int32)))
    present = jnp.array([True, False, True, True, False, True])
    holes = two_rounds(name, cohort_of(federation, present=present))
    assert_trees_close(holes, some, rtol=1e-4, atol=1e-5)
    untouched = jax.tree.map(lambda x: x[jnp.array([1, 4])], compiled(name)[0](KEY).clients)
    assert_trees_close(jax.tree.map(lambda x: x[jnp.array([1, 4])], holes[0].clients), untouched)


@pytest.mark.parametrize("name", WHOLE)
def test_those_that_need_everybody_say_so(name):
    cohort = cohort_of(small_federation(), jnp.array([0, 2], jnp.int32))
    with pytest.raises(
        ValueError,
        match="needs all 6 clients in every round, the cohort has 2; use full participation",
    ):
        ALGORITHMS[name].round(ALGORITHMS[name].init(KEY), cohort, KEY)


def test_absent_clients_are_not_split_away():
    """A cluster is split only by updates of all its members, and absent clients follow it."""
    present = jnp.array([True, False, True, True, False, True])
    state, _ = two_rounds("clustered", cohort_of(small_federation(), present=present))
    assert int(state.server[0].num_clusters) == 1
    for leaf in jax.tree.leaves(state.params):
        np.testing.assert_allclose(
            leaf, jnp.broadcast_to(leaf[:1], leaf.shape), rtol=1e-5, atol=1e-6
        )


def test_an_algorithm_for_other_clients_is_refused():
    few = make_algorithms(num_clients=4)["fedem"]
    with pytest.raises(ValueError, match="made for 4 clients but the federation has 6"):
        simulate(few, small_federation(), num_rounds=1)


def test_judging_other_clients_is_refused():
    state = ALGORITHMS["local"].init(KEY)
    judge = evaluate_clients(ALGORITHMS["local"], TASK, make_execution("vmap"))
    with pytest.raises(
        ValueError, match="state has 6 clients but the federation to judge has 2; adapt"
    ):
        judge(state, small_federation().take(jnp.array([0, 1])))


@pytest.mark.parametrize("name", NAMES)
def test_a_round_that_nobody_attends_changes_nothing(name):
    """Neither the models nor the server's state change, momentum included.

    The reported means are NaN, because they are means over nobody.
    """
    federation = small_federation()
    init, one_round = compiled(name)
    state, _ = one_round(init(KEY), cohort_of(federation), KEY)
    nobody = cohort_of(federation, present=jnp.zeros(NUM_CLIENTS, bool))
    new, metrics = one_round(state, nobody, KEY)
    assert_trees_close(new._replace(round=state.round), state)
    assert new.round == state.round + 1
    assert np.isnan(metrics["loss"]) and metrics["participants"] == metrics["diverged"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_diverged_client_counts_as_absent(name):
    federation = small_federation()
    others = cohort_of(federation, present=jnp.arange(NUM_CLIENTS) != 2)
    ours, metrics = two_rounds(name, cohort_of(poisoned(federation, 2)))
    theirs, reference = two_rounds(name, others)
    assert metrics["diverged"] == 1 and metrics["participants"] == NUM_CLIENTS - 1
    np.testing.assert_allclose(metrics["loss"], reference["loss"], rtol=1e-4)
    assert_trees_close(ours, theirs, rtol=1e-4, atol=1e-5)


# q-FFL's clients report the loss of the received model, whether they train or not.
TRAINING_LOSS = [name for name in NAMES if name != "q_ffl"]


@pytest.mark.parametrize("name", TRAINING_LOSS)
def test_a_client_that_makes_no_step_enters_no_mean(name):
    federation = small_federation()
    idle = jnp.array([False, True, False, False, True, False])
    cohort = cohort_of(federation)
    init, one_round = compiled(name)
    start, key = init(KEY), jax.random.fold_in(KEY, 1)
    for short in (
        cohort._replace(work=jnp.where(idle, 0.0, 1.0)),
        cohort._replace(budgets=jnp.where(idle, 0, cohort.budgets)),
    ):
        state, metrics = one_round(start, short, key)
        _, others = one_round(start, cohort_of(federation, present=~idle), key)
        assert metrics["participants"] == NUM_CLIENTS and metrics["diverged"] == 0
        np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-5)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    state, metrics = one_round(start, cohort._replace(work=jnp.zeros(NUM_CLIENTS)), key)
    assert np.isnan(metrics["loss"]) and metrics["num_steps"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", NAMES)
def test_predict_and_adapt(name):
    algorithm, federation = ALGORITHMS[name], small_federation()
    state = compiled(name)[0](KEY)
    ids = jnp.array([1, 3])
    inputs = jax.random.normal(KEY, (2, 5, 4))
    outputs = algorithm.predict(state, ids, inputs)
    assert outputs.shape == (2, 5, 3)
    adapted = jax.jit(algorithm.adapt)(state, federation.take(ids), KEY)
    outputs = algorithm.predict(adapted, jnp.arange(2), inputs)
    assert outputs.shape == (2, 5, 3) and np.isfinite(outputs).all()
    up, down = algorithm.traffic(state)
    assert up >= 0 and down >= 0 and (up == 0) == (name == "local")


@pytest.mark.parametrize("name", ["fedem", "clustered"])
def test_one_compilation_for_a_whole_run(name):
    """The round is traced as often for four blocks, the last of them shorter, as for one."""
    traces = []

    def counted(state, cohort, key):
        traces.append(1)
        return ALGORITHMS[name].round(state, cohort, key)

    counting = ALGORITHMS[name]._replace(round=counted)
    simulate(counting, small_federation(), num_rounds=2, eval_every=2)
    for_one_block = len(traces)
    traces.clear()
    run = simulate(counting, small_federation(), num_rounds=7, eval_every=2)
    assert len(traces) == for_one_block
    assert run.metrics["loss"].shape == (1, 7)
    assert np.isfinite(run.metrics["loss"]).all()


def test_seeds_in_one_program_equal_seeds_apart():
    algorithm, federation = ALGORITHMS["fedem"], small_federation()
    together = simulate(algorithm, federation, num_rounds=3, seeds=(0, 5))
    apart = simulate(algorithm, federation, num_rounds=3, seeds=(5,))
    assert_trees_close(
        jax.tree.map(lambda x: x[1:], together.state), apart.state, rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(together.metrics["loss"][0], together.metrics["loss"][1])


def test_hyperparameters_are_mapped():
    def make(learning_rate):
        return algorithms.fedavg(
            MODEL,
            TASK,
            num_clients=NUM_CLIENTS,
            solver=Solver(optax.sgd(learning_rate), PLAN),
            execution=VMAP,
        )

    federation = small_federation()
    rates = jnp.array([0.01, 0.2])
    both = simulate(
        make, federation, num_rounds=3, seeds=(0, 1), hyperparameters={"learning_rate": rates}
    )
    assert both.metrics["loss"].shape == (2, 2, 3)
    for index, rate in enumerate((0.01, 0.2)):
        alone = simulate(make(rate), federation, num_rounds=3, seeds=(0, 1))
        ours = jax.tree.map(lambda x, i=index: x[i], both.state)
        assert_trees_close(ours, alone.state, rtol=1e-4, atol=1e-5)


def mapped_factories():
    """Factories of one hyper-parameter.

    Among them are those whose checks cannot see a mapped value.
    """
    around = {"model": MODEL, "task": TASK, "num_clients": NUM_CLIENTS, "execution": VMAP}
    training = {**around, "solver": SOLVER}
    ring = jnp.asarray(gossip.metropolis_weights(gossip.ring(NUM_CLIENTS)))
    mixture = np.full(NUM_CLIENTS, 1 / NUM_CLIENTS)
    complete = graphs.fixed(graphs.complete_weights(NUM_CLIENTS))
    return {
        "apfl": lambda x: algorithms.apfl(**training, alpha=x),
        "l2sgd": lambda x: algorithms.l2sgd(
            **around, learning_rate=0.1, penalty=0.1, probability=x
        ),
        "fedu": lambda x: algorithms.fedu(**training, graph=complete, strength=x / NUM_CLIENTS),
        "agnostic": lambda x: algorithms.agnostic(
            **around, mixture=mixture, optimizer=optax.sgd(x)
        ),
        "decentralized_fedem": lambda x: algorithms.decentralized_fedem(
            **around,
            solver=Solver(optax.sgd(x), PLAN),
            mixing_matrix=ring,
            num_components=2,
        ),
    }


@pytest.mark.parametrize("name", ["agnostic", "apfl", "decentralized_fedem", "fedu", "l2sgd"])
def test_mapped_hyperparameters_pass_the_checks(name):
    run = simulate(
        mapped_factories()[name],
        small_federation(),
        num_rounds=2,
        hyperparameters={"x": jnp.array([0.2, 0.6])},
    )
    assert run.metrics["loss"].shape == (2, 1, 2)
    assert np.isfinite(run.metrics["loss"]).all()
    assert not np.allclose(run.metrics["loss"][0], run.metrics["loss"][1])


def test_a_run_taken_up_again_is_the_same_to_the_bit():
    algorithm, federation = ALGORITHMS["fedem"], small_federation()
    whole = simulate(algorithm, federation, num_rounds=6, eval_every=2)
    half = simulate(algorithm, federation, num_rounds=4, eval_every=2)
    rest = simulate(
        algorithm, federation, num_rounds=6, eval_every=2, state=half.state, start_round=4
    )
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(rest.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert rest.rounds == [6]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(half.state))  # not donated away


def test_stragglers_make_fewer_steps():
    federation = small_federation()
    half = sampling.straggling(
        sampling.full_participation(), lambda key, cohort: jnp.where(cohort.client_ids < 3, 1, 100)
    )
    cohort = half(KEY, jnp.int32(0), federation)
    np.testing.assert_array_equal(cohort.budgets, [1, 1, 1, 100, 100, 100])
    init, one_round = compiled("fedavg")
    _, metrics = one_round(init(KEY), cohort, KEY)
    steps = np.minimum(2 * np.ceil(np.array(SIZES) / 4), cohort.budgets)
    np.testing.assert_allclose(
        metrics["num_steps"], np.sum(steps * SIZES) / np.sum(SIZES), rtol=1e-6
    )


def test_stragglers_do_a_share_of_their_own_work():
    """Budgets are shares of the planned steps, whatever the batch size is."""
    federation = small_federation()
    cohort = sampling.partial_work(sampling.full_participation(), 0.3, 0.8)(
        KEY, jnp.int32(0), federation
    )
    assert ((cohort.work >= 0.3) & (cohort.work <= 0.8)).all() and np.ptp(cohort.work) > 0.1
    init, one_round = compiled("fedavg")
    _, metrics = one_round(init(KEY), cohort, KEY)
    steps = np.floor(np.array(cohort.work) * 2 * np.ceil(np.array(SIZES) / 4))
    np.testing.assert_allclose(
        metrics["num_steps"], np.sum(steps * SIZES) / np.sum(SIZES), rtol=1e-6
    )
