"""FedBone: golden step, messages against end-to-end gradients, schedules, synchronisation."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close, poisoned

from fedjax_mtl import Solver, algorithms, costs, make_federation, models, server, simulate, tasks
from fedjax_mtl.clients import split
from fedjax_mtl.core import batching, sampling
from fedjax_mtl.core.batching import Batch
from fedjax_mtl.models import cut
from fedjax_mtl.models.split_parts import deformable_convolution

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "fedbone.json").read_text())
KEY = jax.random.key(0)
SQUARED = tasks.Task("squared", lambda o, y: jnp.square(o - y), {}, None)

LINEAR = split.Part(lambda key, x: {"P": jax.random.normal(key, (3, 2))}, lambda p, x: x @ p["P"])
TANH = split.Part(
    lambda key, e: {"A": jax.random.normal(key, (2, 3)), "b": jnp.zeros(3)},
    lambda p, e: jnp.tanh(e @ p["A"] + p["b"]),
)


def readout(width=2):
    def init(key, features):
        first, second = jax.random.split(key)
        return {"U": jax.random.normal(first, (3, width)), "w": jax.random.normal(second, (width,))}

    return split.Part(init, lambda p, f: jnp.mean(f @ p["U"], axis=1) @ p["w"])


def cut_model(uppers, lower=LINEAR):
    """A model without its whole form, which nothing here needs."""
    return cut.CutModel(lower, TANH, uppers, jax.ShapeDtypeStruct((1, 2, 3), jnp.float32), {})


def make(
    counts=3,
    widths=None,
    *,
    num_steps=1,
    optimizer=None,
    chain=None,
    lower=LINEAR,
    **changes,
):
    """FedBone for groups by name, each with a readout of its own width.

    A bare count is the one group ``a``.
    """
    counts = {"a": counts} if isinstance(counts, int) else counts
    uppers = {name: readout((widths or {}).get(name, 2)) for name in counts}
    return algorithms.fedbone(
        cut_model(uppers, lower),
        SQUARED,
        num_clients=counts,
        solver=Solver(optimizer or optax.sgd(0.1), batching.steps(num_steps, 2)),
        server=chain or optax.chain(server.gp_aggregation(), optax.sgd(0.5)),
        **changes,
    )


def random_population(counts, seed=0, size=4):
    rng = np.random.default_rng(seed)
    population = {}
    for name, count in counts.items():
        examples = {
            "inputs": rng.normal(size=(count * size, 2, 3)).astype(np.float32),
            "labels": rng.normal(size=count * size).astype(np.float32),
        }
        population[name] = make_federation(
            examples, list(np.arange(count * size).reshape(count, size))
        )
    return population


def cohorts_of(population, key=KEY):
    return sampling.by_group(sampling.full_participation())(key, 0, population)


def test_golden_step():
    given, expected = GOLDEN["split_step"]["input"], GOLDEN["split_step"]["expected"]
    clients = given["clients"]
    with jax.enable_x64(True):
        stack = lambda name: jnp.asarray([c[name] for c in clients], jnp.float64)  # noqa: E731
        examples = {
            "inputs": np.concatenate([c["X"] for c in clients]),
            "labels": np.concatenate([c["t"] for c in clients]),
        }
        population = {"a": make_federation(examples, list(np.arange(6).reshape(3, 2)))}
        cohorts = cohorts_of(population)
        counts = np.array(given["num_samples"], float)
        cohorts["a"] = cohorts["a"]._replace(shares=jnp.asarray(counts / counts.sum()))
        algorithm = make(
            optimizer=optax.sgd(given["eta_client"]),
            chain=optax.chain(server.gp_aggregation(), optax.sgd(given["eta_server"])),
        )
        state = algorithm.init(KEY)
        trunk = {
            "A": jnp.asarray(given["A"], jnp.float64),
            "b": jnp.asarray(given["b"], jnp.float64),
        }
        history = jnp.asarray(given["history"], jnp.float64)
        history = {"A": history[:6].reshape(2, 3), "b": history[6:]}
        gp = state.server[0]._replace(history=history, started=jnp.array(True))
        own = state.clients["a"]._replace(
            lower={"P": stack("P")}, upper={"U": stack("U"), "w": stack("w")}
        )
        state = state._replace(params=trunk, server=(gp, *state.server[1:]), clients={"a": own})

        batch = Batch(
            {"inputs": jnp.asarray(clients[0]["X"]), "labels": jnp.asarray(clients[0]["t"])},
            jnp.ones(2, bool),
            jnp.ones(2),
        )
        one = split.split_step(
            LINEAR,
            TANH,
            readout(),
            SQUARED,
            {"P": own.lower["P"][0]},
            trunk,
            {"U": own.upper["U"][0], "w": own.upper["w"][0]},
            batch,
        )
        want = expected["clients"][0]
        for ours, theirs in (
            (one.messages.embeddings, "E"),
            (one.messages.features, "F"),
            (one.messages.feature_gradients, "dF"),
            (one.messages.embedding_gradients, "dE"),
            (one.trunk["A"], "dA"),
            (one.trunk["b"], "db"),
            (one.lower["P"], "dP"),
            (one.upper["U"], "dU"),
            (one.upper["w"], "dw"),
            (one.loss, "loss"),
        ):
            np.testing.assert_allclose(ours, want[theirs], rtol=1e-9, atol=1e-12)

        new, metrics = algorithm.round(state, cohorts, KEY)
        np.testing.assert_allclose(new.params["A"], expected["A_after"], rtol=1e-9)
        np.testing.assert_allclose(new.params["b"], expected["b_after"], rtol=1e-9)
        for name in ("U", "w"):
            after = [c[f"{name}_after_sgd"] for c in expected["clients"]]
            np.testing.assert_allclose(new.clients["a"].upper[name], after, rtol=1e-9)
        for lower in new.clients["a"].lower["P"]:
            np.testing.assert_allclose(lower, expected["embedding_after_fedavg"], rtol=1e-9)
        moved = np.concatenate([np.ravel(new.server[0].history["A"]), new.server[0].history["b"]])
        np.testing.assert_allclose(moved, expected["new_history"], rtol=1e-9)
        np.testing.assert_allclose(
            metrics["loss"], np.mean([c["loss"] for c in expected["clients"]]), rtol=1e-9
        )
        per_step = expected["traffic_per_client_per_step"]
        assert (
            algorithm.traffic(state)[0] == 8 * 6 + 4 * per_step["up_floats"]
        )  # float64 embedding, 4-byte messages


def test_messages_equal_end_to_end_gradients():
    """Messages equal the gradients of the whole model.

    The model is a real one, with patches, a hierarchical trunk, deformable convolution and
    attention.
    """
    lower, trunk = models.patch_embedding(4, 8), models.conv_trunk((8, 16))
    upper = models.task_adaptation(8, 1, (16, 16), heads=2, head_width=8)
    images = jax.random.normal(KEY, (2, 16, 16, 3))
    params = cut.init_parts(lower, trunk, upper, images, tuple(jax.random.split(KEY, 3)))
    # Off zero, so that the sampling places move.
    params["upper"] = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(KEY, x.shape), params["upper"]
    )
    batch = Batch(
        {"inputs": images, "labels": jnp.ones((2, 16, 16, 1))},
        jnp.array([True, False]),
        jnp.ones(2),
    )
    task = tasks.dense.depth()
    whole = cut.composed(lower, trunk, upper)

    def loss(p):
        return task.loss(whole(p, images), batch.examples["labels"])[0]

    expected_loss, expected = jax.jit(jax.value_and_grad(loss))(params)

    def step(p, wire_dtype=None):
        own = p["lower"], p["trunk"], p["upper"]
        return split.split_step(lower, trunk, upper, task, *own, batch, wire_dtype)

    ours = jax.jit(step)(params)
    np.testing.assert_allclose(ours.loss, expected_loss, rtol=1e-5)
    for name in ("lower", "trunk", "upper"):
        assert_trees_close(getattr(ours, name), expected[name], rtol=1e-3, atol=1e-6)
    rounded = jax.jit(functools.partial(step, wire_dtype=jnp.bfloat16))(params)
    np.testing.assert_allclose(rounded.loss, expected_loss, rtol=0.05)
    sent = rounded.messages.embeddings
    np.testing.assert_array_equal(sent, sent.astype(jnp.bfloat16).astype(jnp.float32))


def test_one_client_is_centralised_training():
    population = random_population({"a": 1}, size=2)
    algorithm = make(1, num_steps=3)
    state = algorithm.init(KEY)
    own = jax.tree.map(lambda x: x[0], state.clients["a"])
    params = {"lower": own.lower, "trunk": state.params, "upper": own.upper}
    whole = cut.composed(LINEAR, TANH, readout())
    data = population["a"].examples
    gradient = jax.grad(lambda p: jnp.mean(jnp.square(whole(p, data["inputs"]) - data["labels"])))
    for _ in range(3):
        moved = gradient(params)
        rates = {"lower": 0.1, "trunk": 0.5, "upper": 0.1}
        params = {
            n: optax.tree.sub(params[n], optax.tree.scale(rates[n], moved[n])) for n in params
        }
    new, _ = algorithm.round(state, cohorts_of(population), KEY)
    assert_trees_close(new.params, params["trunk"])
    assert_trees_close(jax.tree.map(lambda x: x[0], new.clients["a"].upper), params["upper"])


def test_without_projection_and_attention_it_is_data_parallel():
    """GPAggregation without its parts is the plain mean over the clients of all groups."""
    counts = {"a": 2, "b": 1}
    population = random_population(counts, size=2)
    plain_aggregation = server.gp_aggregation(attention="none", project=False)
    plain = make(counts, chain=optax.chain(plain_aggregation, optax.sgd(0.5)))
    mean = make(counts, chain=server.step_from(optax.sgd(0.5)))
    state, other = plain.init(KEY), mean.init(KEY)
    new, metrics = plain.round(state, cohorts_of(population), KEY)
    same, _ = mean.round(other, cohorts_of(population), KEY)
    assert_trees_close(new.params, same.params)
    total, losses = optax.tree.zeros_like(state.params), {name: [] for name in counts}
    for name in counts:
        own = state.clients[name]
        for client in range(counts[name]):
            rows = population[name].indices[client]
            batch = Batch(
                jax.tree.map(lambda x, r=rows: x[r], population[name].examples),
                jnp.ones(2, bool),
                jnp.ones(2),
            )
            at = jax.tree.map(lambda x, c=client: x[c], own)
            one = split.split_step(
                LINEAR, TANH, readout(), SQUARED, at.lower, state.params, at.upper, batch
            )
            total = optax.tree.add(total, optax.tree.scale(1 / 3, one.trunk))
            losses[name].append(float(one.loss))
    assert_trees_close(new.params, optax.tree.sub(state.params, optax.tree.scale(0.5, total)))
    np.testing.assert_allclose(metrics["loss/a"], np.mean(losses["a"]), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/b"], np.mean(losses["b"]), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses["a"] + losses["b"]), rtol=1e-5)
    assert metrics["norm_ratio"] == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("schedule", ["round", "drift"])
def test_schedules_agree_for_one_step_and_differ_for_more(schedule):
    population = random_population({"a": 3}, size=2)
    results = {}
    for steps in (1, 3):
        for name in ("step", schedule):
            algorithm = make(num_steps=steps, schedule=name, drift_learning_rate=0.1)
            results[steps, name] = algorithm.round(
                algorithm.init(KEY), cohorts_of(population), KEY
            )[0]
    assert_trees_close(results[1, schedule].params, results[1, "step"].params, rtol=1e-4, atol=1e-5)
    # Full batches: the clients' own parts see the same first step whatever the schedule.
    assert_trees_close(
        results[1, schedule].clients, results[1, "step"].clients, rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(
        results[3, schedule].params["A"], results[3, "step"].params["A"], rtol=1e-3
    )


def trunk_by_hand(schedule, state, examples, num_steps, own_rate, trunk_rate):
    """The trunk gradients that the server gets, leaves ``[clients, ...]``.

    They come from autodiff of the uncut model, client by client.
    """
    model = cut.composed(LINEAR, TANH, readout())
    seen = []
    for i in range(examples["labels"].shape[0]):
        inputs, labels = examples["inputs"][i], examples["labels"][i]
        gradient = jax.jit(jax.grad(lambda p, x=inputs, y=labels: jnp.mean((model(p, x) - y) ** 2)))
        own = state.clients["a"]
        params = {"lower": own.lower, "upper": own.upper}
        params = jax.tree.map(lambda x, i=i: x[i], params) | {"trunk": state.params}
        moving = []
        for _ in range(num_steps):
            grads = gradient(params)
            moving.append(grads["trunk"])
            rates = {
                "lower": own_rate,
                "upper": own_rate,
                "trunk": trunk_rate * (schedule == "drift"),
            }
            params = {
                part: jax.tree.map(lambda p, g, r=rates[part]: p - r * g, params[part], grads[part])
                for part in params
            }
        seen.append(jax.tree.map(lambda *g: sum(g) / num_steps, *moving))
    return jax.tree.map(lambda *g: jnp.stack(g), *seen)


@pytest.mark.parametrize("schedule", ["round", "drift"])
def test_schedules_of_several_steps_by_hand(schedule):
    """The server gets the mean of a client's gradients over several steps of full batches.

    Under one schedule the trunk stands still, and under the other it moves with the client. In the
    second case the mean equals (start - end) / (rate * steps).
    """
    population = random_population({"a": 3}, size=2)
    algorithm = make(
        num_steps=3,
        schedule=schedule,
        drift_learning_rate=0.2,
        embedding_sync="local",
        chain=optax.chain(server.average_clients(), optax.sgd(0.5)),
    )
    state = algorithm.init(KEY)
    rows = population["a"].indices
    examples = jax.tree.map(lambda x: x[rows], population["a"].examples)
    expected = trunk_by_hand(schedule, state, examples, 3, own_rate=0.1, trunk_rate=0.2)
    ours = algorithm.round(state, cohorts_of(population), KEY)[0].params
    for name in ours:
        np.testing.assert_allclose(
            ours[name], state.params[name] - 0.5 * expected[name].mean(axis=0), rtol=1e-4, atol=1e-5
        )


def test_a_frozen_embedding_does_not_decay():
    algorithm = make(
        embedding_sync="frozen",
        optimizer=optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    )
    state = algorithm.init(KEY)
    new = algorithm.round(state, cohorts_of(random_population({"a": 3})), KEY)[0]
    np.testing.assert_array_equal(new.clients["a"].lower["P"], state.clients["a"].lower["P"])
    assert not np.allclose(new.clients["a"].upper["U"], state.clients["a"].upper["U"])


def test_embedding_synchronisation():
    population = random_population({"a": 3})
    ends = {}
    for how in ("fedavg", "local", "frozen"):
        algorithm = make(embedding_sync=how)
        state = algorithm.init(KEY)
        ends[how] = algorithm.round(state, cohorts_of(population), KEY)[0].clients["a"].lower["P"]
    np.testing.assert_array_equal(ends["frozen"], state.clients["a"].lower["P"])
    assert np.ptp(ends["local"], axis=0).max() > 1e-3
    np.testing.assert_allclose(
        ends["fedavg"], np.broadcast_to(ends["local"].mean(0), (3, 3, 2)), rtol=1e-5
    )


@pytest.mark.parametrize("schedule", ["step", "round", "drift"])
def test_absent_and_diverged_clients_have_no_influence(schedule):
    population = random_population({"a": 3}, size=2)
    algorithm = make(schedule=schedule, num_steps=2)
    state = algorithm.init(KEY)
    few = sampling.make_cohort(population["a"], jnp.array([0, 2]))
    without, _ = algorithm.round(state, {"a": few}, KEY)
    cohort = cohorts_of(population)["a"]
    present = jnp.array([True, False, True])
    shares = jnp.where(present, cohort.shares, 0)
    absent = cohort._replace(present=present, shares=shares)
    ours, _ = algorithm.round(state, {"a": absent}, KEY)
    assert_trees_close(ours, without, rtol=1e-4, atol=1e-5)
    broken = jax.tree.map(lambda x: x.at[1].set(jnp.nan), state.clients["a"].upper)
    bad = state._replace(clients={"a": state.clients["a"]._replace(upper=broken)})
    diverged, metrics = algorithm.round(bad, {"a": cohort}, KEY)
    assert metrics["diverged"] == 1 and np.isfinite(metrics["loss"])
    assert_trees_close(diverged.params, without.params, rtol=1e-4, atol=1e-5)


def test_a_synchronised_embedding_reaches_absent_clients():
    population = random_population({"a": 3})
    algorithm = make()
    state = algorithm.init(KEY)
    cohort = sampling.make_cohort(population["a"], jnp.array([0, 2]))
    new, _ = algorithm.round(state, {"a": cohort}, KEY)
    own = new.clients["a"].lower["P"]
    np.testing.assert_allclose(own, jnp.broadcast_to(own[:1], own.shape))
    assert not np.allclose(own[1], state.clients["a"].lower["P"][1])
    nobody = sampling.make_cohort(population["a"], jnp.arange(3), jnp.zeros(3, bool))
    kept, _ = algorithm.round(state, {"a": nobody}, KEY)
    assert_trees_close(kept.clients, state.clients)
    assert_trees_close(kept.params, state.params)


@pytest.mark.parametrize("schedule", ["step", "round", "drift"])
def test_a_round_that_nobody_attends_leaves_the_server_as_it_was(schedule):
    """Neither the trunk nor the server's state change, momentum included.

    The reported means are NaN, because they are means over nobody.
    """
    population = random_population({"a": 3}, size=2)
    algorithm = make(schedule=schedule, num_steps=2, chain=server.step_from(optax.adam(0.1)))
    one_round = jax.jit(algorithm.round)
    state, info = one_round(algorithm.init(KEY), cohorts_of(population), KEY)
    assert info["participants"] == 3 and np.isfinite(info["loss"])
    nobody = {"a": sampling.make_cohort(population["a"], jnp.arange(3), jnp.zeros(3, bool))}
    new, info = one_round(state, nobody, KEY)
    assert_trees_close(new._replace(round=state.round), state, rtol=0, atol=0)
    assert np.isnan(info["loss"]) and np.isnan(info["loss/a"])
    assert info["participants"] == info["diverged"] == 0


def test_a_diverged_client_counts_as_absent_for_everybody():
    """A diverged client enters neither the trunk nor the mean embedding that all are sent."""
    population = random_population({"a": 2, "b": 1}, size=2)
    algorithm = make({"a": 2, "b": 1})
    state = algorithm.init(KEY)
    # Embeddings that differ, so that who counts in their mean can be seen.
    apart = jax.random.normal(KEY, (2, 3, 2))
    own = state.clients["a"]._replace(lower={"P": apart})
    state = state._replace(clients=state.clients | {"a": own})
    broken = {**population, "a": poisoned(population["a"], 1)}
    there = jnp.array([True, False])
    cohorts = cohorts_of(population)
    shares = jnp.where(there, cohorts["a"].shares, 0)
    absent = cohorts | {"a": cohorts["a"]._replace(present=there, shares=shares)}
    one_round = jax.jit(algorithm.round)
    ours, info = one_round(state, cohorts_of(broken), KEY)
    theirs, _ = one_round(state, absent, KEY)
    assert info["diverged"] == 1 and info["participants"] == 2
    assert_trees_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_clients_that_do_not_come_in_groups():
    """Clients without groups give the same numbers as one group with any name."""
    population = random_population({"a": 3}, size=2)
    named = make(num_steps=2)
    alone = algorithms.fedbone(
        cut_model({"": readout()}),
        SQUARED,
        num_clients=3,
        solver=Solver(optax.sgd(0.1), batching.steps(2, 2)),
        server=optax.chain(server.gp_aggregation(), optax.sgd(0.5)),
    )
    cohorts = cohorts_of(population)
    theirs, expected = jax.jit(named.round)(named.init(KEY), cohorts, KEY)
    ours, info = jax.jit(alone.round)(alone.init(KEY), cohorts["a"], KEY)
    assert_trees_close(ours.clients, theirs.clients["a"])
    assert "loss/" not in info and info["loss"] == expected["loss/a"]
    inputs = jnp.ones((3, 5, 2, 3))
    outputs = named.predict(theirs, {"a": jnp.arange(3)}, {"a": inputs})["a"]
    np.testing.assert_allclose(alone.predict(ours, jnp.arange(3), inputs), outputs, rtol=1e-6)
    assert alone.traffic(ours) == named.traffic(theirs)


def test_a_clients_own_parts_that_diverge_stay_with_it():
    """The embedding's gradient is NaN where the trunk's is not."""
    lower = split.Part(
        LINEAR.init,
        lambda p, x: x @ p["P"] + 0 * jnp.sqrt(jnp.sum(jnp.square(p["P"])) * x[..., :1] ** 2),
    )
    population = random_population({"a": 3}, size=2)
    zero = jnp.asarray(population["a"].examples["inputs"]).at[2:4].set(0.0)
    population["a"] = population["a"]._replace(
        examples={**population["a"].examples, "inputs": zero}
    )
    algorithm = make(lower=lower)
    new, metrics = algorithm.round(algorithm.init(KEY), cohorts_of(population), KEY)
    assert metrics["diverged"] == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


def test_simulated_predicted_adapted():
    counts = {"a": 2, "b": 1}
    population = random_population(counts)
    algorithm = make(counts, {"b": 4}, num_steps=4)
    run = simulate(algorithm, population, num_rounds=8, seeds=(0, 1))
    assert run.metrics["loss"].shape == (2, 8)
    assert (run.metrics["loss"][:, -1] < run.metrics["loss"][:, 0]).all()
    state = jax.tree.map(lambda x: x[0], run.state)
    outputs = algorithm.predict(state, {"b": jnp.array([0])}, {"b": jnp.ones((1, 5, 2, 3))})
    assert outputs["b"].shape == (1, 5)
    adapted = algorithm.adapt(state, random_population({"a": 3}), KEY)
    assert algorithm.predict(adapted, {"a": jnp.arange(3)}, {"a": jnp.ones((3, 5, 2, 3))})[
        "a"
    ].shape == (
        3,
        5,
    )


def test_deformable_convolution_golden():
    given, expected = GOLDEN["deformable_conv"]["input"], GOLDEN["deformable_conv"]["expected"]
    with jax.enable_x64(True):
        image, kernel, bias, offsets = (
            jnp.asarray(given[name], jnp.float64) for name in ("image", "kernel", "bias", "offsets")
        )
        ours = deformable_convolution(image[None], kernel, bias, offsets[None])
        np.testing.assert_allclose(ours[0], expected["output"], rtol=1e-9, atol=1e-12)
        plain = deformable_convolution(image[None], kernel, bias, jnp.zeros_like(offsets)[None])
        np.testing.assert_allclose(plain[0], expected["output_zero_offsets"], rtol=1e-9, atol=1e-12)
        stock = jax.lax.conv_general_dilated(
            image[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        np.testing.assert_allclose(plain, stock + bias, rtol=1e-9)
        far = deformable_convolution(image[None], kernel, bias, offsets[None] + 100.0)
        np.testing.assert_allclose(far, jnp.broadcast_to(bias, far.shape))


@pytest.mark.parametrize("index", range(len(GOLDEN["traffic"])))
def test_traffic_golden(index):
    case = GOLDEN["traffic"][index]
    given = case["inputs"]
    ours = costs.split_traffic(
        batch_size=given["B"],
        embedding_values=given["N"] * given["d"],
        feature_values=given["N_out"] * given["d_out"],
        num_steps=given["steps"],
        embedding_parameters=given["theta_e"],
        trunk_parameters=given["theta_g"],
        upper_parameters=given["theta_a"] + given["theta_h"],
        bytes_per_value=given["bytes_per_value"],
    )
    assert (ours.up, ours.down) == (case["fedbone_up_bytes"], case["fedbone_down_bytes"])
    assert ours.federated == case["fedavg_encoder_only_total_bytes"]
    assert ours.federated_full == case["fedavg_full_model_total_bytes"]
    np.testing.assert_allclose(
        ours.break_even_steps, case["break_even_steps_vs_encoder_fedavg"], rtol=1e-12
    )


def test_trunks_and_heads():
    images = jax.random.normal(KEY, (2, 16, 16, 3))
    lower, trunk = models.patch_embedding(4, 8), models.vit_trunk(2, 2)
    head = models.task_adaptation(8, 5, (16, 16), heads=2, classify=True)
    params = cut.init_parts(lower, trunk, head, images, tuple(jax.random.split(KEY, 3)))
    assert cut.composed(lower, trunk, head)(params, images).shape == (2, 5)


def test_sparse_upload():
    assert costs.sparse_upload_bytes(1000, 200) == 800 + 125
    assert costs.sparse_upload_bytes(1000, 200, positions="indices") == 1600
    with pytest.raises(ValueError, match="unknown positions 'runs'"):
        costs.sparse_upload_bytes(10, 1, positions="runs")


def test_bad_arguments():
    with pytest.raises(
        ValueError, match="unknown schedule 'epoch'; expected one of step, round, drift"
    ):
        make(schedule="epoch")
    with pytest.raises(ValueError, match="unknown embedding_sync 'mean'"):
        make(embedding_sync="mean")
    with pytest.raises(ValueError, match="groups is empty"):
        make({})
    with pytest.raises(ValueError, match="group 'a' has 0 clients"):
        make(0)
    with pytest.raises(ValueError, match="the plan has num_steps 0"):
        make(num_steps=0)
    solver = Solver(optax.sgd(0.1), batching.steps(1, 2))
    for changes in ({"schedule": lambda r: 1.0}, {"keep_optimizer": False}):
        with pytest.raises(ValueError, match="at a constant learning rate and keep their optim"):
            algorithms.fedbone(
                cut_model({"a": readout()}),
                SQUARED,
                num_clients={"a": 1},
                solver=solver._replace(**changes),
            )
    with pytest.raises(ValueError, match="group 'b' has no part of the model"):
        algorithms.fedbone(
            cut_model({"a": readout()}), SQUARED, num_clients={"b": 1}, solver=solver
        )
    with pytest.raises(ValueError, match=r"put average_clients\(\)"):
        algorithm = make(chain=optax.sgd(0.1))
        algorithm.round(algorithm.init(KEY), cohorts_of(random_population({"a": 3})), KEY)
    with pytest.raises(
        ValueError, match=r"cohorts are of groups \['b'\], the algorithm is for \['a'\]"
    ):
        make().round(make().init(KEY), {"b": None}, KEY)
