"""Problems of clients who classify: images, characters, mixtures (FedEM's data sets)."""

import os

import numpy as np

from fedjax_mtl import tasks
from fedjax_mtl.core.checks import InputError, check_choice
from fedjax_mtl.core.federation import Federation, Splits, check_labels, make_federation
from fedjax_mtl.data.digits import load_digits
from fedjax_mtl.data.mixtures import (
    draw_clients,
    draw_components,
    draw_mixtures,
    hold_out_evenly,
    label_permutations,
    permute_labels,
    rotate_images,
)
from fedjax_mtl.data.partition import dirichlet_labels, pachinko, split_clients
from fedjax_mtl.data.problem import Problem, ProblemGroup, one_group
from fedjax_mtl.data.synthetic import synthetic_mixture

Rows = list[np.ndarray]


def _check_unseen(unseen_fraction: float) -> None:
    if not 0 <= unseen_fraction < 1:
        raise InputError(f"unseen_fraction is {unseen_fraction}; give a share in [0, 1)")


def _hold_out(examples: dict[str, np.ndarray], train: Rows, test: Rows, num_unseen: int) -> Splits:
    """The splits in which the first ``num_unseen`` clients are held out of training."""
    first = make_federation(examples, train[num_unseen:])

    def of(rows: Rows) -> Federation | None:
        return make_federation(first.examples, rows) if rows else None

    return Splits(
        first,
        make_federation(first.examples, test[num_unseen:]),
        of(train[:num_unseen]),
        of(test[:num_unseen]),
    )


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
    """Clients that draw from a few distributions of digits.

    Training and test images come from different pools.
    """
    source = load_digits()
    order = rng.permutation(len(source["labels"]))
    cut = int(0.7 * len(order))
    drawn = (
        draw_clients(order[:cut], num_clients, train_size, rng),
        draw_clients(order[cut:], num_clients, test_size, rng),
    )
    owned = np.split(np.arange(num_clients * (train_size + test_size)), num_clients)
    images = np.concatenate([np.concatenate(pair) for pair in zip(*drawn, strict=True)])
    inputs, labels = source["inputs"][images], source["labels"][images]
    held = int(round(unseen_fraction * num_clients))
    mixtures = hold_out_evenly(draw_mixtures(num_clients, num_components, alpha, rng), held)
    components = draw_components(owned, mixtures, len(labels), rng)
    if partition == "label_permuted":
        permutations = label_permutations(num_components, 10, rng)
        labels = permute_labels(labels, components, permutations)
    else:
        angles = [m * 360 / num_components for m in range(num_components)]
        inputs = rotate_images(inputs, components, angles)
    train, test = ([own[:train_size] for own in owned], [own[train_size:] for own in owned])
    return _hold_out({"inputs": inputs, "labels": labels}, train, test, held)


def digits_problem(
    *,
    partition: str = "label_permuted",
    num_clients: int = 100,
    num_components: int = 3,
    alpha: float = 0.4,
    train_size: int = 30,
    test_size: int = 60,
    unseen_fraction: float = 0.25,
    seed: int = 0,
) -> Problem:
    """The digits of scikit-learn, as a mixture of distributions or split by label.

    Args:
        partition: ``label_permuted`` or ``rotated``, mixtures of distributions that share the
            images and differ in what the labels mean or in how the images are turned; or
            ``dirichlet``, a split by label.
        num_clients: how many clients, those held out among them.
        num_components: distributions of the mixture.
        alpha: of the Dirichlet distribution from which each client's weights are drawn, or by which
            each label is spread over the clients.
        train_size: training images of every client of a mixture; of the split by label it says
            only, together with ``test_size``, in what proportion a client's images are cut.
        test_size: test images of every client of a mixture.
        unseen_fraction: share of the clients that training never sees.
        seed: of all draws.

    Raises:
        InputError: an unknown partition, or a share outside [0, 1).
    """
    check_choice("config.data.partition", partition, ("label_permuted", "rotated", "dirichlet"))
    _check_unseen(unseen_fraction)
    rng = np.random.default_rng(seed)
    if partition == "dirichlet":
        examples = load_digits()
        rows = dirichlet_labels(examples["labels"], num_clients, alpha, rng)
        fraction = test_size / (train_size + test_size)
        splits = split_clients(
            examples, rows, rng, test_fraction=fraction, unseen_fraction=unseen_fraction
        )
    else:
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
    return one_group(ProblemGroup(splits, tasks.classification(), (8, 8, 1), 10))


