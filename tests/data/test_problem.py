"""What a run learns: groups of clients, or clients that do not come in groups."""

import numpy as np

from fedjax_mtl import make_federation, tasks
from fedjax_mtl.core.federation import Splits
from fedjax_mtl.data.problem import Problem, ProblemGroup, one_group


def group(clients, unseen=0):
    examples = {"inputs": np.zeros((20, 3), np.float32), "labels": np.zeros(20, np.int32)}
    rows = [np.array([c]) for c in range(clients + unseen)]
    train = make_federation(examples, rows[:clients])
    held = make_federation(examples, rows[clients:]) if unseen else None
    return ProblemGroup(Splits(train, train, held, held), tasks.classification(), (3,), 2)


def test_clients_that_do_not_come_in_groups_have_plain_values():
    problem = one_group(group(4, unseen=1), alike=np.arange(4) % 2)
    assert not problem.grouped and problem.num_clients == 4
    assert problem.task.name == "classification" and problem.each("outputs") == 2
    assert isinstance(problem.splits, Splits) and problem.splits.unseen_train.num_clients == 1


def test_a_single_group_with_a_name_stays_a_group():
    problem = Problem({"a": group(4)})
    assert problem.grouped and problem.num_clients == {"a": 4}
    assert set(problem.task) == {"a"} and problem.splits.unseen_test is None


def test_only_some_groups_may_hold_clients_out():
    problem = Problem({"a": group(4), "b": group(2, unseen=3)})
    assert problem.num_clients == {"a": 4, "b": 2}
    assert set(problem.splits.train) == {"a", "b"} == set(problem.splits.test)
    assert set(problem.splits.unseen_train) == {"b"}
    assert problem.splits.unseen_train["b"].num_clients == 3
