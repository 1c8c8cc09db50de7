"""MOCHA's claims.

A relation that is learned over the tasks beats one model for each task and one model for all, and
failures and stragglers cost what they should.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mocha_problems import every_fourth_is_test, reference_data
from sklearn.metrics import roc_auc_score

from fedjax_mtl import Federation, costs, simulate
from fedjax_mtl.algorithms import (
    cocoa,
    global_model,
    local_models,
    minibatch_sdca,
    minibatch_sgd,
    mocha,
)
from fedjax_mtl.core import sampling
from fedjax_mtl.data.task_tables import TaskTable, related_tasks, split_tasks
from fedjax_mtl.relations import covariance
from fedjax_mtl.tasks import dual

pytestmark = pytest.mark.claim
PENALTIES = jnp.array([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def errors(weights, federation):
    """Mean over tasks of the error of ``weights [penalties, tasks, features]``, ``[penalties]``.

    A score of 0 counts as wrong.
    """
    inputs = federation.examples["inputs"][federation.indices]
    labels = federation.examples["labels"][federation.indices]
    real = jnp.arange(federation.capacity) < federation.sizes[:, None]
    wrong = jnp.sign(jnp.einsum("tcf,ptf->ptc", inputs, weights)) != labels
    return jnp.mean(jnp.sum(wrong & real, axis=2) / federation.sizes, axis=1)


def runner(factory, rounds, loss=dual.hinge, penalties=PENALTIES):
    """A function ``(federation, key) -> weights [penalties, tasks, features]``.

    It is compiled once for all folds and shuffles.
    """

    @jax.jit
    def run(federation, key):
        def one(penalty):
            algorithm = factory(
                loss(),
                sizes=federation.sizes,
                capacity=federation.capacity,
                features=federation.examples["inputs"].shape[1],
                penalty=penalty,
                dtype=jnp.float64,
            )
            everybody = sampling.make_cohort(federation, jnp.arange(federation.num_clients))

            def one_round(index, state):
                return algorithm.round(state, everybody, jax.random.fold_in(key, index))[0]

            return jax.lax.fori_loop(0, rounds, one_round, algorithm.init(key)).clients.weights

        return jax.vmap(one)(jnp.array(penalties, jnp.float64))

    return run


def folds(federation, num_folds=5):
    """Folds of a cross-validation inside the training examples.

    Every fifth example is held out: in the first fold from the first example on, in the second fold
    from the second, and so on.
    """
    indices, sizes = np.asarray(federation.indices), np.asarray(federation.sizes)
    for fold in range(num_folds):
        parts = {"train": [], "held": []}
        for own, size in zip(indices, sizes, strict=True):
            held = np.arange(size) % num_folds == fold
            parts["held"].append(own[:size][held])
            parts["train"].append(own[:size][~held])
        yield tuple(_packed(federation, parts[name]) for name in ("train", "held"))


def _packed(federation, rows) -> Federation:
    indices = np.zeros(federation.indices.shape, np.int32)
    for task, own in enumerate(rows):
        indices[task, : len(own)] = own
    return federation._replace(
        indices=jnp.asarray(indices), sizes=jnp.asarray([len(own) for own in rows], jnp.int32)
    )


def test_error_of(table: TaskTable, methods, shuffles, as_released=False):
    """Test error of each method, ``[shuffles]``.

    Methods train on 75 % of the data, with the penalty that 5-fold cross-validation chooses. With
    ``as_released`` only the last fold counts, and examples stay in the table's order, as in MOCHA's
    released code.
    """
    results = {name: [] for name in methods}
    sizes = [len(rows) for rows in table.rows]
    for shuffle in range(shuffles):
        splits = split_tasks(table, seed=shuffle, keep_order=as_released)
        train = _packed(_widened(splits.train, max(sizes)), _rows(splits.train))
        chosen = list(folds(train))[-1 if as_released else 0 :]
        for name, run in methods.items():
            key = jax.random.key(shuffle)
            scores = sum(errors(run(part, key), held) for part, held in chosen)
            best = int(jnp.argmin(scores))
            results[name].append(float(errors(run(train, key), splits.test)[best]))
    return {name: np.array(values) for name, values in results.items()}


test_error_of.__test__ = False


def _widened(federation, capacity):
    padding = capacity - federation.capacity
    return federation._replace(indices=jnp.pad(federation.indices, ((0, 0), (0, padding))))


def _rows(federation):
    """The rows of each client."""
    return [
        np.asarray(own[:size])
        for own, size in zip(federation.indices, federation.sizes, strict=True)
    ]


def describe(results):
    """Mean and standard error, in percent."""
    return {
        name: f"{100 * v.mean():.2f} ({100 * v.std(ddof=1) / len(v) ** 0.5:.2f})"
        for name, v in results.items()
    }


def assert_clearly_below(lower, higher):
    """The mean difference over shuffles is more than twice its standard error."""
    difference = higher - lower
    assert difference.mean() > 2 * difference.std(ddof=1) / len(difference) ** 0.5


def learned(ridge):
    def factory(loss, **settings):
        relation = covariance.task_relationship(ridge)
        return mocha(loss, relationship=relation, relationship_every=100, passes=0.5, **settings)

    return factory


def test_related_tasks_learn_from_each_other():
    table = related_tasks(num_tasks=20, features=15, smallest=20, largest=60, spread=0.4, seed=0)
    methods = {
        "mtl": runner(learned(1.0), 500),
        "local": runner(local_models, 100),
        "global": runner(global_model, 50),
    }
    results = test_error_of(table, methods, 10)
    print(describe(results))
    assert_clearly_below(results["mtl"], results["local"])
    assert_clearly_below(results["mtl"], results["global"])


def landmine(intercept):
    """The 29 fields, with a constant feature if there is to be an intercept."""
    data = reference_data("landmine")
    ends = np.cumsum(data["task_sizes"])
    inputs = data["X"].astype(float)
    if intercept:
        inputs = np.concatenate([inputs, np.ones((ends[-1], 1))], axis=1)
    return TaskTable(inputs, data["y"].astype(float), np.split(np.arange(ends[-1]), ends[:-1]))


def test_landmine_as_released():
    """The paper's table by the released code's protocol.

    Methods are SVMs without intercept, judged by the test error over ten shuffles. MOCHA learns its
    relation once in a hundred rounds of half a pass. Local and global models are trained as the
    code does it, in the table's order. Local models that are trained in random order for as long as
    MOCHA are level with it.
    """
    penalties = [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 10.0]

    def alternation(fidelity):
        def factory(loss, **settings):
            relation = covariance.task_relationship()
            return mocha(
                loss,
                relationship=relation,
                relationship_every=100,
                passes=0.5,
                fidelity=fidelity,
                **settings,
            )

        return runner(factory, 999, penalties=penalties)

    def trained_as_released(factory):
        return runner(functools.partial(factory, fidelity="released"), 1, penalties=penalties)

    methods = {
        "mtl": alternation("paper"),
        "mtl_released": alternation("released"),
        "local": trained_as_released(local_models),
        "global": trained_as_released(global_model),
    }
    results = test_error_of(landmine(intercept=False), methods, 10, as_released=True)
    print(describe(results))
    for name in ("mtl", "mtl_released"):
        assert_clearly_below(results[name], results["local"])
        assert_clearly_below(results[name], results["global"])


def test_landmine_with_few_examples():
    """MOCHA ranks mines better than local and global models that train on a quarter of the data.

    There are ten shuffles, and the loss is logistic with an intercept. The score is how often a
    mine ranks behind another object (1 - AUC, mean of the tasks), because test error says little
    here: a constant errs on 6 %. The ridge, and MOCHA's coupling to the mean, are chosen by the log
    loss in 5-fold cross-validation.

    With a tenth of the data MOCHA is far ahead of one model for each task, and ahead of one model
    for all by less than two standard errors.
    """
    ridges, couplings = (1e-3, 1e-2, 0.1), (0.03, 0.1, 0.3)

    def coupled(coupling):
        def factory(loss, penalty, **settings):
            relation = covariance.mean_regularised(1.0, coupling, penalty / 2)
            return mocha(
                loss,
                relationship=relation,
                penalty=1.0,
                sigma_prime="eigenvalue",
                passes=3,
                **settings,
            )

        return runner(factory, 30, dual.logistic, ridges)

    candidates = {
        "mtl": [coupled(coupling) for coupling in couplings],
        "local": [runner(functools.partial(local_models, passes=3), 20, dual.logistic, ridges)],
        "global": [runner(functools.partial(global_model, passes=3), 20, dual.logistic, ridges)],
    }
    table = landmine(intercept=True)
    misranked = {name: [] for name in candidates}
    for shuffle in range(10):
        splits = split_tasks(table, train_share=0.25, seed=shuffle)
        train = _packed(splits.train, _rows(splits.train))
        key = jax.random.key(shuffle)
        for name, runs in candidates.items():
            scores = [
                sum(log_losses(run(part, key), held) for part, held in folds(train)) for run in runs
            ]
            which, penalty = np.unravel_index(np.argmin(scores), np.shape(scores))
            weights = runs[which](train, key)[penalty]
            misranked[name].append(1 - mean_auc(weights, splits.test))
    results = {name: np.array(values) for name, values in misranked.items()}
    print(describe(results))
    assert_clearly_below(results["mtl"], results["local"])
    assert_clearly_below(results["mtl"], results["global"])


def log_losses(weights, federation):
    """Mean over tasks of the logistic loss, ``[penalties]``.

    ``weights`` is ``[penalties, tasks, features]``.
    """
    inputs = federation.examples["inputs"][federation.indices]
    labels = federation.examples["labels"][federation.indices]
    real = jnp.arange(federation.capacity) < federation.sizes[:, None]
    losses = dual.logistic().loss(jnp.einsum("tcf,ptf->ptc", inputs, weights), labels)
    return np.asarray(
        jnp.mean(jnp.sum(jnp.where(real, losses, 0), axis=2) / federation.sizes, axis=1)
    )


def mean_auc(weights, federation):
    """Mean over tasks of the area under the curve."""
    inputs, labels = (np.asarray(federation.examples[name]) for name in ("inputs", "labels"))
    scores = [
        roc_auc_score(labels[rows], inputs[rows] @ own)
        for rows, own in zip(_rows(federation), np.asarray(weights), strict=True)
    ]
    return np.mean(scores)


def rounds_to(primal, optimum, targets):
    return [
        int(np.argmax(primal - optimum <= t)) + 1 if (primal - optimum <= t).any() else None
        for t in targets
    ]


def rounds_under_drops(
    train, settings, relation, probabilities, num_rounds, targets, seeds=range(5)
):
    """Mean rounds to each sub-optimality, ``[probabilities, targets]``."""
    algorithm = mocha(dual.hinge(), relationship=relation, **settings)
    exact = mocha(
        dual.hinge(), relationship=relation, sigma_prime="eigenvalue", passes=5, **settings
    )
    optimum = simulate(exact, train, num_rounds=1500).metrics["dual"][0, -1]
    table = []
    for probability in probabilities:
        sampler = sampling.dropping(sampling.full_participation(), probability)
        primal = np.asarray(
            simulate(
                algorithm, train, num_rounds=num_rounds, seeds=tuple(seeds), sampler=sampler
            ).metrics["primal"]
        )
        table.append(np.mean([rounds_to(own, optimum, targets) for own in primal], axis=0))
    return np.array(table)


def settings_of(train, penalty):
    return {
        "sizes": train.sizes,
        "capacity": train.capacity,
        "features": train.examples["inputs"].shape[1],
        "penalty": penalty,
        "dtype": jnp.float64,
    }


def test_drops_cost_rounds_in_proportion():
    """Drops with probability p take about 1 / (1 - p) times the rounds, for every target."""
    table = related_tasks(num_tasks=20, features=10, smallest=20, largest=60, seed=1)
    train = split_tasks(table).train
    relation = covariance.mean_regularised(1e-2, 0.02, 0.02)
    probabilities = (0.0, 0.25, 0.5, 0.75)
    rounds = rounds_under_drops(
        train, settings_of(train, 1e-2), relation, probabilities, 2500, (0.1, 0.01)
    )
    print(rounds)
    ratios = rounds / rounds[0]
    for ratio, probability in zip(ratios[1:], probabilities[1:], strict=True):
        np.testing.assert_allclose(ratio, 1 / (1 - probability), rtol=0.3)


def test_drops_on_the_toy_data():
    """The reference's table: one row for each drop probability, with the rounds to each target."""
    train, _ = every_fourth_is_test(reference_data("mocha_small"))
    relation = covariance.mean_regularised(1e-3, 0.01, 0.0045)
    rounds = rounds_under_drops(
        train, settings_of(train, 1e-3), relation, (0.0, 0.25, 0.5, 0.75), 2000, (0.1, 0.01, 0.001)
    )
    print(rounds)
    expected = [[44, 129, 330], [59, 179, 433], [90, 265, 669], [175, 519, 1371]]
    np.testing.assert_allclose(rounds, expected, rtol=0.15)