def synthetic_mixture_problem(
    *,
    num_clients: int = 300,
    num_components: int = 3,
    dimension: int = 150,
    num_test: int = 5000,
    alpha: float = 0.4,
    noise_level: float = 0.1,
    unseen_fraction: float = 0.2,
    seed: int = 1234,
    fidelity: str = "paper",
) -> Problem:
    """FedEM's synthetic mixture of linear classifiers.

    Args:
        num_clients: as for :func:`fedjax_mtl.data.synthetic_mixture`.
        num_components: as for :func:`fedjax_mtl.data.synthetic_mixture`.
        dimension: as for :func:`fedjax_mtl.data.synthetic_mixture`.
        num_test: as for :func:`fedjax_mtl.data.synthetic_mixture`.
        alpha: as for :func:`fedjax_mtl.data.synthetic_mixture`.
        noise_level: as for :func:`fedjax_mtl.data.synthetic_mixture`.
        unseen_fraction: as for :func:`fedjax_mtl.data.synthetic_mixture`.
        seed: as for :func:`fedjax_mtl.data.synthetic_mixture`.
        fidelity: as for :func:`fedjax_mtl.data.synthetic_mixture`.
    """
    made = synthetic_mixture(
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
    return one_group(ProblemGroup(made.splits, tasks.binary_classification(), (dimension,), 1))


def images_problem(
    *,
    source: str,
    data_dir: str | None = None,
    fraction: float = 1.0,
    partition: str = "dirichlet",
    num_clients: int = 100,
    num_groups: int | None = None,
    alpha: float = 0.4,
    beta: float = 10.0,
    test_fraction: float = 0.2,
    unseen_fraction: float = 0.2,
    seed: int = 12345,
) -> Problem:
    """EMNIST, CIFAR-10 or CIFAR-100 through TFDS, split by label.

    Args:
        source: ``emnist``, ``cifar10`` or ``cifar100``.
        data_dir: the TFDS data directory; default as in TFDS.
        fraction: share of the images that is used.
        partition: ``dirichlet``, which spreads groups of labels over the clients; or ``pachinko``,
            first over coarse labels, then over the fine ones in each (CIFAR-100).
        num_clients: how many clients, those held out among them.
        num_groups: groups of labels that are dealt together; None deals every label by itself.
        alpha: of the Dirichlet distribution over labels, with Pachinko over coarse ones.
        beta: with Pachinko, of the Dirichlet distribution over fine labels.
        test_fraction: share of each client's images that it is judged by.
        unseen_fraction: share of the clients that training never sees.
        seed: of all draws.

    Raises:
        InputError: an unknown partition, one that needs coarse labels that are not there, or a
            share that is out of range.
        FileNotFoundError: a set that has not been prepared; the message says how.
    """
    from fedjax_mtl.data import tfds_sets

    check_choice("config.data.source", source, tfds_sets.NAMES)
    check_choice("config.data.partition", partition, ("dirichlet", "pachinko"))
    if not 0 < fraction <= 1:
        raise InputError(f"fraction is {fraction}; give a share in (0, 1]")
    examples = tfds_sets.load_tfds(source, data_dir)
    rng = np.random.default_rng(seed)
    count = len(examples["labels"])
    chosen = rng.permutation(count)[: int(round(fraction * count))]
    examples = {name: values[chosen] for name, values in examples.items()}
    labels, num_classes = examples["labels"], tfds_sets.NUM_CLASSES[source]
    check_labels(labels, num_classes)
    if partition == "dirichlet":
        rows = dirichlet_labels(labels, num_clients, alpha, rng, num_groups)
    elif "coarse_labels" not in examples:
        raise InputError(
            f"pachinko needs coarse labels, which {source} does not have; use "
            "config.data.partition=dirichlet"
        )
    else:
        coarse = examples["coarse_labels"]
        rows = pachinko(labels, coarse, num_clients, rng, alpha=alpha, beta=beta)
    inputs = _normalised(examples["inputs"], **tfds_sets.NORMALISE[source])
    splits = split_clients(
        {"inputs": inputs, "labels": labels},
        rows,
        rng,
        test_fraction=test_fraction,
        unseen_fraction=unseen_fraction,
    )
    return one_group(ProblemGroup(splits, tasks.classification(), inputs.shape[1:], num_classes))


def _normalised(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    centred = images / np.float32(255) - np.asarray(mean, np.float32)
    return centred / np.asarray(std, np.float32)


def shakespeare_problem(
    *,
    path: str | None = None,
    stride: int = 1,
    max_windows: int | None = None,
    unseen_fraction: float = 0.2,
    seed: int = 1234,
) -> Problem:
    """Shakespeare by speaking role; the next character is predicted.

    Roles without windows both to train and to test on are left out.

    Args:
        path: the text of the complete works.
        stride: characters between the starts of two windows.
        max_windows: of a role; None takes all.
        unseen_fraction: share of the roles that training never sees.
        seed: of the choice of those roles.

    Raises:
        InputError: no path, a share outside [0, 1), or a text that is too short.
        FileNotFoundError: no such file.
    """
    from fedjax_mtl.data.shakespeare import WINDOW, character_weights, load_shakespeare

    if not path:
        raise InputError(
            "config.data.path is empty; name the text of the complete works, e.g. "
            "--config.data.path=100.txt"
        )
    _check_unseen(unseen_fraction)
    windows = load_shakespeare(os.fspath(path), stride=stride, max_windows_per_client=max_windows)
    train, test = [], []
    for client in range(len(windows.names)):
        own = np.nonzero(windows.client == client)[0]
        is_test = windows.is_test[own]
        if is_test.any() and not is_test.all():
            train.append(own[~is_test])
            test.append(own[is_test])
    if not train:
        raise InputError(
            f"no role in {path} has windows of {WINDOW} characters both to train and to test on; "
            "lower config.data.stride or name a longer text"
        )
    order = np.random.default_rng(seed).permutation(len(train))
    splits = _hold_out(
        {"inputs": windows.inputs, "labels": windows.labels},
        [train[c] for c in order],
        [test[c] for c in order],
        int(round(unseen_fraction * len(order))),
    )
    task = tasks.sequence_classification(class_weights=character_weights())
    return one_group(ProblemGroup(splits, task, (WINDOW,), 100))
