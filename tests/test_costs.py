"""Estimated times of MOCHA's rounds."""

import json
import pathlib

import numpy as np
import pytest

from fedjax_mtl import costs

CURVES = json.loads(
    (pathlib.Path(__file__).parent / "golden" / "mocha_small_curves.json").read_text()
)
EXAMPLES, TASKS = 1105, 29


@pytest.mark.parametrize("network", ["wifi", "lte", "3g"])
@pytest.mark.parametrize(
    ("method", "curve", "column"),
    [
        ("mocha", "mocha_w_update", "mocha"),
        ("cocoa", "cocoa_theta_0p5", "cocoa_theta_0p5"),
        ("minibatch_sdca", "mbsdca", "mbsdca_500_rounds"),
    ],
)
def test_times_of_the_official_runs(method, curve, column, network):
    """The reference's table: when the stored curves are within 1, 0.1 and 0.01 of the optimum."""
    rows = CURVES[curve]["curve"]
    optimum = CURVES["optimum_fixed_Omega"]["primal_generic_solver"]
    rounds = np.array([row["round"] for row in rows])
    primal = np.array([row["primal"] for row in rows])
    # The released counter is one ahead of the steps.
    slowest = np.array([row.get("max_its", 0) for row in rows])
    one = costs.estimated_round_time(
        method, steps=float(EXAMPLES), slowest=slowest, num_tasks=TASKS, network=network
    )
    one = np.broadcast_to(one, rounds.shape)
    table = CURVES["estimated_time_to_suboptimality"][network]
    for target in (1.0, 0.1, 0.01):
        expected = table[f"subopt<={target}"][column]
        reached = np.flatnonzero(primal - optimum <= target)
        if expected is None:
            continue
        # The stored rounds are not all; the table's time lies between two of them.
        per_round = expected / (one[1] if method != "cocoa" else 1)
        if method == "cocoa":
            clock = np.concatenate([[0], np.cumsum(one)])[:-1]
            assert clock[reached[0] - 1] < expected * 1.001 and expected <= clock[reached[0]] * 1.5
        else:
            assert rounds[reached[0] - 1] < per_round <= rounds[reached[0]] + 1


def test_the_slowest_node_present_decides():
    steps, rates = np.array([[10, 20, 30], [5, 5, 5]]), np.array([1e3, 1e3, 1e2])
    seconds = costs.synchronous_round_time(steps, rates, features=2, seconds_per_message=0.5)
    np.testing.assert_allclose(seconds, [30 * 16 / 1e2 + 0.5, 5 * 16 / 1e2 + 0.5])
    present = np.array([True, True, False])
    seconds = costs.synchronous_round_time(steps, rates, features=2, present=present)
    np.testing.assert_allclose(seconds, [20 * 16 / 1e3, 5 * 16 / 1e3])


def test_unknown_methods_and_networks():
    with pytest.raises(ValueError, match="no estimate for 'fedavg' over 'wifi'"):
        costs.estimated_round_time("fedavg", steps=1, slowest=1, num_tasks=1, network="wifi")
