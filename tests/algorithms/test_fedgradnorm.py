"""FedGradNorm against golden values, its identities with FedRep, and the over-the-air step."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import GROUP_COUNTS, GROUP_MODELS, GROUP_TASKS, VMAP, small_population

from fedjax_mtl import Solver, algorithms, make_execution, make_federation, models, tasks
from fedjax_mtl.core import batching, sampling, trees
from fedjax_mtl.server.reports import reported
from fedjax_mtl.server.wireless import over_the_air_sum

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "fedgradnorm.json").read_text())
SETTINGS = GOLDEN["inputs"]["hparams"]
HEAD = trees.under("v")


def golden_model():
    def init(key):
        del key
        given = GOLDEN["inputs"]
        return {
            "W1": jnp.asarray(given["W1"], jnp.float64),
            "W2": jnp.asarray(given["W2"], jnp.float64),
            "v": jnp.zeros(2, jnp.float64),
        }

    def apply(params, inputs, key=None):
        del key
        return inputs @ params["W1"].T @ params["W2"].T @ params["v"]

    return models.Model(init, apply)


def squared():
    return tasks.Task("squared", lambda o, y: jnp.square(o - y), {}, None)


def golden_federation():
    clients = GOLDEN["inputs"]["clients"]
    examples = {
        "inputs": np.concatenate([c["X"] for c in clients]),
        "labels": np.concatenate([c["y"] for c in clients]),
    }
    ends = np.cumsum([0] + [len(c["y"]) for c in clients])
    return make_federation(
        examples, [np.arange(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    )


def golden_algorithm(server_optimizer=None, execution="vmap", task=None, **changes):
    settings = {
        "num_clients": 3,
        "head": HEAD,
        "head_plan": batching.steps(SETTINGS["tau_h"], None),
        "plan": batching.steps(SETTINGS["tau_w"], None),
        "head_learning_rate": SETTINGS["lr_head"],
        "learning_rate": SETTINGS["lr_shared"],
        "server_optimizer": server_optimizer or optax.sgd(SETTINGS["lr_server"]),
        "weight_learning_rate": SETTINGS["lr_p"],
        "exponent": SETTINGS["gamma"],
        "measured": trees.under("W2"),
        "minimum": SETTINGS["p_min"],
        "execution": make_execution(execution),
    }
    return algorithms.fedgradnorm(golden_model(), task or squared(), **{**settings, **changes})


def start(algorithm):
    state = algorithm.init(jax.random.key(0))
    heads = jnp.asarray([c["v"] for c in GOLDEN["inputs"]["clients"]], jnp.float64)
    inner = state.clients.own if hasattr(state.clients, "own") else state.clients
    inner = inner._replace(personal=inner.personal | {"v": heads})
    clients = state.clients._replace(own=inner) if hasattr(state.clients, "own") else inner
    return state._replace(clients=clients)


def loss_weights(state):
    """The loss weights of all clients, ``[population]``."""
    return reported(state.server)["loss_weights"]


def everybody(federation):
    return sampling.make_cohort(federation, jnp.arange(3, dtype=jnp.int32))


@pytest.mark.parametrize("execution", ["vmap", "loop", "map"])
def test_golden_rounds(execution):
    with jax.enable_x64(True):
        algorithm, cohort = golden_algorithm(execution=execution), everybody(golden_federation())
        state = start(algorithm)
        for index, expected in enumerate(GOLDEN["rounds"]):
            state, metrics = algorithm.round(state, cohort, jax.random.key(index))
            # Batches' masks and weights are float32; the arithmetic is float64.
            np.testing.assert_allclose(
                state.clients.personal["v"], [c["v_out"] for c in expected["clients"]], rtol=1e-6
            )
            np.testing.assert_allclose(metrics["loss_weights"], expected["p_out"], rtol=1e-6)
            np.testing.assert_allclose(state.params["W1"], expected["W1_out"], rtol=1e-6)
            np.testing.assert_allclose(state.params["W2"], expected["W2_out"], rtol=1e-6)
            shares = np.array([5, 4, 6]) / 15
            np.testing.assert_allclose(metrics["loss"], shares @ expected["F"], rtol=1e-6)


@pytest.mark.parametrize(
    "reading, name",
    [
        ("first_step", "norm_first_last"),
        ("mean_step", "mean_step_norm_last"),
        ("update", "norm_avg_last"),
    ],
)
def test_norm_readings(reading, name):
    """Every reading of the norms gives the golden weights of the first round.

    Weights start at 1 and rates are 1.
    """
    expected = GOLDEN["rounds"][0]
    norms = np.array([c[name] for c in expected["clients"]])
    raw = 1 - SETTINGS["lr_p"] * np.sign(norms - norms.mean()) * norms
    with jax.enable_x64(True):
        algorithm = golden_algorithm(norms=reading)
        state, _ = algorithm.round(
            start(algorithm), everybody(golden_federation()), jax.random.key(0)
        )
        np.testing.assert_allclose(loss_weights(state), 3 * raw / raw.sum(), rtol=1e-6)


@pytest.mark.parametrize("point", ["shared", "before_head", "full"])
def test_loss_points(point):
    expected = GOLDEN["rounds"][0]["clients"]
    losses = [c["F"] if point == "shared" else c["head_losses"][0] for c in expected]
    with jax.enable_x64(True):
        algorithm = golden_algorithm(loss_point=point)
        state, _ = algorithm.round(
            start(algorithm), everybody(golden_federation()), jax.random.key(0)
        )
        np.testing.assert_allclose(state.server[1].initial_losses, losses, rtol=1e-6)


def test_static_weights_are_fedrep():
    """With weights that do not move FedGradNorm is FedRep.

    A server step of rate times steps then gives the mean of the models.
    """
    with jax.enable_x64(True):
        cohort = everybody(golden_federation())
        equal = golden_algorithm(
            optax.sgd(SETTINGS["lr_shared"] * SETTINGS["tau_w"]), dynamic=False
        )
        state, _ = equal.round(start(equal), cohort, jax.random.key(0))
        for name in ("W1", "W2"):
            local = np.mean(
                [c[f"{name}_local_out"] for c in GOLDEN["rounds"][0]["clients"]], axis=0
            )
            np.testing.assert_allclose(state.params[name], local, rtol=1e-6)
        rep = algorithms.fedrep(
            golden_model(),
            squared(),
            num_clients=3,
            head=HEAD,
            head_plan=batching.steps(2, None),
            solver=Solver(optax.sgd(0.05), batching.steps(2, None)),
            weighting="uniform",
        )
        other, _ = rep.round(start(rep), cohort, jax.random.key(0))
        np.testing.assert_allclose(other.params["W1"], state.params["W1"], rtol=1e-6)
        np.testing.assert_allclose(
            other.clients.personal["v"], state.clients.personal["v"], rtol=1e-6
        )


def test_local_weighting_starts_alike_and_then_weighs_the_local_loss():
    with jax.enable_x64(True):
        cohort = everybody(golden_federation())
        plain, local = golden_algorithm(), golden_algorithm(local_weighting=True)
        a, b = start(plain), start(local)
        a, first = plain.round(a, cohort, jax.random.key(0))
        b, second = local.round(b, cohort, jax.random.key(0))
        np.testing.assert_allclose(b.params["W1"], a.params["W1"], rtol=1e-6)
        np.testing.assert_allclose(b.clients.weight, loss_weights(a), rtol=1e-6)
        np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-6)
        b, _ = local.round(b, cohort, jax.random.key(0))
        a, _ = plain.round(a, cohort, jax.random.key(0))
        assert not np.allclose(b.clients.own.personal["v"], a.clients.personal["v"], rtol=1e-6)


def test_a_straggler_sends_the_mean_gradient_of_the_steps_it_made():
    """One step of two sends the first step's gradient, not half of it."""
    with jax.enable_x64(True):
        algorithm, cohort = golden_algorithm(norms="update"), everybody(golden_federation())
        slow = cohort._replace(budgets=jnp.array([1, 100, 100], jnp.int32))
        state, _ = algorithm.round(start(algorithm), slow, jax.random.key(0))
        one_step = golden_algorithm(plan=batching.steps(1, None), head_plan=batching.steps(1, None))
        reference, _ = one_step.round(start(one_step), cohort, jax.random.key(0))
        np.testing.assert_allclose(
            state.clients.personal["v"][0], reference.clients.personal["v"][0], rtol=1e-6
        )
        alone = golden_federation().take(jnp.array([0]))
        single = golden_algorithm(num_clients=1)
        cut = sampling.make_cohort(alone, jnp.arange(1))._replace(budgets=jnp.ones(1, jnp.int32))
        ours, _ = single.round(single.init(jax.random.key(0)), cut, jax.random.key(0))
        once = golden_algorithm(
            num_clients=1, plan=batching.steps(1, None), head_plan=batching.steps(1, None)
        )
        whole = sampling.make_cohort(alone, jnp.arange(1))
        theirs, _ = once.round(once.init(jax.random.key(0)), whole, jax.random.key(0))
        np.testing.assert_allclose(ours.params["W1"], theirs.params["W1"], rtol=1e-6)


