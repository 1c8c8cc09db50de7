"""What rounds count and report.

Rounds done, participants, and losses of all clients and of groups.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl import (
    ClientResult,
    ClientUpdate,
    Group,
    Solver,
    federated,
    local_trainer,
    make_execution,
    make_federation,
    models,
    server,
    tasks,
)
from fedjax_mtl.core import batching, sampling, trees

KEY = jax.random.key(0)
OUTPUTS = {"a": 2, "b": 3}
SIZES = {"a": (6, 3), "b": (4, 2, 5)}
STEPS = 2


RNG = np.random.default_rng(0)
ENCODER = RNG.normal(size=(4, 3)).astype(np.float32)
DECODERS = {name: RNG.normal(size=(3, count)).astype(np.float32) for name, count in OUTPUTS.items()}


def model_of(name):
    """A linear encoder that all groups have, and a decoder for the group.

    Both start as told.
    """

    def init(key):
        del key
        return {"encoder": {"w": jnp.asarray(ENCODER)}, name: {"w": jnp.asarray(DECODERS[name])}}

    def apply(params, inputs, key=None):
        del key
        return inputs @ params["encoder"]["w"] @ params[name]["w"]

    return models.Model(init, apply)


def group(name):
    """A group that trains on full batches, so that keys do not matter."""
    model, task = model_of(name), tasks.regression()
    solver = Solver(optax.sgd(0.01), batching.steps(STEPS, None))
    client = local_trainer(model, task, solver, personal=trees.under(name))
    return Group(model.init, client, len(SIZES[name]))


def compose():
    """An algorithm over both groups."""
    groups = {name: group(name) for name in SIZES}
    chain = server.step_from(optax.sgd(1.0))
    return federated(groups, chain, execution=make_execution("vmap"))


def federation(name):
    total = sum(SIZES[name])
    examples = {
        "inputs": RNG.normal(size=(total, 4)).astype(np.float32),
        "labels": RNG.normal(size=(total, OUTPUTS[name])).astype(np.float32),
    }
    return make_federation(examples, np.split(np.arange(total), np.cumsum(SIZES[name])[:-1]))


POPULATION = {name: federation(name) for name in SIZES}


def cohorts(present):
    """A cohort of each group in which some are absent."""
    made = sampling.by_group(sampling.full_participation())(KEY, 0, POPULATION)
    for name, own in made.items():
        there = jnp.asarray(present[name])
        kept = own.federation._replace(sizes=jnp.where(there, own.federation.sizes, 0))
        shares = jnp.where(there, own.shares, 0)
        made[name] = own._replace(federation=kept, present=there, shares=shares)
    return made


def losses_of(name):
    """Each client's mean loss over its local steps, by gradient descent in numpy."""
    data, values = POPULATION[name], []
    for rows, size in zip(data.indices, SIZES[name], strict=True):
        x, y = (np.asarray(data.examples[part])[rows[:size]] for part in ("inputs", "labels"))
        encoder, decoder, seen = ENCODER, DECODERS[name], []
        for _ in range(STEPS):
            error = x @ encoder @ decoder - y
            seen.append(np.square(error).sum(axis=1).mean() / 2)
            slopes = x.T @ error @ decoder.T / size, (x @ encoder).T @ error / size
            encoder, decoder = encoder - 0.01 * slopes[0], decoder - 0.01 * slopes[1]
        values.append(np.mean(seen))
    return np.array(values)


def test_what_a_round_reports():
    """Means are over the clients that came, weighted by their examples.

    The means of a group are called after it.
    """
    present = {"a": np.array([True, True]), "b": np.array([True, False, True])}
    algorithm = compose()
    one_round = jax.jit(algorithm.round)
    state = algorithm.init(KEY)
    state, info = one_round(state, cohorts(present), KEY)
    losses = {name: losses_of(name)[there] for name, there in present.items()}
    sizes = {name: np.array(SIZES[name])[there] for name, there in present.items()}
    for name in SIZES:
        expected = np.average(losses[name], weights=sizes[name])
        np.testing.assert_allclose(info[f"loss/{name}"], expected, rtol=1e-5)
        assert info[f"num_steps/{name}"] == STEPS
    together = [np.concatenate([part[name] for name in "ab"]) for part in (losses, sizes)]
    np.testing.assert_allclose(
        info["loss"], np.average(together[0], weights=together[1]), rtol=1e-5
    )
    assert info["num_steps"] == STEPS
    assert info["diverged"] == 0 and info["participants"] == 4
    assert state.round == 1
    for _ in range(2):
        state, _ = one_round(state, cohorts(present), KEY)
    assert state.round == 3


def test_clients_are_told_which_round_it_is():
    """The schedule of a solver sees the rounds 0, 1 and 2.

    With a factor of 0 in round 1 nothing moves in that round.
    """
    model, task = model_of("a"), tasks.regression()
    solver = Solver(optax.sgd(0.1), batching.steps(1, None), schedule=lambda r: r != 1)
    algorithm = federated(
        Group(model.init, local_trainer(model, task, solver), 2),
        server.step_from(optax.sgd(1.0)),
        execution=make_execution("vmap"),
    )
    cohort = sampling.full_participation()(KEY, 0, POPULATION["a"])
    states = [algorithm.init(KEY)]
    one_round = jax.jit(algorithm.round)
    for _ in range(3):
        states.append(one_round(states[-1], cohort, KEY)[0])
    encoders = [np.asarray(state.params["encoder"]["w"]) for state in states]
    moved = [not np.array_equal(a, b) for a, b in zip(encoders, encoders[1:], strict=False)]
    assert moved == [True, False, True]


def key_keeper():
    """A client update that keeps the bits of its key and of the common coin."""

    def update(params, state, client, key):
        kept = {"bits": jax.random.bits(key), "coin": jax.random.bits(client.round_key)}
        return ClientResult(jax.tree.map(jnp.zeros_like, params), kept, {"loss": jnp.float32(0)})

    def init(params):
        return {"bits": jnp.uint32(0), "coin": jnp.uint32(0)}

    return ClientUpdate(init, update, None, None)


def kept_after(groups, cohort):
    """What the clients keep after a round with KEY."""
    step = server.step_from(optax.sgd(1.0))
    algorithm = federated(groups, step, execution=make_execution("vmap"))
    return jax.device_get(jax.jit(algorithm.round)(algorithm.init(KEY), cohort, KEY)[0].clients)


def test_keys_of_clients():
    """The first half of the round's key, with the client's number folded in.

    Of clients that come in groups each group's place is folded in before. The common coin of a
    round is the same for all clients.
    """

    def start(key):
        return {"w": jnp.zeros(2)}

    half = jax.random.split(KEY)[0]

    def expected(key, count):
        return [jax.random.bits(jax.random.fold_in(key, client)) for client in range(count)]

    cohort = sampling.full_participation()(KEY, 0, POPULATION["b"])
    alone = kept_after(Group(start, key_keeper(), 3), cohort)
    np.testing.assert_array_equal(alone["bits"], expected(half, 3))
    groups = {name: Group(start, key_keeper(), len(SIZES[name])) for name in "ab"}
    everybody = sampling.by_group(sampling.full_participation())(KEY, 0, POPULATION)
    apart = kept_after(groups, everybody)
    for place, name in enumerate("ab"):
        own = expected(jax.random.fold_in(half, place), len(SIZES[name]))
        np.testing.assert_array_equal(apart[name]["bits"], own)
    coins = [*alone["coin"], *apart["a"]["coin"], *apart["b"]["coin"]]
    assert len(set(coins)) == 1
