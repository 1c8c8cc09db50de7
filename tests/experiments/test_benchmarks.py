"""The speed benchmarks run, and the sides that must agree agree; speed itself is not tested."""

import jax
import numpy as np

from experiments import benchmark
from experiments.benchmarks import peers, related, server
from fedjax_mtl import algorithms, make_federation, models


def test_a_measurement(monkeypatch):
    monkeypatch.setitem(benchmark.WORKLOADS, "linear-4", ("linear", 4))
    found = benchmark.measure("linear-4", "default", 1, 0.0)
    assert 0 < found["worst"] <= found["median"] <= found["best"]
    assert found["first_seconds"] > 0 and found["fraction_of_roof"] > 0
    assert benchmark._line(found | {"cores": "one"}).startswith("one  linear-4     default")


def test_what_is_measured():
    assert "loop" in benchmark.sides("cnn-10", 1, with_peers=False)
    assert "loop" not in benchmark.sides("cnn-50", 1, with_peers=False)
    assert benchmark.sides("mlp-1000", 2, with_peers=False)[-1] == "default@devices"
    assert benchmark.sides("mlp-1000", 1, with_peers=True)[-len(peers.PEERS) :] == [*peers.PEERS]


def test_projection_equals_the_sequential_form():
    """The benchmark compares both itself, and raises if they differ."""
    clients, parameters, *times = server.projection_line(4, 1000, 10**9).split()
    assert (clients, parameters) == ("4", "1000") and all(float(one) > 0 for one in times)
    assert "no memory" in server.projection_line(4, 1000, 0)


def test_an_update_is_timed():
    params = {"layer_0": np.zeros(6, np.float32)}
    updates = server.stacked_updates(server.CLIENTS, 60)
    transform = server.all_transformations()["average_clients"]
    seconds = server.time_update(transform, {"layer_0": updates["layer_0"]}, params)
    assert 0 < seconds.fastest <= seconds.median <= seconds.slowest


def test_mocha_beside_numpy(capsys):
    with jax.enable_x64(True):
        related.mocha_against_numpy(3, 1)
    assert "MOCHA     3 tasks" in capsys.readouterr().out


def test_a_round_of_adapters_is_reported(capsys):
    base = models.language_model(
        models.tiny_transformer(8, width=8, num_layers=1, num_heads=2, mlp_width=8, max_length=4)
    )
    adapted = models.lora(base, targets=["*/attention/query"], rank=1)
    tokens = np.ones((4, 4), np.int32)
    federation = make_federation({"inputs": tokens, "labels": tokens}, [[0, 1], [2, 3]])
    algorithm = related.tuned_together(algorithms.mira, adapted, 2)
    related.report_round("LoRA", algorithm, federation, 1)
    assert "LoRA            2 clients" in capsys.readouterr().out