def test_ahead_in_time_under_stragglers():
    """MOCHA is the first to reach a sub-optimality of 0.1, over every network and in all ten draws.

    Times are those that the cost model estimates.
    """
    times = {name: [] for name in ("mocha", "cocoa", "minibatch_sdca", "minibatch_sgd")}
    for seed in range(10):
        table = related_tasks(num_tasks=20, features=10, smallest=10, largest=300, seed=seed)
        train = split_tasks(table, seed=seed).train
        settings = settings_of(train, 1e-2)
        relation = covariance.mean_regularised(1e-2, 0.02, 0.02)
        exact = mocha(
            dual.hinge(), relationship=relation, sigma_prime="eigenvalue", passes=5, **settings
        )
        optimum = float(simulate(exact, train, num_rounds=500).metrics["dual"][0, -1])
        methods = {
            "mocha": (mocha, {}, 400),
            "cocoa": (cocoa, {"inexactness": 0.5, "max_passes": 50}, 60),
            "minibatch_sdca": (minibatch_sdca, {"scaling": 100.0}, 1500),
            "minibatch_sgd": (minibatch_sgd, {"scaling": 1.0}, 1500),
        }
        # Every node manages 10 to 100 % of a pass in each round, but CoCoA has to reach its theta
        # all the same.
        slow = sampling.straggling(
            sampling.full_participation(), sampling.fraction_of_data(0.1, 1.0)
        )
        for name, (factory, changes, num_rounds) in methods.items():
            algorithm = factory(dual.hinge(), relationship=relation, **settings, **changes)
            metrics = simulate(
                algorithm, train, num_rounds=num_rounds, sampler=slow, seeds=(seed,)
            ).metrics
            primal, slowest = (np.asarray(metrics[k][0]) for k in ("primal", "slowest_steps"))
            reached = primal - optimum <= 0.1
            per_network = []
            for network in costs.NETWORKS:
                one = costs.estimated_round_time(
                    name,
                    steps=float(train.sizes.sum()),
                    slowest=slowest,
                    num_tasks=20,
                    network=network,
                )
                clock = np.cumsum(np.broadcast_to(one, primal.shape))
                per_network.append(clock[np.argmax(reached)] if reached.any() else np.inf)
            times[name].append(per_network)
    times = {name: np.array(values) for name, values in times.items()}
    print({name: np.median(values, axis=0) for name, values in times.items()})
    for other in ("cocoa", "minibatch_sdca", "minibatch_sgd"):
        assert (times["mocha"] < times[other]).all(), {
            n: np.median(v, axis=0) for n, v in times.items()
        }
