"""Bytes, FLOPs and times by value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_mtl import costs

SPLIT = {
    "batch_size": 3,
    "embedding_values": 5,
    "feature_values": 7,
    "num_steps": 2,
    "embedding_parameters": 11,
    "trunk_parameters": 100,
    "upper_parameters": 20,
}


def test_bytes_of_trees():
    """Arrays and shapes, each in its own type."""
    narrow = jax.ShapeDtypeStruct((4, 5), jnp.bfloat16)
    assert costs.tree_bytes({"a": np.zeros((2, 3), np.float32), "b": [narrow]}) == 24 + 40
    assert costs.tree_bytes({}) == 0


def test_flops_of_a_matrix_product():
    shapes = (
        jax.ShapeDtypeStruct((8, 16), jnp.float32),
        jax.ShapeDtypeStruct((16, 4), jnp.float32),
    )
    assert costs.flops(jnp.matmul, *shapes) == pytest.approx(2 * 8 * 16 * 4, rel=0.1)


def test_split_learning_against_averaging():
    """Messages of every step and the embedding one way; what averaging would send both ways."""
    assert costs.split_traffic(**SPLIT) == costs.SplitTraffic(
        up=4 * (2 * 36 + 11),
        down=4 * (2 * 36 + 11),
        federated=2 * 4 * 111,
        federated_full=2 * 4 * 131,
        break_even_steps=100 / 36,
    )
    alone = costs.split_traffic(**SPLIT, bytes_per_value=2, synchronised=False)
    assert (alone.up, alone.federated) == (2 * 2 * 36, 2 * 2 * 111)
    assert alone.break_even_steps == 111 / 36


def test_uploads_of_some_entries():
    """A bit for every parameter, in whole bytes, or four bytes for every entry that is sent."""
    assert costs.sparse_upload_bytes(100, 7) == 7 * 4 + 13
    assert costs.sparse_upload_bytes(96, 7, bytes_per_value=2) == 7 * 2 + 12
    assert costs.sparse_upload_bytes(100, 7, positions="indices") == 7 * 4 + 7 * 4
    assert costs.sparse_upload_bytes(100, 7, bytes_per_value=2, positions="indices") == 42
    with pytest.raises(ValueError, match="unknown positions 'runs'"):
        costs.sparse_upload_bytes(100, 7, positions="runs")


@pytest.mark.parametrize(
    ("method", "network", "expected"),
    [
        ("mocha", "wifi", 8 * 50 + 10),
        ("cocoa", "lte", 8 * 3 * 20 + 100),
        ("minibatch_sdca", "3g", 6 * 50 + 1000),
        ("minibatch_sgd", "wifi", 4 * 50 + 10),
    ],
)
def test_times_as_the_released_code_estimates_them(method, network, expected):
    facts = {"steps": np.array([50.0]), "slowest": 20, "num_tasks": 3}
    ours = costs.estimated_round_time(method, **facts, network=network)
    np.testing.assert_array_equal(ours, expected)
    assert set(costs.NETWORKS) == {"wifi", "lte", "3g"}


def test_messages_of_a_round_are_free_by_default():
    seconds = costs.synchronous_round_time([2, 3], np.array([4.0, 1.0]), features=5)
    assert seconds == 8 * 5 * 3