@pytest.mark.parametrize("local_weighting", [False, True])
def test_a_client_that_makes_no_step_has_no_training_rate(local_weighting):
    """A client that makes no step does not count as diverged.

    Its weight stays, and the weights of the others are those of a round without it.
    """
    with jax.enable_x64(True):
        algorithm, cohort = (
            golden_algorithm(local_weighting=local_weighting),
            everybody(golden_federation()),
        )
        state, _ = algorithm.round(start(algorithm), cohort, jax.random.key(0))
        idle = cohort._replace(budgets=jnp.array([0, 100, 100], jnp.int32))
        present = jnp.array([False, True, True])
        absent = cohort._replace(present=present, shares=jnp.where(present, cohort.shares, 0))
        _, metrics = algorithm.round(state, idle, jax.random.key(1))
        _, others = algorithm.round(state, absent, jax.random.key(1))
        assert metrics["diverged"] == 0 and metrics["participants"] == 3
        np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-6)
        np.testing.assert_allclose(metrics["loss_weights"], others["loss_weights"], rtol=1e-6)
        np.testing.assert_allclose(metrics["loss_weights"][0], loss_weights(state)[0], rtol=1e-6)


def test_negative_losses_have_training_rates():
    """A loss that is lowered by a constant becomes negative, and weights still move.

    The first losses are kept.
    """
    with jax.enable_x64(True):
        cohort = everybody(golden_federation())
        lowered = squared()._replace(loss=lambda o, y: jnp.square(o - y) - 100.0)
        algorithm = golden_algorithm(task=lowered)
        state, _ = algorithm.round(start(algorithm), cohort, jax.random.key(0))
        first = state.server[1].initial_losses
        assert (np.asarray(first) < 0).all()
        state, metrics = algorithm.round(state, cohort, jax.random.key(1))
        np.testing.assert_array_equal(state.server[1].initial_losses, first)
        assert np.isfinite(metrics["loss_weights"]).all()


