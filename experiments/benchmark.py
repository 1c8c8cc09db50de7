"""Speed: clients per second of full FedAvg rounds, this library and its peers on the same data in the same run.

    python -m experiments.benchmark [--cores=one] [--peers] [--output=benchmark.json]

Workloads (100 samples a client, one shuffled local epoch of SGD, weighted average): W1, the EMNIST CNN (two 3x3 convolutions of 32 and 64, pool, dense 128, 62 classes;
batch 20, cohorts 10 and 50); W2, a 60-64-10 MLP and a 60-10 linear model (batch 10, cohort 1000). Every measurement is a process of its own, pinned to its cores, because thread pools are sized at start and
one peer patches jax; compiling and the first round are not counted. Quote ratios of one run, not absolute figures: machines differ and are shared.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmarks import peers

WORKLOADS = {
    "cnn-10": ("cnn", 10),
    "cnn-50": ("cnn", 50),
    "mlp-1000": ("mlp", 1000),
    "linear-1000": ("linear", 1000),
}
MODES = {
    "cnn": ("default", "map", "chunk-2", "chunk-5", "vmap", "loop"),
    "mlp": ("default", "map", "chunk-10", "chunk-25", "chunk-50", "vmap"),
    "linear": ("default", "map", "chunk-10", "chunk-25", "chunk-50", "chunk-100", "vmap"),
}
SAMPLES, FEATURES = 100, 60


def make_workload(name: str) -> peers.Workload:
    """Random data of a workload's shapes."""
    model, cohort = WORKLOADS[name]
    rng = np.random.default_rng(0)
    shape = (28, 28, 1) if model == "cnn" else (FEATURES,)
    classes = 62 if model == "cnn" else 10
    return peers.Workload(
        name=model,
        inputs=rng.normal(size=(cohort, SAMPLES, *shape)).astype(np.float32),
        labels=rng.integers(0, classes, size=(cohort, SAMPLES)).astype(np.int32),
        num_classes=classes,
        cohort=cohort,
        batch_size=20 if model == "cnn" else 10,
        learning_rate=0.05,
    )


