"""Clients who classify images, characters or mixtures: FedEM's data sets and their kin."""

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.problems.base import Problem
from fedjax_mtl import Splits, data, make_federation, tasks
from fedjax_mtl.core.federation import check_labels


def _mixture_of_digits(
    partition: str,
    num_clients: int,
    num_components: int,
    alpha: float,
    train_size: int,
    test_size: int,
    unseen_fraction: float,
    rng: np.random.Generator,
) -> Splits:
    """Clients that draw from a few distributions of digits; training and test images come from different pools."""
    source = data.load_digits()
    order = rng.permutation(len(source["labels"]))
    cut = int(0.7 * len(order))
    drawn = {
        "train": data.draw_clients(order[:cut], num_clients, train_size, rng),
        "test": data.draw_clients(order[cut:], num_clients, test_size, rng),
    }
    owned = np.split(np.arange(num_clients * (train_size + test_size)), num_clients)
    images = np.concatenate([np.concatenate(pair) for pair in zip(*drawn.values(), strict=True)])
    inputs, labels = source["inputs"][images], source["labels"][images]
    held = int(round(unseen_fraction * num_clients))
    mixtures = data.hold_out_evenly(
        data.draw_mixtures(num_clients, num_components, alpha, rng), held
    )
    components = data.draw_components(owned, mixtures, len(labels), rng)
    if partition == "label_permuted":
        permutations = data.label_permutations(num_components, 10, rng)
        labels = data.permute_labels(labels, components, permutations)
    else:
        angles = [m * 360 / num_components for m in range(num_components)]
        inputs = data.rotate_images(inputs, components, angles)
    train = make_federation(
        {"inputs": inputs, "labels": labels}, [own[:train_size] for own in owned[held:]]
    )

    def of(rows):
        return make_federation(train.examples, rows) if rows else None

    return Splits(
        train,
        of([own[train_size:] for own in owned[held:]]),
        of([own[:train_size] for own in owned[:held]]),
        of([own[train_size:] for own in owned[:held]]),
    )


def digits(
    *,
    partition: str,
    num_clients: int,
    num_components: int,
    alpha: float,
    train_size: int,
    test_size: int,
    unseen_fraction: float,
    seed: int,
) -> Problem:
    """The digits of scikit-learn: a ``label_permuted`` or ``rotated`` mixture, or a ``dirichlet`` split by label.

    In the mixtures every client has ``train_size`` and ``test_size`` images; in the split they have what the draw gives them, and
    the two say only in what proportion it is cut.
    """
    if not 0 <= unseen_fraction < 1:
        raise ValueError(
            f"config.data.unseen_fraction is {unseen_fraction}; give a share in [0, 1)"
        )
    rng = np.random.default_rng(seed)
    if partition in ("label_permuted", "rotated"):
        splits = _mixture_of_digits(
            partition,
            num_clients,
            num_components,
            alpha,
            train_size,
            test_size,
            unseen_fraction,
            rng,
        )
    elif partition == "dirichlet":
        examples = data.load_digits()
        rows = data.dirichlet_labels(examples["labels"], num_clients, alpha, rng)
        fraction = test_size / (train_size + test_size)
        splits = data.split_clients(
            examples, rows, rng, test_fraction=fraction, unseen_fraction=unseen_fraction
        )
    else:
        raise ValueError(
            f"unknown config.data.partition {partition!r}; expected label_permuted, rotated or dirichlet"
        )
    return Problem(splits, tasks.classification(), (8, 8, 1), 10)


def synthetic(
    *,
    num_clients: int,
    num_components: int,
    dimension: int,
    num_test: int,
    alpha: float,
    noise_level: float,
    unseen_fraction: float,
    seed: int,
    fidelity: str,
) -> Problem:
    """FedEM's synthetic mixture of linear classifiers."""
    made = data.synthetic_mixture(
        num_clients=num_clients,
        num_components=num_components,
        dimension=dimension,
        num_test=num_test,
        alpha=alpha,
        noise_level=noise_level,
        unseen_fraction=unseen_fraction,
        seed=seed,
        fidelity=fidelity,
    )
    return Problem(made.splits, tasks.binary_classification(), (dimension,), 1)


