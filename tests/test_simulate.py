"""Rounds in compiled blocks: stages, infos of any shape, and runs that are taken up again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MODEL, NUM_CLIENTS, PLAN, TASK, VMAP, small_federation

from fedjax_mtl import Solver, algorithms, simulate, simulate_blocks
from fedjax_mtl.simulation import Stage, stage_of

SOLVER = Solver(optax.sgd(0.1, momentum=0.5), PLAN)
AROUND = {"num_clients": NUM_CLIENTS, "solver": SOLVER, "execution": VMAP}


def one_model(previous):
    assert previous is None
    return algorithms.fedavg(MODEL, TASK, **AROUND), None


def three_components(previous):
    """A second stage of another structure: FedEM, whose components all start from one model.

    That model is the one that the first stage learned.
    """
    algorithm = algorithms.fedem(MODEL, TASK, num_components=3, **AROUND)
    keys = jax.vmap(jax.random.key)(jnp.arange(len(jax.tree.leaves(previous.params)[0])))
    fresh = jax.vmap(algorithm.init)(keys)
    noisy = jax.tree.map(lambda old, new: old[:, None] + 0.1 * new, previous.params, fresh.params)
    return algorithm, fresh._replace(params=noisy)


STAGES = [Stage(one_model, 3, "merged"), Stage(three_components, 4, "split")]


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_stage_starts_from_what_the_one_before_learned():
    federation = small_federation()
    blocks = simulate_blocks(STAGES, federation, seeds=(0, 4), eval_every=2)
    seen = [(b.round, b.stage, jax.tree.leaves(b.state.params)[0].ndim) for b in blocks]
    # Blocks end at multiples of eval_every and at the end of a stage.
    assert seen == [(0, 0, 2), (2, 0, 2), (3, 0, 2), (4, 1, 3), (6, 1, 3), (7, 1, 3)]
    whole = simulate(STAGES, federation, seeds=(0, 4), eval_every=2)
    assert whole.metrics["loss"].shape == (2, 7)
    assert np.isfinite(whole.metrics["loss"]).all()
    first = simulate(one_model(None)[0], federation, num_rounds=3, seeds=(0, 4))
    np.testing.assert_array_equal(whole.metrics["loss"][:, :3], first.metrics["loss"])
    algorithm, state = three_components(first.state)
    second = simulate(
        algorithm, federation, num_rounds=7, seeds=(0, 4), state=state, start_round=3, eval_every=2
    )
    assert_equal(whole.state, second.state)


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_run_taken_up_in_any_stage_is_the_uninterrupted_run(stop):
    federation = small_federation()
    whole = simulate(STAGES, federation, eval_every=2)
    kept, boundary = None, None
    for block in simulate_blocks(STAGES, federation, eval_every=2, num_rounds=stop):
        kept = jax.tree.map(jnp.copy, block.state)
        if block.round == 3:
            boundary = kept
    index, _ = stage_of(STAGES, stop)
    taken_up = simulate(
        STAGES,
        federation,
        eval_every=2,
        # At a boundary the next stage begins: it builds its own state from the one before.
        state=None if stop == 3 else kept,
        previous=boundary if index == 1 else None,
        start_round=stop,
    )
    assert_equal(whole.state, taken_up.state)
    np.testing.assert_array_equal(whole.metrics["loss"][:, stop:], taken_up.metrics["loss"])


def test_the_stage_of_a_round():
    assert stage_of(STAGES, 0) == (0, 0)
    assert stage_of(STAGES, 2) == (0, 0)
    assert stage_of(STAGES, 3) == (1, 3)
    assert stage_of(STAGES, 7) == (1, 3)


def test_stages_are_checked():
    federation = small_federation()
    with pytest.raises(ValueError, match="there is no stage"):
        simulate([], federation)
    with pytest.raises(ValueError, match="the stages have 7 rounds together"):
        simulate(STAGES, federation, num_rounds=8)
    with pytest.raises(ValueError, match="hyper-parameters are mapped inside one program"):
        simulate(STAGES, federation, hyperparameters={"x": jnp.ones(2)})
    with pytest.raises(ValueError, match="num_rounds says how many rounds"):
        simulate(algorithms.fedavg(MODEL, TASK, **AROUND), federation)


def reporting(shape, name):
    """FedAvg whose rounds also report an array of this shape."""
    algorithm = algorithms.fedavg(MODEL, TASK, **AROUND)

    def one_round(state, cohort, key):
        state, info = algorithm.round(state, cohort, key)
        return state, info | {name: jnp.full(shape, state.round, jnp.float32)}

    return algorithm._replace(round=one_round)


def test_infos_of_any_shape_are_kept_by_round():
    run = simulate(
        reporting((2, 3), "affinity"), small_federation(), num_rounds=5, seeds=(1, 2), eval_every=2
    )
    assert run.metrics["affinity"].shape == (2, 5, 2, 3)
    np.testing.assert_array_equal(run.metrics["affinity"][0, :, 0, 0], [1, 2, 3, 4, 5])


def test_infos_of_stages_stand_side_by_side():
    stages = [
        Stage(lambda _: (reporting((2,), "weights"), None), 2),
        Stage(lambda previous: (reporting((3,), "weights"), previous), 1),
        Stage(lambda previous: (reporting((), "temperature"), previous), 2),
    ]
    run = simulate(stages, small_federation())
    assert run.metrics["weights/stage_0"].shape == (1, 5, 2)
    assert run.metrics["weights/stage_1"].shape == (1, 5, 3)
    np.testing.assert_array_equal(run.metrics["temperature"][0], [np.nan] * 3 + [4, 5])
    assert int(run.state.round[0]) == 5
