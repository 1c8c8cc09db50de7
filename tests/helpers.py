"""A small problem that the tests share, so that compiled programs are shared too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl import algorithms, make_execution, make_federation, models, tasks
from fedjax_mtl.core import batching, trees
from fedjax_mtl.relations import gossip, graphs

SIZES = (5, 9, 3, 7, 4, 8)
NUM_CLIENTS = len(SIZES)
TASK = tasks.classification()
MODEL = models.mlp((4,), 3, (5,))
PLAN = batching.epochs(2, 4)
VMAP = make_execution("vmap")


def make_examples(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, 4)).astype(np.float32)
    labels = (inputs[:, 0] > 0).astype(np.int32) + (inputs[:, 1] > 0.5)
    return {"inputs": inputs, "labels": labels.astype(np.int32)}


def small_federation(capacity: int | None = None, sizes=SIZES):
    """Six ragged clients."""
    rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return make_federation(make_examples(sum(sizes)), rows, capacity)


def make_algorithms(execution=VMAP, num_clients=NUM_CLIENTS):
    """Every algorithm of the package on the small problem, by name."""
    around = {
        "model": MODEL,
        "task": TASK,
        "num_clients": num_clients,
        "execution": execution,
    }
    training = {**around, "plan": PLAN, "optimizer": optax.sgd(0.1, momentum=0.5)}
    graph = gossip.metropolis_weights(gossip.ring(num_clients))
    decentralised = {k: v for k, v in training.items() if k != "num_clients"}
    return {
        "agnostic": algorithms.agnostic(
            **around,
            mixture=jnp.full(num_clients, 1 / num_clients),
            optimizer=optax.sgd(0.1),
            mixture_learning_rate=0.1,
            batch_size=4,
        ),
        "apfl": algorithms.apfl(**training, alpha=0.4, alpha_learning_rate=0.01),
        "clustered": algorithms.clustered(**training, mean_below=10.0, largest_above=0.0),
        "decentralized_fedem": algorithms.decentralized_fedem(
            **decentralised, mixing_matrix=jnp.asarray(graph), num_components=2
        ),
        "fedgradnorm": algorithms.fedgradnorm(
            **around,
            head=trees.under("decoder"),
            head_plan=batching.steps(2, 4),
            plan=batching.steps(2, 4),
            head_learning_rate=0.1,
            learning_rate=0.1,
            server_optimizer=optax.adam(0.05),
        ),
        "fedrep": algorithms.fedrep(
            **training, head=trees.under("decoder"), head_plan=batching.steps(2, 4)
        ),
        "fedavg": algorithms.fedavg(**training),
        "fedavg_tuned": algorithms.fedavg_tuned(**training),
        "fedem": algorithms.fedem(**training, num_components=2),
        "fedem_released": algorithms.fedem(**training, num_components=2, fidelity="released"),
        "fedprox": algorithms.fedprox(**training, proximal_strength=0.5),
        "l2sgd": algorithms.l2sgd(
            **around, learning_rate=0.1, penalty=0.3, probability=0.3, batch_size=4
        ),
        "local": algorithms.local(**training),
        "pfedme": algorithms.pfedme(**training, learning_rate=0.05, inner_steps=2),
        "pfedme_released": algorithms.pfedme(**training, penalty=0.1, fidelity="released"),
        "q_ffl": algorithms.q_ffl(**around, plan=PLAN, learning_rate=0.1, q=1.0),
        **relational_algorithms(training, num_clients),
    }


def relational_algorithms(training, num_clients):
    """Those whose clients keep models of their own that the server relates."""
    graph = graphs.random(num_clients, seed=1)
    parts = {"encoder": trees.under("encoder")}
    return {
        "ditto": algorithms.ditto(**training, penalty=0.3),
        "fedamp": algorithms.fedamp(**training, bandwidth="median", parts=("encoder", "decoder")),
        "fedhca2": algorithms.fedhca2(**training, **parts, decoder=trees.under("decoder")),
        "fedmtl": algorithms.fedmtl(**training),
        "fedu": algorithms.fedu(**training, graph=graphs.fixed(graph), strength=0.1),
        "fedu_all": algorithms.fedu(
            **training, graph=graphs.learned(), strength=0.1, neighbours="all"
        ),
        "matfl": algorithms.matfl(**training, **parts),
        "sheaf_fmtl": algorithms.sheaf_fmtl(
            **training,
            adjacency=graph,
            strength=0.05,
            map_step=0.01,
            compression=0.2,
            deviation=0.3,
        ),
    }


ALGORITHMS = make_algorithms()


def assert_trees_close(ours, theirs, rtol=2e-5, atol=2e-6):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def apply_server(transformation, updates, **extra):
    """The first update of a server transformation; ``updates`` ``[clients, ...]``."""
    state = transformation.init(jax.tree.map(lambda x: x[0], updates))
    return transformation.update(updates, state, **extra)[0]
