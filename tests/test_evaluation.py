"""Per-client evaluation and its summaries, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ALGORITHMS, SIZES, TASK, small_federation

from fedjax_mtl import evaluate_clients, make_execution, summarise_clients


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
    found = summarise_clients(
        {"accuracy": jnp.array(accuracy), "loss": jnp.array(accuracy)}, jnp.array(sizes)
    )
    np.testing.assert_allclose(found["accuracy"], np.average(accuracy, weights=sizes), rtol=1e-5)
    np.testing.assert_allclose(found["accuracy_mean"], 0.5, rtol=1e-5)
    np.testing.assert_allclose(found["accuracy_std"], accuracy.std(), rtol=1e-5)
    np.testing.assert_allclose(
        found["accuracy_bottom_decile"], np.percentile(accuracy, 10), rtol=1e-5
    )
    np.testing.assert_allclose(found["accuracy_worst_tenth"], accuracy[:3].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["loss_bottom_decile"], np.percentile(accuracy, 90), rtol=1e-5)
    np.testing.assert_allclose(found["loss_worst_tenth"], accuracy[-3:].mean(), rtol=1e-5)