def images(
    *,
    source: str,
    data_dir: str,
    fraction: float,
    partition: str,
    num_clients: int,
    num_groups: int,
    alpha: float,
    beta: float,
    test_fraction: float,
    unseen_fraction: float,
    seed: int,
) -> Problem:
    """EMNIST, CIFAR-10 or CIFAR-100 through TFDS, split by ``dirichlet`` label groups (0: every label its own) or ``pachinko``."""
    from fedjax_mtl.data import tfds_sets

    examples = tfds_sets.load_tfds(source, data_dir or None)
    rng = np.random.default_rng(seed)
    if not 0 < fraction <= 1:
        raise ValueError(f"config.data.fraction is {fraction}; give a share in (0, 1]")
    count = len(examples["labels"])
    chosen = rng.permutation(count)[: int(round(fraction * count))]
    examples = {name: values[chosen] for name, values in examples.items()}
    labels = examples["labels"]
    num_classes = tfds_sets.NUM_CLASSES[source]
    check_labels(labels, num_classes)
    if partition == "dirichlet":
        rows = data.dirichlet_labels(labels, num_clients, alpha, rng, num_groups or None)
    elif partition == "pachinko" and "coarse_labels" not in examples:
        raise ValueError(
            f"config.data.partition pachinko needs coarse labels, which {source} does not have; use dirichlet"
        )
    elif partition == "pachinko":
        rows = data.pachinko(
            labels, examples["coarse_labels"], num_clients, rng, alpha=alpha, beta=beta
        )
    else:
        raise ValueError(
            f"unknown config.data.partition {partition!r}; expected dirichlet or pachinko"
        )
    constants = tfds_sets.NORMALISE[source]
    inputs = (examples["inputs"] / np.float32(255) - np.float32(constants["mean"])) / np.float32(
        constants["std"]
    )
    splits = data.split_clients(
        {"inputs": inputs, "labels": labels},
        rows,
        rng,
        test_fraction=test_fraction,
        unseen_fraction=unseen_fraction,
    )
    return Problem(splits, tasks.classification(), inputs.shape[1:], num_classes)


def shakespeare(
    *, path: str, stride: int, max_windows: int, unseen_fraction: float, seed: int
) -> Problem:
    """Shakespeare by speaking role, from a text file the user names; next-character prediction."""
    from fedjax_mtl.data.shakespeare import WINDOW, character_weights, load_shakespeare

    if not path:
        raise ValueError(
            "config.data.path is empty; name the text of the complete works, e.g. --config.data.path=100.txt"
        )
    if not 0 <= unseen_fraction < 1:
        raise ValueError(
            f"config.data.unseen_fraction is {unseen_fraction}; give a share in [0, 1)"
        )
    windows = load_shakespeare(path, stride=stride, max_windows_per_client=max_windows or None)
    examples = {"inputs": windows.inputs, "labels": windows.labels}
    train, test = [], []
    for client in range(len(windows.names)):
        own = np.nonzero(windows.client == client)[0]
        is_test = windows.is_test[own]
        if is_test.any() and not is_test.all():
            train.append(own[~is_test])
            test.append(own[is_test])
    if not train:
        raise ValueError(
            f"no role in {path} has windows of {WINDOW} characters both to train and to test on; "
            "lower config.data.stride or name a longer text"
        )
    order = np.random.default_rng(seed).permutation(len(train))
    num_unseen = int(round(unseen_fraction * len(order)))
    held, seen = order[:num_unseen], order[num_unseen:]
    first = make_federation(examples, [train[c] for c in seen])

    def of(parts, clients):
        return (
            make_federation(first.examples, [parts[c] for c in clients]) if len(clients) else None
        )

    splits = Splits(first, of(test, seen), of(train, held), of(test, held))
    task = tasks.sequence_classification(class_weights=character_weights())
    return Problem(splits, task, (WINDOW,), 100)


DATASETS: dict[str, Callable[..., Any]] = {
    "digits": digits,
    "images": images,
    "shakespeare": shakespeare,
    "synthetic": synthetic,
}
