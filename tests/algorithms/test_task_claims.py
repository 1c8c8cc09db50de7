"""The claims of FedGradNorm and FedDEA on their small problems, over five draws of the data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_mtl import (
    Group,
    Solver,
    algorithms,
    data,
    evaluate_clients,
    heterogeneous,
    local_trainer,
    make_execution,
    models,
    server,
    simulate,
    tasks,
)
from fedjax_mtl.core import batching, sampling, trees

pytestmark = pytest.mark.claim
VMAP = make_execution("vmap")
SEEDS = range(5)


def last_shared_layer(path):
    return path[:2] == ("encoder", "dense_1") and path[-1] == "kernel"


def errors_by_round(splits, dynamic, num_rounds=300):
    """Normalised test error, ``[rounds + 1, tasks]``."""
    task = tasks.mean_squared_error()
    algorithm = algorithms.fedgradnorm(
        models.body_and_head(32, 8),
        task,
        num_clients=splits.train.num_clients,
        head=trees.under("decoder"),
        head_plan=batching.steps(5, 64),
        plan=batching.steps(2, 64),
        head_learning_rate=0.02,
        learning_rate=0.01,
        server_optimizer=optax.adam(0.01),
        weight_learning_rate=0.02,
        minimum=0.01,
        measured=last_shared_layer,
        dynamic=dynamic,
        execution=VMAP,
    )
    judge = evaluate_clients(algorithm, task, VMAP, 500)
    run = simulate(
        algorithm,
        splits.train,
        num_rounds=num_rounds,
        eval_every=1,
        evaluate=lambda _, state, test, key: judge(state, test),
        evaluation_data=splits.test,
    )
    return np.array([e["normalised_error"][0] for e in run.evaluations])


def test_fedgradnorm_is_faster_and_fairer_on_tasks_of_different_scale():
    """FedGradNorm needs at most 90 % of the rounds that equal weights need.

    The rounds are those to a mean normalised error of 0.30. This holds on 4 of 5 draws of the data.
    On all draws the worst task has a lower error.
    """
    faster, fairer = 0, 0
    for seed in SEEDS:
        splits = data.scaled_tasks(seed=seed)
        equal, dynamic = (errors_by_round(splits, d) for d in (False, True))
        to_target = [int(np.argmax(e.mean(1) <= 0.30)) for e in (equal, dynamic)]
        assert all(number > 0 for number in to_target)
        faster += to_target[1] <= 0.9 * to_target[0]
        fairer += dynamic[-1].max() < equal[-1].max()
    assert faster >= 4 and fairer == 5


def test_fedgradnorm_changes_little_on_equal_tasks():
    """This is the negative control: without a difference in scale there is nothing to win."""
    splits = data.scaled_tasks((1.0, 1.0, 1.0, 1.0), seed=0)
    equal, dynamic = (errors_by_round(splits, d, 200)[-1].mean() for d in (False, True))
    assert abs(equal - dynamic) < 0.03


KINDS = {"regression": tasks.mean_squared_error(), "classification": tasks.classification()}


def scores(before=(), *, personal=trees.nothing, proximal_strength=0.0, num_rounds=20):
    """A function ``(splits, seed, *server steps) -> [steps, tasks]``.

    It is compiled once for all draws of the data. The scores are the test RMSE of the regressions
    and the accuracy of the classifications. The server is ``before``, the average and a step.
    """
    model = models.many_heads(32, 6, 8, (64, 48))
    groups = {
        name: Group(
            model.init,
            local_trainer(
                model,
                task,
                Solver(optax.sgd(0.02, momentum=0.9), batching.steps(20, 32)),
                personal=personal,
                proximal_strength=proximal_strength,
            ),
            4,
        )
        for name, task in KINDS.items()
    }

    def run(train, test, seed, server_step):
        chain = optax.chain(*before, server.step_from(optax.sgd(server_step)))
        algorithm = heterogeneous(groups, chain, weighting="uniform", execution=VMAP)
        init_key, rounds_key = jax.random.split(jax.random.key(seed))
        everybody = sampling.by_group(sampling.full_participation())

        def one_round(index, state):
            cohort_key, key = jax.random.split(jax.random.fold_in(rounds_key, index))
            return algorithm.round(state, everybody(cohort_key, index, train), key)[0]

        state = jax.lax.fori_loop(0, num_rounds, one_round, algorithm.init(init_key))
        judged = evaluate_clients(algorithm, KINDS, VMAP, 500)(state, test)
        return jnp.concatenate([judged["regression"]["rmse"], judged["classification"]["accuracy"]])

    mapped = jax.jit(jax.vmap(run, (None, None, None, 0)))

    def of_draw(splits, seed, *steps):
        return np.asarray(mapped(splits.train, splits.test, seed, jnp.array(steps, float)))

    return of_draw


def improvements(method, reference):
    """Delta_m in percent over the reference ``[tasks]``, one for each row of ``method``."""
    higher = [False] * 4 + [True] * 4
    return np.array([tasks.average_improvement(row, reference, higher)[0] for row in method])


def test_feddea_improves_its_hosts_on_every_draw():
    """The reconstruction of FedDEA improves its hosts on every draw of the data.

    The measure is Delta_m at round 20 over 30 rounds of local training. FedDEA stands against
    FedAvg, FedProx, and FedAvg with a larger step. The mask alone does not help.
    """
    decouple = server.decouple_updates(0.2)
    methods = {
        "fedavg": scores(),
        "feddea": scores([decouple]),
        "mask": scores([server.decouple_updates(0.2, rescale="none")]),
        "fedprox": scores(proximal_strength=0.05),
        "fedprox_feddea": scores([decouple], proximal_strength=0.05),
    }
    local = scores(personal=trees.everything, num_rounds=30)
    found = {name: [] for name in methods}
    for seed in SEEDS:
        splits = data.conflicting_tasks(seed=seed)
        (reference,) = local(splits, seed, 1.0)
        for name, method in methods.items():
            found[name].append(improvements(method(splits, seed, 1.0, 1.5), reference))
    found = {name: np.array(values) for name, values in found.items()}  # [draws, steps]
    gains = found["feddea"] - found["fedavg"]
    assert gains[:, 0].mean() >= 1.5 and gains.min() > 0, found
    assert (found["fedprox_feddea"] - found["fedprox"])[:, 0].min() > 0, found
    assert (found["mask"] - found["fedavg"])[:, 0].mean() <= 0, found


def test_feddea_improves_fedavg_with_its_best_step():
    """FedDEA stands against the best of FedAvg's steps on the draws that are judged here.

    It selects in every layer, with a server step of 3 that was chosen on draws 10 to 12.
    """
    plain, decoupled = scores(), scores([server.decouple_updates(0.3, scope="layer")])
    local = scores(personal=trees.everything, num_rounds=30)
    hosts, ours = [], []
    for seed in range(20, 45):
        splits = data.conflicting_tasks(seed=seed)
        (reference,) = local(splits, seed, 1.0)
        hosts.append(improvements(plain(splits, seed, 3.0, 3.5, 4.0, 4.5, 5.0), reference))
        ours.append(improvements(decoupled(splits, seed, 3.0), reference)[0])
    hosts = np.array(hosts)
    gains = np.array(ours) - hosts[:, hosts.mean(axis=0).argmax()]
    print(np.mean(ours), hosts.mean(axis=0), gains.mean(), gains.std(ddof=1) / 5)
    assert gains.mean() > 2 * gains.std(ddof=1) / len(gains) ** 0.5
