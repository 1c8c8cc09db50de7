"""MIRA: its algorithm on adapters, its limits, and its claim on small language models."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close

from fedjax_mtl import (
    Solver,
    algorithms,
    evaluate_clients,
    make_execution,
    models,
    server,
    simulate,
    tasks,
)
from fedjax_mtl.algorithms._mira import (
    adapter_traffic,
    mira,
    released_strength,
    server_memory,
    tuning_memory,
)
from fedjax_mtl.clients.central import train_centrally
from fedjax_mtl.core import batching, sampling
from fedjax_mtl.data.markov_chains import draw_chains, pretraining_sequences
from fedjax_mtl.models import adapters
from fedjax_mtl.relations import graphs

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "mira.json").read_text())
VMAP = make_execution("vmap")
TASK = tasks.language_modelling()
BASE = models.language_model(models.tiny_transformer(12, width=8, mlp_width=16, max_length=16))
MODEL = models.lora(BASE, targets=["*/attention/query", "*/mlp/up"], rank=2, alpha=4)
CHAINS = draw_chains(0, num_clients=6, num_groups=2, train_sequences=4, test_sequences=4)
SETTINGS = {
    "num_clients": 6,
    "solver": Solver(optax.adam(0.01), batching.steps(2, 4)),
    "execution": VMAP,
}
GROUPS = graphs.fixed(graphs.within_groups(CHAINS.groups))


def run(algorithm, num_rounds=3, sampler=None):
    sim = simulate(
        algorithm, CHAINS.splits.train, num_rounds=num_rounds, seeds=(5,), sampler=sampler
    )
    return jax.tree.map(lambda x: x[0], sim.state)


def test_fedit_golden():
    """FedIT averages A and B with numbers of examples as weights.

    The golden averages are over all clients, and over a sample of them.
    """
    given, outputs = GOLDEN["inputs"], GOLDEN["outputs"]
    clients = given["lora_after_local"]
    flat = np.array([np.concatenate([np.ravel(c["A"]), np.ravel(c["B"])]) for c in clients])
    counts = np.array(given["num_samples"], np.float32)
    averaging = server.average_clients()
    for ids, expected in (
        (np.arange(4), outputs["fedit_all"]["avg_flat"]),
        (np.array(outputs["fedit_partial"]["S"]), outputs["fedit_partial"]["avg_flat"]),
    ):
        weights = jnp.asarray(counts[ids] / counts[ids].sum())
        mean, _ = averaging.update(jnp.asarray(flat[ids]), averaging.init(None), weights=weights)
        np.testing.assert_allclose(mean, expected, atol=1e-6)


def test_no_strength_is_local_tuning():
    alone = run(algorithms.local_adapters(MODEL, TASK, **SETTINGS))
    still = run(mira(MODEL, TASK, graph=GROUPS, strength=0.0, **SETTINGS))
    assert_trees_close(alone.params, still.params)


def test_complete_graph_at_one_over_clients_is_fedit():
    graph = graphs.fixed(graphs.complete_weights(6))
    ours = run(mira(MODEL, TASK, graph=graph, strength=1 / 6, **SETTINGS))
    theirs = run(algorithms.fedit(MODEL, TASK, weighting="uniform", **SETTINGS))
    for client in range(6):
        own = jax.tree.map(lambda x, c=client: x[c], ours.params["adapters"])
        assert_trees_close(own, theirs.params["adapters"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["mira", "local", "fedit", "prompt"])
def test_base_is_held_once_and_never_moves(name):
    prompted = models.prompt_tuning(BASE, num_tokens=3, hidden=4)
    algorithm = {
        "mira": lambda: mira(MODEL, TASK, graph=GROUPS, strength=0.1, **SETTINGS),
        "local": lambda: algorithms.local_adapters(MODEL, TASK, **SETTINGS),
        "fedit": lambda: algorithms.fedit(MODEL, TASK, **SETTINGS),
        "prompt": lambda: algorithms.fedit(prompted, TASK, **SETTINGS),
    }[name]()
    start, end = run(algorithm, num_rounds=0), run(algorithm)
    assert_trees_close(start.params["base"], end.params["base"], rtol=0, atol=0)
    assert_trees_close(
        jax.tree.map(jnp.shape, end.params["base"]),
        jax.tree.map(jnp.shape, BASE.init(jax.random.key(0))),
    )
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), start.params, end.params)
    assert max(jax.tree.leaves(moved["adapters"])) > 1e-3
    count, size = adapter_traffic(prompted if name == "prompt" else MODEL)
    assert algorithm.traffic(end) == (size, size)
    # What clients keep holds no copy of the base either.
    assert sum(leaf.size for leaf in jax.tree.leaves(end.clients)) <= 6 * count


def test_clients_not_sampled_keep_their_adapters():
    algorithm = mira(MODEL, TASK, graph=GROUPS, strength=0.2, **SETTINGS)
    state = algorithm.init(jax.random.key(0))
    cohort = sampling.make_cohort(CHAINS.splits.train, jnp.array([4, 1]))
    after, _ = algorithm.round(state, cohort, jax.random.key(1))
    for leaf, old in zip(
        jax.tree.leaves(after.params["adapters"]),
        jax.tree.leaves(state.params["adapters"]),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf[jnp.array([0, 2, 3, 5])], old[jnp.array([0, 2, 3, 5])])


def test_a_newcomer_tunes_the_mean_adapters():
    algorithm = mira(
        MODEL, TASK, graph=GROUPS, strength=0.1, adaptation=batching.steps(3, 4), **SETTINGS
    )
    state = run(algorithm)
    adapted = algorithm.adapt(state, CHAINS.splits.test, jax.random.key(0))
    outputs = algorithm.predict(
        adapted, jnp.arange(6), CHAINS.splits.test.examples["inputs"][None, :3].repeat(6, 0)
    )
    assert outputs.shape == (6, 3, 12, 12) and np.isfinite(outputs).all()


@pytest.mark.parametrize("name", ["mira", "local", "fedit"])
def test_a_client_that_diverges_counts_as_absent(name):
    """Its labels make its loss infinite."""

    def loss(outputs, labels):
        broken = jnp.any(labels < 0, axis=-1)
        return TASK.loss(outputs, jnp.maximum(labels, 0)) * jnp.where(broken, jnp.inf, 1)

    task = TASK._replace(loss=loss)
    algorithm = {
        "mira": lambda: mira(MODEL, task, graph=GROUPS, strength=0.1, **SETTINGS),
        "local": lambda: algorithms.local_adapters(MODEL, task, **SETTINGS),
        "fedit": lambda: algorithms.fedit(MODEL, task, **SETTINGS),
    }[name]()
    train = CHAINS.splits.train
    labels = jnp.asarray(train.examples["labels"])
    rows = train.indices[2, : int(train.sizes[2])]
    broken = train._replace(examples={**train.examples, "labels": labels.at[rows].set(-1)})
    one_round, state = jax.jit(algorithm.round), algorithm.init(jax.random.key(0))
    everybody = jnp.arange(6)
    ours, info = one_round(state, sampling.make_cohort(broken, everybody), jax.random.key(1))
    theirs, expected = one_round(
        state, sampling.make_cohort(train, everybody, everybody != 2), jax.random.key(1)
    )
    assert info["diverged"] == 1 and info["participants"] == 5
    np.testing.assert_allclose(info["loss"], expected["loss"], rtol=1e-5)
    assert_trees_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_groups_with_tasks_of_their_own():
    """Adapters of one base on two groups, the second of which weighs its loss by half."""
    half = TASK._replace(loss=lambda outputs, labels: TASK.loss(outputs, labels) / 2)
    algorithm = mira(
        MODEL,
        {"a": TASK, "b": half},
        graph=GROUPS,
        strength=0.1,
        **{**SETTINGS, "num_clients": {"a": 4, "b": 2}},
    )
    train = CHAINS.splits.train
    population = {"a": train.take(jnp.arange(4)), "b": train.take(jnp.array([4, 5]))}
    sampler = sampling.by_group(sampling.full_participation())
    state = jax.jit(algorithm.round)(
        algorithm.init(jax.random.key(0)),
        sampler(jax.random.key(0), 0, population),
        jax.random.key(1),
    )[0]
    assert set(state.params["b"]) == {"adapters", "base"}
    assert not jax.tree.leaves(state.params["b"]["base"])
    assert algorithm.traffic(state) == (adapter_traffic(MODEL)[1],) * 2


def test_accounting():
    gpt2 = models.language_model(models.gpt2("large"))
    tuned = models.lora(gpt2, targets=["*/query_key_value", "*/output", "*/down"], rank=8)
    assert adapter_traffic(tuned, 2) == (
        4_055_040,
        8_110_080,
    )  # the letter's 7.74 MB, one way in half precision
    assert server_memory(tuned, 80)["mira"] == 80 * server_memory(tuned, 80)["fedit"]
    assert tuning_memory(tuned) == 4 * (774_030_080 + 4 * 4_055_040)
    assert released_strength(3e-4, 5, 0.5) == pytest.approx(7.5e-4)


def losses_of_methods(seed, num_rounds=60):
    """Mean test loss over all clients after 60 rounds, as in the reference's experiment E1."""
    chains = draw_chains(seed)
    base = models.language_model(models.tiny_transformer(12, max_length=16))
    pretrained = train_centrally(
        base,
        TASK,
        pretraining_sequences(seed),
        solver=Solver(optax.adam(3e-3), batching.steps(400, 64)),
        key=jax.random.key(seed),
    )
    targets = ["*/attention/query", "*/attention/value", "*/mlp/*"]
    model = models.lora(base, targets=targets, rank=4, alpha=8, deviation=0.1)
    settings = {
        "num_clients": 16,
        "solver": Solver(optax.adam(5e-3), batching.steps(5, 8)),
        "execution": VMAP,
    }
    group = graphs.fixed(graphs.within_groups(chains.groups))
    random = graphs.fixed(graphs.random(16, seed))
    methods = {
        "local": algorithms.local_adapters(model, TASK, **settings),
        "fedit": algorithms.fedit(model, TASK, weighting="uniform", **settings),
        "group": mira(model, TASK, graph=group, strength=0.1, **settings),
        "random": mira(model, TASK, graph=random, strength=0.05, **settings),
    }

    def loss(algorithm):
        judge = evaluate_clients(algorithm, TASK, VMAP)
        sim = simulate(
            algorithm,
            chains.splits.train,
            num_rounds=num_rounds,
            sampler=sampling.uniform(8),
            seeds=(seed,),
            evaluate=lambda algorithm, state, test, key: judge(state, test),
            evaluation_data=chains.splits.test,
            initial=lambda state: state._replace(
                params=adapters.load_base(state.params, pretrained.params)
            ),
        )
        return float(np.mean(sim.evaluations[-1]["loss"]))

    return {name: loss(algorithm) for name, algorithm in methods.items()}


@pytest.mark.claim
def test_mira_beats_local_tuning_and_fedit():
    """MIRA is better on every one of five seeds.

    In the mean over seeds it is better by the margins that the reference asks for.
    """
    runs = [losses_of_methods(seed) for seed in range(5)]
    for run_ in runs:
        assert run_["group"] < run_["local"] and run_["group"] < run_["fedit"], run_
        assert run_["random"] < run_["fedit"], run_
    mean = {name: np.mean([run_[name] for run_ in runs]) for name in runs[0]}
    assert mean["group"] <= mean["local"] - 0.1, mean
    assert mean["group"] <= mean["fedit"] - 0.3, mean
