"""Partitioners and mixtures: who owns what, in which proportions, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_mtl import data

RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(10), 60)
SETTINGS = settings(deadline=None, max_examples=20)


def rng(seed=0):
    return np.random.default_rng(seed)


def disjoint_and_complete(rows, count):
    joined = np.concatenate(rows)
    return len(joined) == count and len(set(joined.tolist())) == count


@SETTINGS
@given(st.integers(1, 40), st.floats(0.05, 50), st.sampled_from([None, 3, 1]), st.integers(0, 9))
def test_dirichlet_deals_every_example_once(num_clients, alpha, groups, seed):
    rows = data.dirichlet_labels(LABELS, num_clients, alpha, rng(seed), groups)
    assert disjoint_and_complete(rows, 600)
    assert all(len(own) for own in rows) and len(rows) <= num_clients


def test_dirichlet_limits():
    even = data.dirichlet_labels(LABELS, 5, 1e5, rng())
    counts = np.stack([np.bincount(LABELS[own], minlength=10) for own in even])
    np.testing.assert_allclose(counts, 12, atol=9)
    skewed = data.dirichlet_labels(LABELS, 5, 1e-3, rng())
    assert all(
        np.isin(np.bincount(LABELS[own], minlength=10), (0, 60)).mean() > 0.9 for own in skewed
    )
    # Labels of one group go together.
    grouped = data.dirichlet_labels(LABELS, 4, 0.01, rng(), num_groups=2)
    assert any(len(np.unique(LABELS[own])) >= 5 for own in grouped)


def test_iid_and_shards():
    assert disjoint_and_complete(data.iid(103, 10, rng()), 103)
    shards = data.label_shards(LABELS, 20, 2, rng())
    assert disjoint_and_complete(shards, 600)
    assert max(len(np.unique(LABELS[own])) for own in shards) <= 4


def test_pachinko():
    coarse = LABELS // 5
    rows = data.pachinko(LABELS, coarse, 12, rng(), alpha=0.1, beta=10.0)
    assert disjoint_and_complete(rows, 600)
    assert all(len(own) == 50 for own in rows)
    # Small alpha: the first clients, who choose freely, keep to one coarse label.
    share = [np.bincount(coarse[own], minlength=2).max() / 50 for own in rows[:4]]
    assert np.mean(share) > 0.8


def test_splits():
    examples = {"inputs": RNG.normal(size=(600, 2)).astype(np.float32), "labels": LABELS}
    splits = data.split_clients(examples, data.iid(600, 20, rng()), rng(), unseen_fraction=0.25)
    parts = [splits.train, splits.test, splits.unseen_train, splits.unseen_test]
    assert [p.num_clients for p in parts] == [15, 15, 5, 5]
    np.testing.assert_array_equal(splits.test.sizes, 6)
    rows = [np.array(p.indices)[c, :n] for p in parts for c, n in enumerate(np.array(p.sizes))]
    assert disjoint_and_complete(rows, 600)
    assert all(p.examples["labels"] is splits.train.examples["labels"] for p in parts[1:])


def test_mixtures():
    rows = data.iid(600, 6, rng())
    mixtures = data.draw_mixtures(6, 3, 0.4, rng())
    components = data.draw_components(rows, mixtures, 600, rng())
    for own, weights in zip(rows, mixtures, strict=True):
        found = np.bincount(components[own], minlength=3) / len(own)
        np.testing.assert_allclose(found, weights, atol=0.15)
    permutations = data.label_permutations(3, 10, rng())
    permuted = data.permute_labels(LABELS, components, permutations)
    np.testing.assert_array_equal(permuted[components == 0], LABELS[components == 0])
    for m in range(3):
        pairs = set(zip(LABELS[components == m], permuted[components == m], strict=True))
        assert len(pairs) == 10  # a permutation


def test_rotations():
    images = RNG.normal(size=(4, 5, 5, 1))
    components = np.array([0, 1, 2, 1])
    turned = data.rotate_images(images, components, [0, 90, 180])
    np.testing.assert_array_equal(turned[0], images[0])
    np.testing.assert_array_equal(turned[1, :, :, 0], np.rot90(images[1, :, :, 0]))
    np.testing.assert_array_equal(turned[2, :, :, 0], images[2, ::-1, ::-1, 0])
    near = data.rotate_images(images, components, [0, 89.999, 180])
    np.testing.assert_allclose(near[1, 1:4, 1:4], turned[1, 1:4, 1:4], atol=0.01)


def test_held_out_clients_are_spread_evenly():
    mixtures = data.draw_mixtures(100, 3, 0.4, rng())
    ordered = data.hold_out_evenly(mixtures, 25)
    assert sorted(map(tuple, ordered)) == sorted(map(tuple, mixtures))
    gap = ordered[:25].max(axis=1).mean() - ordered[25:].max(axis=1).mean()
    assert abs(gap) < 0.02


def test_digits_are_real():
    digits = data.load_digits()
    assert digits["inputs"].shape == (1797, 8, 8, 1) and digits["inputs"].max() == 1
    assert np.bincount(digits["labels"]).min() > 170


BAD = {
    "more clients than examples": (
        lambda: data.iid(3, 5, rng()),
        "cannot split 3 examples over 5 clients",
    ),
    "no client": (lambda: data.iid(3, 0, rng()), "over 0 clients"),
    "alpha": (
        lambda: data.dirichlet_labels(LABELS, 5, 0.0, rng()),
        "alpha is 0.0; a Dirichlet concentration",
    ),
    "groups": (
        lambda: data.dirichlet_labels(LABELS, 5, 1.0, rng(), 11),
        "num_groups is 11 but there are 10 labels",
    ),
    "pachinko size": (
        lambda: data.pachinko(LABELS, LABELS // 5, 10, rng(), size=61),
        "10 clients of 61 examples need more than the 600",
    ),
    "test fraction": (
        lambda: data.split_clients({"x": np.ones(4)}, [np.arange(4)], rng(), test_fraction=1.0),
        "test_fraction is 1.0",
    ),
    "unseen fraction": (
        lambda: data.split_clients({"x": np.ones(4)}, [np.arange(4)], rng(), unseen_fraction=1.0),
        "unseen_fraction is 1.0",
    ),
    "tiny clients": (
        lambda: data.split_clients({"x": np.ones(4)}, [np.arange(1)], rng()),
        "no client owns two examples",
    ),
    "shared examples": (
        lambda: data.draw_components([np.arange(3), np.arange(3)], np.ones((2, 1)), 3, rng()),
        "client 1 shares examples with another client",
    ),
    "mixtures of others": (
        lambda: data.draw_components([np.arange(3)], np.ones((2, 1)), 3, rng()),
        "1 clients but 2 rows of mixture weights",
    ),
    "pool": (
        lambda: data.draw_clients(np.arange(3), 2, 4, rng()),
        "cannot draw 4 different examples from a pool of 3",
    ),
    "components": (lambda: data.draw_mixtures(3, 0, 0.4, rng()), "num_components is 0"),
    "synthetic": (lambda: data.synthetic_mixture(num_clients=0), "num_clients is 0"),
    "fidelity": (
        lambda: data.synthetic_mixture(fidelity="official"),
        "must be 'paper' or 'released', got 'official'",
    ),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_the_synthetic_generator_makes_the_papers_sizes():
    """Seed 1234 gives the 70,507 training samples of FedEM's Table 1."""
    made = data.synthetic_mixture(num_test=1, dimension=2)
    # The dimension does not change the sizes, which are drawn first.
    assert int(made.splits.train.sizes.sum()) == 70_507
    assert made.splits.train.num_clients == 300


def test_fidelities_of_the_synthetic_generator():
    paper = data.synthetic_mixture(num_clients=20, num_test=200, dimension=20, seed=3)
    released = data.synthetic_mixture(
        num_clients=20, num_test=200, dimension=20, seed=3, fidelity="released"
    )
    examples, others = paper.splits.train.examples, released.splits.train.examples
    np.testing.assert_array_equal(examples["inputs"], others["inputs"])
    assert abs(np.mean(np.array(examples["labels"])) - 0.5) < 0.03  # balanced, by symmetry
    assert np.mean(np.array(others["labels"])) < 0.45
