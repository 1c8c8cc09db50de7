"""Noisy permutation chains: their groups, their statistics and the entropy floor."""

import numpy as np
import pytest

from fedjax_mtl.data import markov_chains as chains

DEFAULT = chains.draw_chains(0)


def own_tokens(federation, client):
    """A client's sequences, ``[n, length]``, put together from inputs and labels."""
    rows = np.array(federation.indices)[client, : int(federation.sizes[client])]
    inputs = np.array(federation.examples["inputs"])[rows]
    labels = np.array(federation.examples["labels"])[rows]
    np.testing.assert_array_equal(inputs[:, 1:], labels[:, :-1])
    return np.concatenate([inputs, labels[:, -1:]], axis=1)


def test_shapes_and_sizes():
    splits = DEFAULT.splits
    assert splits.train.num_clients == splits.test.num_clients == 16
    assert splits.train.sizes.tolist() == [8] * 16 and splits.test.sizes.tolist() == [128] * 16
    assert (
        splits.train.examples["inputs"].shape
        == splits.train.examples["labels"].shape
        == (16 * 136, 12)
    )
    assert splits.train.examples["inputs"] is splits.test.examples["inputs"]
    assert {str(leaf.dtype) for leaf in splits.train.examples.values()} == {"int32"}
    assert DEFAULT.groups.tolist() == [group for group in range(4) for _ in range(4)]
    rows = np.concatenate([np.array(f.indices).ravel() for f in (splits.train, splits.test)])
    assert len(set(rows.tolist())) == 16 * 136


def test_clients_differ_from_their_group_in_the_swapped_images():
    np.testing.assert_array_equal(np.sort(DEFAULT.successors), np.tile(np.arange(12), (16, 1)))
    same = chains.draw_chains(0, swaps=0)
    for group in range(4):
        own = same.successors[same.groups == group]
        assert (own == own[0]).all()
        # The group's permutation is drawn before any swap, so it is the same here and there.
        assert ((DEFAULT.successors[DEFAULT.groups == group] != own[0]).sum(axis=1) == 2).all()
    assert len(np.unique(same.successors, axis=0)) == 4


def test_frequencies():
    """Frequencies are within four standard errors of what the definition says."""
    follows, firsts = [], []
    for client in range(16):
        tokens = own_tokens(DEFAULT.splits.test, client)
        follows.append(DEFAULT.successors[client][tokens[:, :-1]] == tokens[:, 1:])
        firsts.append(tokens[:, 0])
    hits = np.concatenate(follows).ravel()
    expected = 0.75 + 0.25 / 12
    assert abs(hits.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / len(hits))
    counts = np.bincount(np.concatenate(firsts), minlength=12)
    assert (np.abs(counts - 2048 / 12) < 4 * np.sqrt(2048 / 12)).all()


def test_entropy_floor():
    assert chains.entropy_floor() == pytest.approx(1.088, abs=5e-4)
    assert chains.entropy_floor(12, 1.0) == 0
    assert chains.entropy_floor(12, 0.0) == pytest.approx(np.log(12))
    # The true model reaches it on the test sets.
    losses = []
    for client in range(16):
        tokens = own_tokens(DEFAULT.splits.test, client)
        hit = DEFAULT.successors[client][tokens[:, :-1]] == tokens[:, 1:]
        losses.append(-np.log(np.where(hit, 0.75 + 0.25 / 12, 0.25 / 12)))
    losses = np.concatenate(losses).ravel()
    assert abs(losses.mean() - chains.entropy_floor()) < 4 * losses.std() / np.sqrt(len(losses))


def test_noiseless_sequences_follow_the_permutation():
    exact = chains.draw_chains(1, num_clients=3, num_groups=2, vocabulary=5, length=4, follow=1.0)
    assert exact.groups.tolist() == [0, 0, 1]
    for client in range(3):
        tokens = own_tokens(exact.splits.train, client)
        np.testing.assert_array_equal(exact.successors[client][tokens[:, :-1]], tokens[:, 1:])


def test_pretraining_sequences_come_from_other_chains():
    examples = chains.pretraining_sequences(0)
    assert examples["inputs"].shape == examples["labels"].shape == (1024, 12)
    np.testing.assert_array_equal(examples["inputs"][:, 1:], examples["labels"][:, :-1])
    exact = chains.pretraining_sequences(0, noise=0.0)
    groups = chains.draw_chains(0, swaps=0).successors
    for chain in range(2):
        image = {}
        for current, following in zip(
            exact["inputs"][chain::2].ravel(), exact["labels"][chain::2].ravel(), strict=True
        ):
            assert image.setdefault(int(current), int(following)) == following
        assert not (groups == [image[token] for token in range(12)]).all(axis=1).any()


def test_the_seed_decides():
    again, other = chains.draw_chains(0), chains.draw_chains(1)
    np.testing.assert_array_equal(again.successors, DEFAULT.successors)
    for name, leaf in DEFAULT.splits.train.examples.items():
        np.testing.assert_array_equal(again.splits.train.examples[name], leaf)
        assert (np.array(other.splits.train.examples[name]) != np.array(leaf)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_groups": 17}, "num_groups is 17 for 16 clients"),
        ({"train_sequences": 0}, "at least one sequence"),
        ({"swaps": -1}, "swaps is -1"),
        ({"vocabulary": 1}, "both must be at least 2"),
        ({"follow": 1.5}, r"permutation is 1.5.*\[0, 1\]"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        chains.draw_chains(0, **arguments)


def test_pretraining_refused():
    with pytest.raises(ValueError, match="num_chains is 3 for 2 sequences"):
        chains.pretraining_sequences(0, num_sequences=2, num_chains=3)
    with pytest.raises(ValueError, match="permutation is -1"):
        chains.pretraining_sequences(0, noise=2.0)
