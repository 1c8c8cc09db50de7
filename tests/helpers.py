"""Small problems that the tests share, so that compiled programs are shared too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl import Solver, algorithms, make_execution, make_federation, models, tasks
from fedjax_mtl.core import batching
from fedjax_mtl.relations import gossip, graphs

SIZES = (5, 9, 3, 7, 4, 8)
NUM_CLIENTS = len(SIZES)
TASK = tasks.classification()
MODEL = models.mlp((4,), 3, (5,))
PLAN = batching.epochs(2, 4)
SOLVER = Solver(optax.sgd(0.1, momentum=0.5), PLAN)
VMAP = make_execution("vmap")


def make_examples(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, 4)).astype(np.float32)
    labels = (inputs[:, 0] > 0).astype(np.int32) + (inputs[:, 1] > 0.5)
    return {"inputs": inputs, "labels": labels.astype(np.int32)}


def small_federation(capacity: int | None = None, sizes=SIZES):
    """A federation of six clients with different numbers of examples."""
    rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return make_federation(make_examples(sum(sizes)), rows, capacity)


def poisoned(federation, client):
    """The federation whose client ``client`` sees infinities, past make_federation's check."""
    rows = federation.indices[client, : int(federation.sizes[client])]
    inputs = jnp.asarray(federation.examples["inputs"]).at[rows].set(jnp.inf)
    return federation._replace(examples={**federation.examples, "inputs": inputs})


# --- The same clients in two groups, whose tasks differ.

GROUP_COUNTS = {"first": 4, "second": 2}
GROUP_TASKS = {"first": TASK, "second": tasks.regression()}


def decoder_model(task: str, outputs: int) -> models.Model:
    """A common encoder, and a decoder of two layers under the task's own name."""
    encoder = models.linear((4,), 5)
    inner, outer = models.linear((5,), 4), models.linear((4,), outputs)

    def init(key):
        # A task's decoder starts alike in every group, and the encoder whatever the task is.
        parts = (encoder.init(key), inner.init(key), outer.init(key))
        first, second, third = (part["decoder"] for part in parts)
        return {"encoder": first, "decoders": {task: {"inner": second, "outer": third}}}

    def apply(params, inputs, key=None):
        own = params["decoders"][task]
        hidden = jnp.tanh(encoder.apply({"decoder": params["encoder"]}, inputs, key))
        hidden = jnp.tanh(inner.apply({"decoder": own["inner"]}, hidden, key))
        return outer.apply({"decoder": own["outer"]}, hidden, key)

    return models.Model(init, apply)


GROUP_MODELS = {"first": decoder_model("labels", 3), "second": decoder_model("value", 1)}


def small_population(sizes=SIZES):
    """The six clients in two groups.

    The last two clients learn a value instead of classes.
    """
    whole = small_federation(sizes=sizes)
    value = np.sin(np.asarray(whole.examples["inputs"])[:, :1] * 2)
    regression = {"inputs": whole.examples["inputs"], "labels": jnp.asarray(value)}
    return {
        "first": whole.take(jnp.arange(4)),
        "second": whole._replace(examples=regression).take(jnp.array([4, 5])),
    }


# --- The algorithms.


def make_algorithms(
    execution=VMAP, num_clients=NUM_CLIENTS, model=MODEL, task=TASK, plan=PLAN, solver=SOLVER
):
    """Every algorithm that maps a client update over a cohort, by name.

    Clients come in groups if ``num_clients`` says so.
    """
    around = {"model": model, "task": task, "num_clients": num_clients, "execution": execution}
    training = {**around, "solver": solver}
    count = sum(num_clients.values()) if isinstance(num_clients, dict) else num_clients
    ring = gossip.metropolis_weights(gossip.ring(count))
    return {
        "agnostic": algorithms.agnostic(
            **around,
            mixture=jnp.full(count, 1 / count),
            optimizer=optax.sgd(0.1),
            mixture_learning_rate=0.1,
            batch_size=plan.batch_size,
        ),
        "apfl": algorithms.apfl(**training, alpha=0.4, alpha_learning_rate=0.01),
        "clustered": algorithms.clustered(**training, mean_below=10.0, largest_above=0.0),
        "decentralized_fedem": algorithms.decentralized_fedem(
            **training, mixing_matrix=jnp.asarray(ring), num_components=2
        ),
        "fedgradnorm": algorithms.fedgradnorm(
            **around,
            head_plan=batching.steps(2, plan.batch_size),
            plan=batching.steps(2, plan.batch_size),
            head_learning_rate=0.1,
            learning_rate=0.1,
            server_optimizer=optax.adam(0.05),
        ),
        "fedrep": algorithms.fedrep(**training, head_plan=batching.steps(2, plan.batch_size)),
        "fedadam": algorithms.fedadam(**training, server_learning_rate=0.05),
        "fedavg": algorithms.fedavg(**training),
        "fedavg_tuned": algorithms.fedavg_tuned(**training),
        "feddea": algorithms.feddea(**training),
        "fedem": algorithms.fedem(**training, num_components=2),
        "fedem_released": algorithms.fedem(**training, num_components=2, fidelity="released"),
        "fedprox": algorithms.fedprox(**training, proximal_strength=0.5),
        "l2sgd": algorithms.l2sgd(
            **around,
            learning_rate=0.1,
            penalty=0.3,
            probability=0.3,
            batch_size=plan.batch_size,
        ),
        "local": algorithms.local(**training),
        "pfedme": algorithms.pfedme(**training, learning_rate=0.05, inner_steps=2),
        "pfedme_released": algorithms.pfedme(**training, penalty=0.1, fidelity="released"),
        "q_ffl": algorithms.q_ffl(**around, plan=plan, learning_rate=0.1, q=1.0),
        **related_algorithms(training, count),
    }


def related_algorithms(training, count):
    """The algorithms whose clients keep models of their own, which the server relates."""
    graph = graphs.random(count, seed=1)
    parts = ("encoder", "decoder" if training["model"] is MODEL else "decoders")
    return {
        "ditto": algorithms.ditto(**training, penalty=0.3),
        "fedamp": algorithms.fedamp(**training, bandwidth="median", parts=parts),
        "fedhca2": algorithms.fedhca2(**training),
        "fedmtl": algorithms.fedmtl(**training),
        "fedu": algorithms.fedu(**training, graph=graphs.fixed(graph), strength=0.1),
        "fedu_all": algorithms.fedu(
            **training, graph=graphs.learned(), strength=0.1, neighbours="all"
        ),
        "matfl": algorithms.matfl(**training),
        "sheaf_fmtl": algorithms.sheaf_fmtl(
            **training,
            adjacency=graph,
            strength=0.05,
            map_step=0.01,
            compression=0.2,
            deviation=0.3,
        ),
    }


def make_grouped_algorithms(execution=VMAP, **changes):
    """The algorithms for the clients of :func:`small_population`."""
    around = {"num_clients": GROUP_COUNTS, "model": GROUP_MODELS, "task": GROUP_TASKS}
    return make_algorithms(execution, **{**around, **changes})


ALGORITHMS = make_algorithms()


def assert_trees_close(ours, theirs, rtol=2e-5, atol=2e-6):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def apply_server(transformation, updates, **extra):
    """The first update of a server transformation; ``updates`` ``[clients, ...]``."""
    state = transformation.init(jax.tree.map(lambda x: x[0], updates))
    return transformation.update(updates, state, **extra)[0]
