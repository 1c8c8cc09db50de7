"""Multi-task tables from files, their splits, and features for linear models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io

from fedjax_mtl import Splits, make_federation
from fedjax_mtl.data import features
from fedjax_mtl.data.task_tables import (
    TaskTable,
    load_human_activity,
    load_task_table,
    related_tasks,
    split_tasks,
)

SIZES = np.array([8, 5, 12])


def arrays(binary=True):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(SIZES.sum(), 3))
    labels = rng.integers(0, 2, SIZES.sum()) if binary else rng.normal(size=SIZES.sum())
    return inputs, labels


def test_npz_and_both_kinds_of_mat_agree(tmp_path):
    inputs, labels = arrays()
    np.savez(tmp_path / "a.npz", X=inputs, y=labels, task_sizes=SIZES)
    cuts = np.cumsum(SIZES)[:-1]
    cells = {name: np.empty((1, 3), object) for name in ("X", "Y")}
    for task, (x, y) in enumerate(zip(np.split(inputs, cuts), np.split(labels, cuts), strict=True)):
        cells["X"][0, task], cells["Y"][0, task] = x, y[:, None]
    scipy.io.savemat(tmp_path / "b.mat", cells)
    scipy.io.savemat(tmp_path / "c.mat", {"feature": cells["X"], "label": cells["Y"]})
    for name in ("a.npz", "b.mat", "c.mat"):
        table = load_task_table(tmp_path / name)
        np.testing.assert_allclose(table.inputs, inputs)
        np.testing.assert_array_equal(table.labels, 2 * labels - 1)
        assert [len(rows) for rows in table.rows] == SIZES.tolist()


def test_real_labels_stay(tmp_path):
    inputs, labels = arrays(binary=False)
    np.savez(tmp_path / "a.npz", X=inputs, y=labels, task_sizes=SIZES)
    np.testing.assert_allclose(load_task_table(tmp_path / "a.npz").labels, labels)


def test_files_that_do_not_fit(tmp_path):
    inputs, labels = arrays()
    with pytest.raises(FileNotFoundError, match="a .npz with X, y and task_sizes"):
        load_task_table(tmp_path / "none.npz")
    np.savez(tmp_path / "short.npz", X=inputs, y=labels)
    with pytest.raises(ValueError, match="no array 'task_sizes'"):
        load_task_table(tmp_path / "short.npz")
    np.savez(tmp_path / "odd.npz", X=inputs, y=labels[:-1], task_sizes=SIZES)
    with pytest.raises(ValueError, match="all three must agree"):
        load_task_table(tmp_path / "odd.npz")
    scipy.io.savemat(tmp_path / "other.mat", {"data": inputs})
    with pytest.raises(ValueError, match="it needs cells X and Y, or feature and label"):
        load_task_table(tmp_path / "other.mat")
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(ValueError, match="neither .npz nor .mat"):
        load_task_table(tmp_path / "table.csv")


def test_human_activity(tmp_path):
    rng = np.random.default_rng(0)
    for part, people in (("train", [1, 1, 3, 3]), ("test", [2, 2, 2])):
        (tmp_path / part).mkdir()
        np.savetxt(tmp_path / part / f"X_{part}.txt", rng.normal(size=(len(people), 5)))
        np.savetxt(tmp_path / part / f"y_{part}.txt", np.arange(len(people)) % 2 + 4, fmt="%d")
        np.savetxt(tmp_path / part / f"subject_{part}.txt", people, fmt="%d")
    table = load_human_activity(tmp_path)
    assert [len(rows) for rows in table.rows] == [2, 3, 2]
    assert set(table.labels) == {-1.0, 1.0}
    with pytest.raises(FileNotFoundError, match="unpacked UCI HAR Dataset"):
        load_human_activity(tmp_path / "elsewhere")


def test_splits_are_the_released_codes():
    table = related_tasks(num_tasks=5, features=4, smallest=10, largest=30)
    splits = split_tasks(table, seed=3)
    for task, rows in enumerate(table.rows):
        size = int(splits.train.sizes[task])
        assert size == int(np.ceil(0.75 * len(rows))) - 1
        train = np.asarray(splits.train.indices[task, :size])
        test = np.asarray(splits.test.indices[task, : splits.test.sizes[task]])
        np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), rows)
    other = split_tasks(table, seed=4)
    assert not np.array_equal(splits.train.indices, other.train.indices)


def test_splits_in_the_order_of_the_table():
    table = related_tasks(num_tasks=5, features=4, smallest=10, largest=30)
    shuffled, ordered = split_tasks(table, seed=3), split_tasks(table, seed=3, keep_order=True)
    for part, sorted_part in zip(shuffled[:2], ordered[:2], strict=True):
        for task, size in enumerate(part.sizes):
            rows = np.asarray(part.indices[task, :size])
            assert not np.array_equal(rows, np.sort(rows))
            np.testing.assert_array_equal(sorted_part.indices[task, :size], np.sort(rows))


def test_skewed_tasks_keep_both_classes():
    table = related_tasks(num_tasks=10, features=4, smallest=60, largest=90, seed=1)
    plain, skewed = split_tasks(table, seed=0), split_tasks(table, seed=0, skewed=True)
    smaller = np.asarray(skewed.train.sizes) < 0.25 * np.asarray(plain.train.sizes)
    assert smaller.sum() == 5 and skewed.train.sizes.min() >= 3
    labels = np.asarray(skewed.train.examples["labels"])
    for own, size in zip(
        np.asarray(skewed.train.indices), np.asarray(skewed.train.sizes), strict=True
    ):
        assert len(set(labels[own[:size]])) == 2


def test_bad_tables():
    with pytest.raises(ValueError, match="train_share is 1.0"):
        split_tasks(related_tasks(num_tasks=3, features=2), train_share=1.0)
    lonely = TaskTable(np.zeros((3, 1)), np.ones(3), [np.array([0, 1]), np.array([2])])
    with pytest.raises(ValueError, match="task 1 has 1 example"):
        split_tasks(lonely)
    with pytest.raises(ValueError, match="give clusters in 1..tasks"):
        related_tasks(num_tasks=2, num_clusters=3)


# --- Features.


def small_splits():
    rng = np.random.default_rng(1)
    inputs = (5 + 3 * rng.normal(size=(20, 3))).astype(np.float32)
    inputs[:, 2] = 7.0
    examples = {"inputs": inputs, "labels": np.ones(20, np.float32)}
    rows = np.split(np.arange(20), 4)
    train = make_federation(examples, [r[:3] for r in rows[:3]])
    rest = [
        make_federation(train.examples, part)
        for part in ([r[3:] for r in rows[:3]], [rows[3][:3]], [rows[3][3:]])
    ]
    return Splits(train, *rest), inputs, rows


def test_pooled_standardisation_sees_training_examples_only():
    splits, inputs, rows = small_splits()
    done = np.asarray(features.standardise(splits).train.examples["inputs"])
    train = np.concatenate([r[:3] for r in rows[:3]])
    np.testing.assert_allclose(done[train][:, :2].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(done[train][:, :2].std(0), 1, atol=1e-5)
    np.testing.assert_allclose(done[:, 2], 7.0)
    expected = (inputs - inputs[train].mean(0)) / np.maximum(inputs[train].std(0), 1e-6)
    np.testing.assert_allclose(done[:, :2], expected[:, :2], rtol=1e-4, atol=1e-4)


def test_standardisation_by_client():
    splits, inputs, rows = small_splits()
    result = features.standardise(splits, per_client=True)
    done = np.asarray(result.unseen_test.examples["inputs"])
    for own in rows:
        np.testing.assert_allclose(done[own[:3], :2].mean(0), 0, atol=1e-4)
        expected = (inputs[own[3:], :2] - inputs[own[:3], :2].mean(0)) / inputs[own[:3], :2].std(0)
        np.testing.assert_allclose(done[own[3:], :2], expected, rtol=1e-4, atol=1e-4)


def test_intercept():
    splits, inputs, _ = small_splits()
    result = features.append_intercept(splits, 10.0)
    assert result.test.examples["inputs"].shape == (20, 4)
    np.testing.assert_array_equal(result.train.examples["inputs"][:, 3], 10.0)


def test_fourier_features_approach_the_kernel():
    splits, inputs, _ = small_splits()
    mapped = features.random_fourier(
        splits, num_features=20000, bandwidth=4.0, key=jax.random.key(0)
    )
    z = np.asarray(mapped.train.examples["inputs"], np.float64)
    distances = np.square(inputs[:, None] - inputs).sum(-1)
    np.testing.assert_allclose(z @ z.T, np.exp(-distances / 32), atol=0.05)
    with pytest.raises(ValueError, match="bandwidth > 0"):
        features.random_fourier(splits, num_features=4, bandwidth=0.0, key=jax.random.key(0))


def test_encoded_features():
    splits, inputs, _ = small_splits()
    result = features.encode_inputs(splits, lambda x: jnp.tanh(x[:, :2]), batch_size=7)
    np.testing.assert_allclose(result.train.examples["inputs"], np.tanh(inputs[:, :2]), rtol=1e-5)
