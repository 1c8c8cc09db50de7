"""FedAvg rounds of this library, for the speed benchmark: a round, and the FLOPs it needs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.peers import RoundFn, Workload
from fedjax_mtl import (
    Algorithm,
    Execution,
    Federation,
    Model,
    Solver,
    algorithms,
    costs,
    default_execution,
    make_execution,
    make_federation,
    models,
    tasks,
)
from fedjax_mtl.core import batching, sampling

PyTree = Any

MODELS: dict[str, Callable[[tuple[int, ...], int], Model]] = {
    "cnn": lambda shape, classes: models.cnn(
        shape, classes, kernel=3, pools=(False, True), hidden=128
    ),
    "mlp": lambda shape, classes: models.mlp(shape, classes, (64,)),
    "linear": models.linear,
}


def make_model(workload: Workload) -> Model:
    """The model of a workload."""
    return MODELS[workload.name](workload.inputs.shape[2:], workload.num_classes)


def make_mapping(mode: str, params: PyTree, num_devices: int) -> Execution:
    """How clients are mapped.

    Args:
        mode: ``default``, or a mode of :class:`fedjax_mtl.Execution`, ``chunk-<clients>`` with the
            clients of a chunk.
        params: of the model, arrays or shapes.
        num_devices: over which the clients are split.
    """
    kind, _, chunk = mode.partition("-")
    if kind == "default":
        chosen = default_execution(params)
        return make_execution(chosen.mode, chosen.chunk, num_devices)
    return make_execution(kind, int(chunk) if chunk else None, num_devices)


def make_data(workload: Workload) -> Federation:
    """The data of a workload's clients."""
    cohort, samples = workload.labels.shape
    examples = {
        "inputs": workload.inputs.reshape(-1, *workload.inputs.shape[2:]),
        "labels": workload.labels.reshape(-1),
    }
    return make_federation(examples, list(np.arange(cohort * samples).reshape(cohort, samples)))


def run_rounds(algorithm: Algorithm, federation: Federation) -> RoundFn:
    """A function that runs one compiled round, each after the one before."""
    sampler = sampling.full_participation()

    @jax.jit
    def one_round(state: PyTree, key: jax.Array, federation: Federation) -> PyTree:
        return algorithm.round(state, sampler(key, state.round, federation), key)[0]

    state = jax.jit(algorithm.init)(jax.random.key(0))

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(one_round(state, jax.random.key(1), federation))

    return run


def make_round(workload: Workload, mode: str, num_devices: int) -> RoundFn:
    """A function that runs one FedAvg round of this library.

    Args:
        workload: the clients, and how they train.
        mode: as for :func:`make_mapping`.
        num_devices: as for :func:`make_mapping`.
    """
    model = make_model(workload)
    params = jax.eval_shape(model.init, jax.random.key(0))
    plan = batching.epochs(1, workload.batch_size)
    algorithm = algorithms.fedavg(
        model,
        tasks.classification(),
        num_clients=workload.cohort,
        solver=Solver(optax.sgd(workload.learning_rate), plan),
        execution=make_mapping(mode, params, num_devices),
    )
    return run_rounds(algorithm, make_data(workload))


def gradient_flops(workload: Workload) -> float:
    """The FLOPs of a round, of the gradients alone."""
    model, losses = make_model(workload), tasks.classification().loss

    def gradient(params: PyTree, inputs: jax.Array, labels: jax.Array) -> PyTree:
        return jax.grad(lambda p: jnp.sum(losses(model.apply(p, inputs, None), labels)))(params)

    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = (workload.batch_size, *workload.inputs.shape[2:])
    inputs = jax.ShapeDtypeStruct(batch, jnp.float32)
    labels = jax.ShapeDtypeStruct((workload.batch_size,), jnp.int32)
    one_batch = costs.flops(gradient, params, inputs, labels)
    return one_batch * workload.labels.size / workload.batch_size
