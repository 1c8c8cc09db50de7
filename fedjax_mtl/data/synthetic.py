"""FedEM's synthetic mixture of linear classifiers, drawn exactly as its released generator does.

The source is Marfoq et al., arXiv 2108.10252, appendix; omarfoq/FedEM, data/synthetic. With seed
1234, 300 clients and dimension 150 it makes the 70,507 training samples of the paper's table 1 (the
repository's README says 12345, which does not).
"""

from typing import NamedTuple

import numpy as np

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import Splits, make_federation

_SMALLEST_CLIENT, _LARGEST_CLIENT = 50, 1000


class SyntheticMixture(NamedTuple):
    """The generated problem.

    Attributes:
        splits: train and test clients, and those held out; examples are ``inputs`` float32
            ``[n, dimension]``, ``labels`` int32 ``[n]`` in {0, 1}.
        directions: float64 ``[components, dimension]``, the true classifiers.
        mixtures: float64 ``[clients, components]``, the true mixture weights, held-out clients
            last.
        noise_level: standard deviation of the noise on the margin.
    """

    splits: Splits
    directions: np.ndarray
    mixtures: np.ndarray
    noise_level: float


def synthetic_mixture(
    *,
    num_clients: int = 300,
    num_components: int = 3,
    dimension: int = 150,
    noise_level: float = 0.1,
    num_test: int = 5000,
    alpha: float = 0.4,
    unseen_fraction: float = 0.0,
    seed: int = 1234,
    fidelity: str = "paper",
) -> SyntheticMixture:
    """Generates the data set.

    Numbers come from one legacy numpy stream, in the released order. Client t has
    ``min(floor(LogNormal(4, 2)) + 50, 1000)`` training samples and mixture weights pi_t ~
    Dirichlet(alpha). A sample of component m is ``x ~ U[-1, 1]^d``, with ``y = 1`` iff
    ``<x, theta_m> + N(0, noise_level^2) > 0``.

    Args:
        num_clients: T, held-out clients included.
        num_components: M.
        dimension: d.
        noise_level: standard deviation of the noise on the margin.
        num_test: test samples of each client.
        alpha: of the Dirichlet over components; a small one makes clients one-sided.
        unseen_fraction: share of the clients, the last ones, held out of training.
        seed: of the legacy stream.
        fidelity: ``paper`` labels each of a client's samples by the component it was drawn from.
            ``released`` repeats a slip of the released generator, visible in the data it makes:
            every component writes its labels from the client's first row on instead of after the
            component before. Later components then overwrite earlier ones, and the last rows keep
            label 0 (in the small set, 64 % of all labels are 0). Published figures come from such
            data. Inputs, sizes and mixtures are the same.

    Raises:
        InputError: an unknown fidelity, or a count or fraction out of range.
    """
    if fidelity not in ("paper", "released"):
        raise InputError(f"fidelity must be 'paper' or 'released', got {fidelity!r}")
    if num_components < 1 or num_clients < 1:
        raise InputError(
            f"num_clients is {num_clients} and num_components {num_components}; both must be at "
            "least 1"
        )
    if not 0 <= unseen_fraction < 1:
        raise InputError(f"unseen_fraction is {unseen_fraction}; give a share in [0, 1)")
    rng = np.random.RandomState(seed)
    sizes = rng.lognormal(4, 2, num_clients).astype(int) + _SMALLEST_CLIENT
    sizes = np.minimum(sizes, _LARGEST_CLIENT)
    mixtures = np.stack([rng.dirichlet([alpha] * num_components) for _ in range(num_clients)])
    directions = rng.uniform(-1, 1, size=(num_components, dimension))
    inputs, labels = [], []
    train_rows: list[np.ndarray] = []
    test_rows: list[np.ndarray] = []
    start = 0
    for mixture, size in zip(mixtures, sizes, strict=True):
        for count, rows in ((size, train_rows), (num_test, test_rows)):
            x, y = _draw_samples(mixture, directions, count, noise_level, fidelity, rng)
            inputs.append(x)
            labels.append(y)
            rows.append(np.arange(start, start + count))
            start += count
    examples = {"inputs": np.concatenate(inputs), "labels": np.concatenate(labels)}
    seen = num_clients - int(round(unseen_fraction * num_clients))
    return SyntheticMixture(
        _split(examples, train_rows, test_rows, seen), directions, mixtures, noise_level
    )


def _draw_samples(
    mixture: np.ndarray,
    directions: np.ndarray,
    count: int,
    noise_level: float,
    fidelity: str,
    rng: np.random.RandomState,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws inputs ``[count, dimension]`` and labels ``[count]`` of one client."""
    counts = rng.multinomial(count, mixture)
    inputs = rng.uniform(-1, 1, size=(count, directions.shape[1]))
    labels = np.zeros(count, np.int32)
    starts = np.cumsum(counts) - counts if fidelity == "paper" else np.zeros_like(counts)
    for theta, first, own in zip(directions, starts, counts, strict=True):
        rows = np.arange(first, first + own)
        noise = rng.normal(0, noise_level, size=own)
        labels[rows] = np.round(1 / (1 + np.exp(-(inputs[rows] @ theta + noise))))
    order = np.arange(count)
    rng.shuffle(order)
    return inputs[order].astype(np.float32), labels[order]


def _split(
    examples: dict[str, np.ndarray],
    train_rows: list[np.ndarray],
    test_rows: list[np.ndarray],
    seen: int,
) -> Splits:
    """Returns the clients' splits; those from number ``seen`` on are held out of training."""
    splits = Splits(
        make_federation(examples, train_rows[:seen]), make_federation(examples, test_rows[:seen])
    )
    if seen == len(train_rows):
        return splits
    shared = splits.train.examples
    return splits._replace(
        unseen_train=make_federation(shared, train_rows[seen:]),
        unseen_test=make_federation(shared, test_rows[seen:]),
    )
