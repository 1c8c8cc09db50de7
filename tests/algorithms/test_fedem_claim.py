"""The paper's claim on real data: the digits as mixtures of label permutations.

Clients are small. There are five draws of the clients, and two seeds for each draw.
"""

import numpy as np
import pytest

from configs import fedem_digits
from experiments import assembly
from experiments.plan import make_plan
from experiments.run import make_evaluation
from fedjax_mtl import simulate, summarise_clients, tasks

DRAWS = range(5)


def finals(name):
    """Final accuracies, each ``[draws, seeds]``.

    ``accuracy`` and ``bottom_decile`` are the weighted mean and the bottom decile over training
    clients, and ``unseen`` is the weighted mean over held-out clients.
    """
    table = {"accuracy": [], "bottom_decile": [], "unseen": []}
    for draw in DRAWS:
        config = fedem_digits.get_config(f"data_seed={draw}")
        config.algorithm.name = name
        plan = make_plan(config)
        problem = assembly.make_problem(plan)
        algorithm, execution = assembly.make_algorithm(plan, problem)
        run = simulate(
            algorithm,
            problem.splits.train,
            num_rounds=config.num_rounds,
            seeds=(0, 1),
            evaluate=make_evaluation(problem, execution, 256),
            evaluation_data=problem.splits,
        )
        last, how = run.evaluations[-1], tasks.describe(problem.task)
        seen = [
            summarise_clients(_of(last["train_clients"], s), problem.splits.test.sizes, how)
            for s in (0, 1)
        ]
        held = [
            summarise_clients(_of(last["unseen_clients"], s), problem.splits.unseen_test.sizes, how)
            for s in (0, 1)
        ]
        table["accuracy"].append([s["accuracy"] for s in seen])
        table["bottom_decile"].append([s["accuracy_bottom_decile"] for s in seen])
        table["unseen"].append([s["accuracy"] for s in held])
    return {key: np.array(values) for key, values in table.items()}


def _of(metrics, seed):
    return {name: values[seed] for name, values in metrics.items()}


@pytest.fixture(scope="module")
def fedem():
    return finals("fedem")


@pytest.mark.claim
@pytest.mark.parametrize("name", ["fedavg", "fedavg_tuned", "local"])
def test_fedem_serves_clients_better(name, fedem):
    other = finals(name)
    for metric in ("accuracy", "bottom_decile"):
        lead = fedem[metric].mean(axis=1) - other[metric].mean(axis=1)
        error = lead.std(ddof=1) / np.sqrt(len(lead))
        print(
            f"{metric}: fedem leads {name} by {100 * lead.mean():.1f} +- {100 * error:.1f} points"
        )
        assert lead.mean() > 0.02


@pytest.mark.claim
def test_fedem_serves_unseen_clients_as_well(fedem):
    gap = fedem["accuracy"].mean() - fedem["unseen"].mean()
    print(f"unseen clients are {100 * gap:.1f} points below training clients")
    assert gap < 0.02
