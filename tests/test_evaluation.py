"""Per-client evaluation and its summaries, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ALGORITHMS, SIZES, TASK, small_federation

from fedjax_mtl import evaluate_clients, make_execution, summarise_clients, tasks
from fedjax_mtl.evaluation import describe_summaries


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_evaluation_is_the_mean_over_each_clients_rows(batch_size):
    algorithm, federation = ALGORITHMS["fedem"], small_federation(capacity=13)
    state = algorithm.init(jax.random.key(0))
    pi = jax.random.dirichlet(jax.random.key(1), jnp.ones(2), (6,))
    state = state._replace(clients=state.clients._replace(mixture=pi))
    judge = evaluate_clients(algorithm, TASK, make_execution("chunk", 4), batch_size)
    found = jax.jit(judge)(state, federation)
    for c, size in enumerate(SIZES):
        rows = federation.indices[c, :size]
        inputs, labels = (
            federation.examples["inputs"][rows],
            np.array(federation.examples["labels"][rows]),
        )
        outputs = np.array(algorithm.predict(state, jnp.array([c]), inputs[None])[0])
        accuracy = np.mean(outputs.argmax(1) == labels)
        log_p = outputs - np.log(np.exp(outputs).sum(1, keepdims=True))
        np.testing.assert_allclose(found["accuracy"][c], accuracy, rtol=1e-5)
        np.testing.assert_allclose(
            found["loss"][c], -log_p[np.arange(size), labels].mean(), rtol=1e-4
        )


def test_summaries():
    accuracy = np.linspace(0.1, 0.9, 25)
    sizes = np.arange(1, 26)
    values = {name: jnp.array(accuracy) for name in ("accuracy", "loss", "distance")}
    descriptions = tasks.describe(tasks.classification())
    descriptions["distance"] = tasks.Description(higher_is_better=False, unit="m")
    found = summarise_clients(values, jnp.array(sizes), descriptions)
    np.testing.assert_allclose(found["accuracy"], np.average(accuracy, weights=sizes), rtol=1e-5)
    np.testing.assert_allclose(found["accuracy_mean"], 0.5, rtol=1e-5)
    np.testing.assert_allclose(found["accuracy_std"], accuracy.std(), rtol=1e-5)
    np.testing.assert_allclose(
        found["accuracy_bottom_decile"], np.percentile(accuracy, 10), rtol=1e-5
    )
    np.testing.assert_allclose(found["accuracy_worst_tenth"], accuracy[:3].mean(), rtol=1e-5)
    # Of a metric that is better when lower, the worst are the highest, whatever its name.
    for name in ("loss", "distance"):
        decile, tenth = found[f"{name}_bottom_decile"], found[f"{name}_worst_tenth"]
        np.testing.assert_allclose(decile, np.percentile(accuracy, 90), rtol=1e-5)
        np.testing.assert_allclose(tenth, accuracy[-3:].mean(), rtol=1e-5)


def test_descriptions_of_summaries():
    metrics = {
        "speed": tasks.Description(higher_is_better=True, unit="m/s", primary=True),
        "loss": tasks.Description(higher_is_better=False),
    }
    described = describe_summaries(metrics)
    values = {name: jnp.arange(3.0) for name in metrics}
    assert set(described) == set(summarise_clients(values, jnp.ones(3), metrics))
    assert described["speed"] == metrics["speed"]
    derived = tasks.Description(higher_is_better=True, unit="m/s")
    assert described["speed_bottom_decile"] == described["speed_mean"] == derived
    assert described["speed_std"] == tasks.Description(higher_is_better=False, unit="m/s")
    assert not any(own.higher_is_better for name, own in described.items() if "loss" in name)


def test_tasks_must_come_as_the_clients_do():
    algorithm = ALGORITHMS["fedem"]
    with pytest.raises(ValueError, match=r"do not come in groups, but tasks are given for \['a'\]"):
        evaluate_clients(algorithm, {"a": TASK}, make_execution("vmap"))
    grouped = algorithm._replace(num_clients={"a": 2, "b": 1})
    with pytest.raises(ValueError, match=r"come in groups, \['a', 'b'\], but there is one task"):
        evaluate_clients(grouped, TASK, make_execution("vmap"))