@pytest.mark.parametrize("local_weighting", [False, True])
def test_groups_with_heads_of_their_own(local_weighting):
    """Each client of the whole population has one weight.

    Its own loss is multiplied by it.
    """
    algorithm = algorithms.fedgradnorm(
        GROUP_MODELS,
        GROUP_TASKS,
        num_clients=GROUP_COUNTS,
        plan=batching.steps(2, None),
        learning_rate=0.05,
        local_weighting=local_weighting,
        execution=VMAP,
    )
    cohorts = sampling.by_group(sampling.full_participation())(
        jax.random.key(0), 0, small_population()
    )
    one_round = jax.jit(algorithm.round)
    state, first = one_round(algorithm.init(jax.random.key(0)), cohorts, jax.random.key(0))
    assert set(state.params) == {"encoder"} and first["loss_weights"].shape == (6,)
    np.testing.assert_allclose(jnp.sum(first["loss_weights"]), 6, rtol=1e-5)
    if local_weighting:
        told = [state.clients[name].weight for name in ("first", "second")]
        np.testing.assert_allclose(jnp.concatenate(told), first["loss_weights"])
    for index in range(1, 12):
        state, last = one_round(state, cohorts, jax.random.key(index))
    assert last["loss"] < first["loss"]


def test_one_client_keeps_weight_one():
    with jax.enable_x64(True):
        algorithm = golden_algorithm(num_clients=1)
        federation = golden_federation().take(jnp.array([0]))
        state = algorithm.init(jax.random.key(0))
        for index in range(3):
            cohort = sampling.make_cohort(federation, jnp.arange(1))
            state, _ = algorithm.round(state, cohort, jax.random.key(index))
        np.testing.assert_allclose(loss_weights(state), [1.0])


def test_over_the_air_golden():
    given, expected = GOLDEN["hota"]["inputs"], GOLDEN["hota"]["outputs"]
    with jax.enable_x64(True):
        gradients, gains = (
            jnp.asarray(given["cluster_gradients"]),
            jnp.asarray(given["channel_gain"]),
        )
        ours = over_the_air_sum(
            gradients, gains, jnp.asarray(given["noise"]), given["H_th"], given["rho"]
        )
        np.testing.assert_allclose(ours, expected["estimate"], rtol=1e-6, atol=1e-12)
        ideal = over_the_air_sum(gradients, gains, jnp.zeros(6), 0.0, given["rho"])
        np.testing.assert_allclose(ideal, expected["ideal_mean"], rtol=1e-6)


