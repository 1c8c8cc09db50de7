"""Clients with noisy permutation chains for languages: the smallest task to compare adapters on.

Every group of clients has a permutation pi of the vocabulary, and each client a variant of it with
a few images swapped. A sequence starts with a uniform token; the next is pi(current) with
probability ``follow`` and otherwise uniform over the whole vocabulary, pi(current) included.
Clients of one group thus share nearly everything, and clients of different groups nothing but the
form. It stands in for the instruction sets of MIRA (Elbakary et al., arXiv 2410.15524, section IV)
where there is neither a checkpoint nor data.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import entr

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import Splits, make_federation

# Distinct streams of one seed: what a base model is pre-trained on is independent of the clients.
_CLIENTS, _PRETRAINING = 0, 1


class MarkovChains(NamedTuple):
    """The generated problem.

    Attributes:
        splits: train and test clients; examples are ``inputs`` and ``labels``, int32
            ``[n, length - 1]``, all positions counted.
        groups: int64 ``[clients]``, the group of each client, in order.
        successors: int64 ``[clients, vocabulary]``, pi of each client.
    """

    splits: Splits
    groups: np.ndarray
    successors: np.ndarray


def draw_chains(
    seed: int,
    *,
    num_clients: int = 16,
    num_groups: int = 4,
    vocabulary: int = 12,
    length: int = 13,
    train_sequences: int = 8,
    test_sequences: int = 128,
    follow: float = 0.75,
    swaps: int = 1,
) -> MarkovChains:
    """Draws the clients' chains and sequences.

    Args:
        seed: of the draw.
        num_clients: how many clients.
        num_groups: groups of clients, of sizes that differ by at most one.
        vocabulary: how many different tokens there are.
        length: tokens in a sequence, one more than there are predictions.
        train_sequences: training sequences of each client.
        test_sequences: test sequences of each client.
        follow: probability of following the permutation.
        swaps: how many times a client exchanges two images of its group's permutation.

    Raises:
        InputError: a count that is too small, or ``follow`` outside [0, 1].
    """
    if not 1 <= num_groups <= num_clients:
        raise InputError(
            f"num_groups is {num_groups} for {num_clients} clients; give every group at least one "
            "client"
        )
    if swaps < 0 or min(train_sequences, test_sequences) < 1:
        raise InputError(
            f"swaps is {swaps}, train_sequences {train_sequences} and test_sequences "
            f"{test_sequences}; give no negative number of swaps and at least one sequence of "
            "either kind"
        )
    _check_chain(vocabulary, length, follow)
    rng = np.random.default_rng([seed, _CLIENTS])
    groups = np.sort(np.arange(num_clients) % num_groups)
    permutations = _permutations(num_groups, vocabulary, rng)
    successors = np.stack([_swap_images(permutations[group], swaps, rng) for group in groups])
    per_client = train_sequences + test_sequences
    examples = _examples(_sample(np.repeat(successors, per_client, axis=0), length, follow, rng))
    rows = np.arange(num_clients * per_client).reshape(num_clients, per_client)
    train = make_federation(examples, list(rows[:, :train_sequences]))
    test = make_federation(train.examples, list(rows[:, train_sequences:]))
    return MarkovChains(Splits(train, test), groups, successors)


def pretraining_sequences(
    seed: int,
    *,
    num_sequences: int = 1024,
    num_chains: int = 2,
    vocabulary: int = 12,
    length: int = 13,
    noise: float = 0.5,
) -> dict[str, np.ndarray]:
    """Draws sequences of other chains for a base model.

    The chains are drawn independently of those of :func:`draw_chains` with the same seed, and
    take turns.

    Args:
        seed: of the draw.
        num_sequences: how many sequences.
        num_chains: how many chains they are of.
        vocabulary: how many different tokens there are.
        length: tokens in a sequence, one more than there are predictions.
        noise: probability of a uniform token instead of pi(current).

    Returns:
        ``inputs`` and ``labels``, int32 ``[num_sequences, length - 1]``.

    Raises:
        InputError: a count that is too small, or ``noise`` outside [0, 1].
    """
    if not 1 <= num_chains <= num_sequences:
        raise InputError(
            f"num_chains is {num_chains} for {num_sequences} sequences; give every chain at least "
            "one"
        )
    _check_chain(vocabulary, length, 1 - noise)
    rng = np.random.default_rng([seed, _PRETRAINING])
    permutations = _permutations(num_chains, vocabulary, rng)
    successors = permutations[np.arange(num_sequences) % num_chains]
    return _examples(_sample(successors, length, 1 - noise, rng))


def entropy_floor(vocabulary: int = 12, follow: float = 0.75) -> float:
    """Returns the least expected loss in nats a token.

    It is the entropy of the next token given the current one and the chain: pi(current) has
    probability follow + (1 - follow) / V, each of the V - 1 others (1 - follow) / V.
    """
    other = (1 - follow) / vocabulary
    return float(entr(follow + other) + (vocabulary - 1) * entr(other))


def _check_chain(vocabulary: int, length: int, follow: float) -> None:
    if vocabulary < 2 or length < 2:
        raise InputError(f"vocabulary is {vocabulary} and length {length}; both must be at least 2")
    if not 0 <= follow <= 1:
        raise InputError(
            f"the probability of following the permutation is {follow}; give follow or noise in "
            "[0, 1]"
        )


def _permutations(count: int, vocabulary: int, rng: np.random.Generator) -> np.ndarray:
    """Draws random permutations, int64 ``[count, vocabulary]``."""
    return np.stack([rng.permutation(vocabulary) for _ in range(count)])


def _swap_images(permutation: np.ndarray, swaps: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a copy in which two images ``swaps`` times changed places, ``[vocabulary]``."""
    swapped = permutation.copy()
    for _ in range(swaps):
        pair = rng.choice(len(swapped), 2, replace=False)
        swapped[pair] = swapped[pair[::-1]]
    return swapped


def _sample(
    successors: np.ndarray, length: int, follow: float, rng: np.random.Generator
) -> np.ndarray:
    """Draws one sequence for each row of ``successors [n, vocabulary]``, int32 ``[n, length]``."""
    count, vocabulary = successors.shape
    tokens = np.empty((count, length), np.int32)
    tokens[:, 0] = rng.integers(vocabulary, size=count)
    for position in range(1, length):
        image = np.take_along_axis(successors, tokens[:, position - 1 : position], axis=1)[:, 0]
        uniform = rng.integers(vocabulary, size=count)
        tokens[:, position] = np.where(rng.random(count) < follow, image, uniform)
    return tokens


def _examples(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Returns every token but the last as ``inputs``, and what follows each as ``labels``.

    The shapes are ``[n, length] -> [n, length - 1]``.
    """
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}
