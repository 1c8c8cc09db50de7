"""Speed: clients per second of full FedAvg rounds, of this library and of others on the same data.

    python -m experiments.benchmark [--cores=one] [--peers] [--output=benchmark.json]

A round is one shuffled local epoch of SGD over 100 samples a client, and a weighted average. There
are two kinds of workload:

- W1, the EMNIST CNN: two 3x3 convolutions of 32 and 64 channels, a pool, a dense layer of 128, 62
  classes; batches of 20, cohorts of 10 and 50.
- W2, a 60-64-10 MLP and a 60-10 linear model; batches of 10, a cohort of 1000.

Every measurement is a process of its own, pinned to its cores, because thread pools are sized when
a process starts and one peer patches jax. Compiling and the first round are not counted. Quote
ratios of one run and not absolute figures: machines differ and are shared.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
ON_DEVICES = "@devices"


# --- One measurement, in this process.


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


def matrix_product_rate() -> float:
    """FLOP/s of a 1024 x 1024 x 1024 float32 matrix product here: the roof of a round."""
    import jax
    import jax.numpy as jnp

    size = 1024
    product = jax.jit(lambda a: a @ a)
    a = jnp.ones((size, size))
    jax.block_until_ready(product(a))
    seconds = [_seconds(lambda: jax.block_until_ready(product(a))) for _ in range(5)]
    return 2 * size**3 / min(seconds)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_rounds(run: Callable[[], None], min_seconds: float) -> tuple[float, list[float]]:
    """Times rounds.

    Args:
        run: runs one round.
        min_seconds: how much time the rounds take together at least; there are at least 5.

    Returns:
        The seconds of the first round, which compiles, and those of the rounds after the second.
    """
    first = _seconds(run)
    run()
    seconds: list[float] = []
    while sum(seconds) < min_seconds or len(seconds) < 5:
        seconds.append(_seconds(run))
    return first, seconds


def measure(workload_name: str, what: str, num_devices: int, min_seconds: float) -> dict[str, Any]:
    """Makes one measurement.

    Args:
        workload_name: one of ``WORKLOADS``.
        what: a peer, or a mode of this library.
        num_devices: over which this library splits the clients.
        min_seconds: as for :func:`time_rounds`.

    Returns:
        Clients per second (``median``, ``best`` and ``worst`` of the rounds), ``first_seconds`` of
        the round that compiles, and for this library the ``fraction_of_roof``, the FLOP/s reached
        as a share of :func:`matrix_product_rate`.
    """
    workload = make_workload(workload_name)
    result: dict[str, Any] = {"workload": workload_name, "what": what}
    if what in peers.PEERS:
        first, seconds = time_rounds(peers.PEERS[what](workload), min_seconds)
    else:
        from experiments.benchmarks import ours

        first, seconds = time_rounds(ours.make_round(workload, what, num_devices), min_seconds)
        reached = ours.gradient_flops(workload) / float(np.median(seconds))
        result["fraction_of_roof"] = reached / matrix_product_rate()
    rates = workload.cohort / np.array(seconds)
    return result | {
        "first_seconds": first,
        "median": float(np.median(rates)),
        "best": float(rates.max()),
        "worst": float(rates.min()),
    }


def _print_measurement(workload: str, what: str, min_seconds: float) -> None:
    """Measures here, and prints the result as one line of JSON for :func:`measure_apart`."""
    num_devices = 1
    if what.endswith(ON_DEVICES):
        import jax

        num_devices = jax.device_count()
    found = measure(workload, what.removesuffix(ON_DEVICES), num_devices, min_seconds)
    print(json.dumps(found | {"what": what}))


# --- All measurements, each in a process of its own.


def measure_apart(
    workload: str, what: str, cores: Sequence[int], min_seconds: float, python: str
) -> dict[str, Any]:
    """Makes one measurement in a process of its own.

    Args:
        workload: one of ``WORKLOADS``.
        what: a peer, or a mode of this library; one that ends in ``@devices`` gets a host device a
            core, over which the clients are split.
        cores: the process is pinned to them.
        min_seconds: as for :func:`time_rounds`.
        python: the interpreter.

    Returns:
        As :func:`measure`, or the last line of what went wrong as ``failed``.
    """
    measurement = ["--measure", workload, what, "--seconds", str(min_seconds)]
    environment = dict(
        os.environ,
        OMP_NUM_THREADS=str(len(cores)),
        JAX_PLATFORMS=os.environ.get("JAX_PLATFORMS", ""),
    )
    if what.endswith(ON_DEVICES):
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={len(cores)}"
    pin = (lambda: os.sched_setaffinity(0, cores)) if hasattr(os, "sched_setaffinity") else None
    done = subprocess.run(
        [python, "-m", "experiments.benchmark", *measurement],
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=pin,
    )
    if done.returncode:
        return {"workload": workload, "what": what, "failed": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def sides(workload: str, num_cores: int, with_peers: bool) -> list[str]:
    """What is measured on a workload: modes of this library, and peers.

    Args:
        workload: one of ``WORKLOADS``.
        num_cores: how many cores there are.
        with_peers: whether peers are measured too.
    """
    model, cohort = WORKLOADS[workload]
    # Unrolled clients compile in a time that grows with the cohort.
    unrolled = cohort <= 10
    ours = [mode for mode in MODES[model] if mode != "loop" or unrolled]
    ours += [f"default{ON_DEVICES}"] if num_cores > 1 else []
    return [*ours, *(peers.PEERS if with_peers else ())]


def compare(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All measurements that the command line asks for, as they come."""
    available = _available_cores()
    sets = {"one": available[:1], "all": available}
    chosen = ("one", "all") if arguments.cores == "both" else (arguments.cores,)
    for name in chosen:
        for workload in arguments.workloads:
            for what in sides(workload, len(sets[name]), arguments.peers):
                found = measure_apart(
                    workload, what, sets[name], arguments.seconds, arguments.python
                )
                yield found | {"cores": name}


def _available_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


def _line(found: dict[str, Any]) -> str:
    head = f"{found['cores']:4} {found['workload']:12} {found['what']:16}"
    if "failed" in found:
        return f"{head} not measured: {' '.join(found['failed'])}"
    line = f"{head} {found['median']:9.1f} ({found['worst']:.1f} - {found['best']:.1f})"
    line += f"  first round {found['first_seconds']:.1f} s"
    if "fraction_of_roof" in found:
        line += f"  {100 * found['fraction_of_roof']:.0f} % of the matrix-product rate"
    return line


def _parser() -> argparse.ArgumentParser:
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
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = _parser().parse_args(argv)
    if arguments.measure:
        workload, what = arguments.measure
        _print_measurement(workload, what, arguments.seconds)
        return
    print(
        f"{platform.machine()}, {len(_available_cores())} cores; "
        "clients per second: median (worst - best)",
        flush=True,
    )
    results = []
    for found in compare(arguments):
        results.append(found)
        print(_line(found), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
