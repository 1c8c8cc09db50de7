"""Federations, and what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_mtl import make_federation
from fedjax_mtl.core.federation import check_labels

EXAMPLES = {"inputs": np.ones((6, 2), np.float32), "labels": np.arange(6)}
ROWS = [np.array([0, 1, 2]), np.array([5])]


def test_take_copies_rows_not_data():
    federation = make_federation(EXAMPLES, ROWS)
    assert (federation.num_clients, federation.capacity) == (2, 3)
    np.testing.assert_array_equal(federation.sizes, [3, 1])
    one = federation.take(jnp.array([1]))
    assert one.examples is federation.examples
    np.testing.assert_array_equal(one.indices[0, :1], [5])


def with_value(value):
    inputs = EXAMPLES["inputs"].copy()
    inputs[4, 1] = value
    return {**EXAMPLES, "inputs": inputs}


BAD = {
    "empty pytree": (({}, ROWS), "examples is an empty pytree"),
    "ragged leaves": (
        ({**EXAMPLES, "labels": np.arange(5)}, ROWS),
        r"'labels'\] has 5 rows|'inputs'\] has 6 rows",
    ),
    "NaN": ((with_value(np.nan), ROWS), r"'inputs'\] holds a NaN or infinity in row 4"),
    "infinity": ((with_value(np.inf), ROWS), "NaN or infinity in row 4"),
    "no client": ((EXAMPLES, []), "at least one client"),
    "empty client": ((EXAMPLES, [np.array([0]), np.array([], int)]), "client 1 owns no example"),
    "row too large": (
        (EXAMPLES, [np.array([0]), np.array([6])]),
        r"client 1 owns row 6, but examples has rows 0\.\.5",
    ),
    "negative row": ((EXAMPLES, [np.array([-1])]), "client 0 owns row -1"),
    "small capacity": ((EXAMPLES, ROWS, 2), "capacity 2 is smaller than client 0, which owns 3"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_federations(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make_federation(*arguments)


def test_labels_out_of_range():
    check_labels(np.array([0, 2]), 3)
    with pytest.raises(
        ValueError, match=r"label 3 in row 1 is outside 0\.\.2; .*num_classes to at least 4"
    ):
        check_labels(np.array([0, 3]), 3)
    with pytest.raises(ValueError, match="label -1 in row 0"):
        check_labels(np.array([[1, -1]]), 3)