def make_ours(
    workload: peers.Workload, mode: str, num_devices: int
) -> tuple[Callable[[], None], float]:
    """One FedAvg round of this library, and the FLOPs of a round (of the gradients alone)."""
    import jax
    import jax.numpy as jnp
    import optax

    from fedjax_mtl import (
        algorithms,
        costs,
        default_execution,
        make_execution,
        make_federation,
        models,
        tasks,
    )
    from fedjax_mtl.core import batching, sampling

    shape = workload.inputs.shape[2:]
    model = {
        "cnn": lambda: models.cnn(shape, 62, kernel=3, pools=(False, True), hidden=128),
        "mlp": lambda: models.mlp(shape, 10, (64,)),
        "linear": lambda: models.linear(shape, 10),
    }[workload.name]()
    kind, _, chunk = mode.partition("-")
    params = jax.eval_shape(model.init, jax.random.key(0))
    if kind == "default":
        execution = default_execution(params)
        execution = make_execution(execution.mode, execution.chunk, num_devices)
    else:
        execution = make_execution(kind, int(chunk) if chunk else None, num_devices)
    algorithm = algorithms.fedavg(
        model,
        tasks.classification(),
        num_clients=workload.cohort,
        plan=batching.epochs(1, workload.batch_size),
        optimizer=optax.sgd(workload.learning_rate),
        execution=execution,
    )
    rows = np.arange(workload.cohort * SAMPLES).reshape(workload.cohort, SAMPLES)
    examples = {
        "inputs": workload.inputs.reshape(-1, *shape),
        "labels": workload.labels.reshape(-1),
    }
    federation = make_federation(examples, list(rows))
    sampler = sampling.full_participation()

    @jax.jit
    def one_round(state, key, federation):
        return algorithm.round(state, sampler(key, state.round, federation), key)[0]

    held = [jax.jit(algorithm.init)(jax.random.key(0))]

    def run() -> None:
        held[0] = jax.block_until_ready(one_round(held[0], jax.random.key(1), federation))

    def batch_gradient(params, inputs, labels):
        return jax.grad(
            lambda p: jnp.sum(tasks.classification().loss(model.apply(p, inputs, None), labels))
        )(params)

    batch = jax.ShapeDtypeStruct((workload.batch_size, *shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((workload.batch_size,), jnp.int32)
    per_batch = costs.flops(batch_gradient, params, batch, labels)
    return run, per_batch * workload.cohort * SAMPLES / workload.batch_size


def matrix_product_rate() -> float:
    """FLOP/s of a 1024 x 1024 x 1024 float32 matrix product here: the roof of a round."""
    import jax
    import jax.numpy as jnp

    size = 1024
    product = jax.jit(lambda a: a @ a)
    a = jnp.ones((size, size))
    jax.block_until_ready(product(a))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def time_rounds(run: Callable[[], None], min_seconds: float) -> dict[str, Any]:
    """Times rounds until ``min_seconds`` have passed, at least 5; the first, which compiles, apart."""
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    run()
    seconds: list[float] = []
    while sum(seconds) < min_seconds or len(seconds) < 5:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"first_seconds": first, "seconds": seconds}


def measure(workload_name: str, what: str, num_devices: int, min_seconds: float) -> dict[str, Any]:
    """One measurement, in this process."""
    workload = make_workload(workload_name)
    result: dict[str, Any] = {"workload": workload_name, "what": what}
    if what in peers.PEERS:
        result |= time_rounds(peers.PEERS[what](workload), min_seconds)
    else:
        run, flops = make_ours(workload, what, num_devices)
        result |= time_rounds(run, min_seconds)
        roof = matrix_product_rate()
        result["fraction_of_roof"] = flops / float(np.median(result["seconds"])) / roof
    rates = workload.cohort / np.array(result.pop("seconds"))
    result |= {
        "median": float(np.median(rates)),
        "best": float(rates.max()),
        "worst": float(rates.min()),
    }
    return result


def measure_apart(
    workload: str, what: str, cores: list[int], min_seconds: float, python: str
) -> dict[str, Any]:
    """One measurement in a process of its own on these cores; sharded modes get a host device a core."""
    command = [
        python,
        "-m",
        "experiments.benchmark",
        "--measure",
        workload,
        what,
        "--seconds",
        str(min_seconds),
    ]
    environment = dict(
        os.environ,
        OMP_NUM_THREADS=str(len(cores)),
        JAX_PLATFORMS=os.environ.get("JAX_PLATFORMS", ""),
    )
    if what.endswith("@devices"):
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={len(cores)}"
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: (
            os.sched_setaffinity(0, cores) if hasattr(os, "sched_setaffinity") else None
        ),
    )
    if done.returncode:
        return {"workload": workload, "what": what, "failed": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def suite(cores: list[int], with_peers: bool, min_seconds: float, python: str, names: list[str]):
    """All measurements on these cores, as they come."""
    for workload in names:
        model = WORKLOADS[workload][0]
        ours = list(MODES[model])
        if len(cores) > 1:
            ours.append("default@devices")
        if WORKLOADS[workload][1] > 10 and model == "cnn":
            ours.remove("loop")  # unrolled clients: compile time grows with the cohort
        others = list(peers.PEERS) if with_peers else []
        for what in [*ours, *others]:
            yield measure_apart(workload, what, cores, min_seconds, python)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cores", choices=("one", "all", "both"), default="both")
    parser.add_argument(
        "--peers", action="store_true", help="measure fedjax and PyTorch where they import"
    )
    parser.add_argument("--python", default=sys.executable, help="the interpreter that measures")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="at least this long a measurement"
    )
    parser.add_argument(
        "--workloads", nargs="*", choices=sorted(WORKLOADS), default=list(WORKLOADS)
    )
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--measure", nargs=2, metavar=("WORKLOAD", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        workload, what = arguments.measure
        what, _, on = what.partition("@")
        num_devices = 1
        if on:
            import jax

            num_devices = jax.device_count()
        found = measure(workload, what, num_devices, arguments.seconds)
        print(json.dumps(found | {"what": arguments.measure[1]}))
        return
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    sets = {"one": available[:1], "all": available}
    chosen = ["one", "all"] if arguments.cores == "both" else [arguments.cores]
    results = []
    print(
        f"{platform.machine()}, {len(available)} cores; clients per second: median (worst - best)",
        flush=True,
    )
    for name in chosen:
        for found in suite(
            sets[name], arguments.peers, arguments.seconds, arguments.python, arguments.workloads
        ):
            found["cores"] = name
            results.append(found)
            print(_line(found), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


def _line(found: dict[str, Any]) -> str:
    head = f"{found['cores']:4} {found['workload']:12} {found['what']:16}"
    if "failed" in found:
        return f"{head} not measured: {' '.join(found['failed'])}"
    line = f"{head} {found['median']:9.1f} ({found['worst']:.1f} - {found['best']:.1f})"
    line += f"  first round {found['first_seconds']:.1f} s"
    if "fraction_of_roof" in found:
        line += f"  {100 * found['fraction_of_roof']:.0f} % of the matrix-product rate"
    return line


if __name__ == "__main__":
    main()