def hota_update(**channel):
    from fedjax_mtl import server

    rng = np.random.default_rng(0)
    updates = {"w": jnp.asarray(rng.normal(size=(6, 50)), jnp.float32)}
    transformation = server.over_the_air_gradnorm(3, 2, **channel)
    state = transformation.init({"w": jnp.zeros(50)})
    facts = {"losses": jnp.arange(1.0, 7), "client_ids": jnp.arange(6), "key": jax.random.key(1)}
    return updates["w"], transformation.update(updates, state, **facts)


def test_over_the_air_limits_and_fading():
    updates, (ours, state) = hota_update(learning_rate=0.0, threshold=0.0, noise=0.0)
    np.testing.assert_allclose(ours["w"], updates.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.weights, 1)
    # Nobody's channel is good enough: nothing moves. One dead cluster: the mean of the others.
    _, (silent, _) = hota_update(learning_rate=0.0, fading=1e-6)
    assert not silent["w"].any()
    _, (two, _) = hota_update(
        learning_rate=0.0, threshold=1e-9, fading=jnp.array([1e-9, 1, 1]), noise=0.0
    )
    np.testing.assert_allclose(two["w"], updates[2:].mean(0), rtol=1e-3, atol=1e-3)
    _, (_, moved) = hota_update(learning_rate=0.1)
    np.testing.assert_allclose(moved.weights.sum(1), 2, rtol=1e-5)
    _, (strong, _) = hota_update(learning_rate=0.0, threshold=0.0, noise=1.0, power=1e6)
    np.testing.assert_allclose(strong["w"], updates.mean(0), atol=0.5)


def test_a_cluster_without_anybody_is_silent():
    from fedjax_mtl import server

    transformation = server.over_the_air_gradnorm(2, 2, learning_rate=0.0, threshold=0.0, noise=0.0)
    updates = {"w": jnp.ones((4, 3))}
    received, _ = transformation.update(
        updates,
        transformation.init({"w": jnp.zeros(3)}),
        losses=jnp.ones(4),
        client_ids=jnp.arange(4),
        present=jnp.array([True, True, False, False]),
        key=jax.random.key(0),
    )
    np.testing.assert_allclose(received["w"], 1.0, rtol=1e-5)


def test_rayleigh_share_of_good_channels():
    from fedjax_mtl.server.wireless import rayleigh_gains

    gains = rayleigh_gains(jax.random.key(0), jnp.zeros((2, 20000)), jnp.array([1.0, 0.15]))
    good = (np.square(gains) >= 0.032).mean(1)
    np.testing.assert_allclose(good, np.exp(-0.032 / np.array([1.0, 0.15**2])), atol=0.01)


@pytest.mark.parametrize("fading", [(1.0,), (1.0, 0.3, 1.0)])
def test_clusters_over_the_air(fading):
    with jax.enable_x64(True):
        algorithm = algorithms.hota_fedgradnorm(
            golden_model(),
            squared(),
            num_clients=3,
            num_clusters=len(fading),
            head=HEAD,
            plan=batching.steps(2, None),
            learning_rate=0.05,
            fading=fading,
        )
        cohort = everybody(golden_federation())
        state, info = algorithm.round(start(algorithm), cohort, jax.random.key(0))
        assert info["loss_weights"].shape == (3,)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown norms 'median'"):
        golden_algorithm(norms="median")
    with pytest.raises(ValueError, match="unknown loss_point 'end'"):
        golden_algorithm(loss_point="end")
    with pytest.raises(ValueError, match="needs a plan of local steps"):
        golden_algorithm(plan=batching.epochs(1, None))
    settings = {"num_clients": 3, "plan": batching.steps(1, None), "learning_rate": 0.1}
    with pytest.raises(ValueError, match="2 clusters do not divide 3 clients"):
        algorithms.hota_fedgradnorm(golden_model(), squared(), num_clusters=2, **settings)
    with pytest.raises(ValueError, match=r"fading has shape \(2,\) for 3 clusters"):
        algorithms.hota_fedgradnorm(
            golden_model(), squared(), num_clusters=3, fading=(1.0, 2.0), **settings
        )
