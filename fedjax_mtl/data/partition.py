"""Partitioners: which client owns which rows.

They are plain numpy and made once; each returns one array of row numbers for each client. Clients
that a random partition leaves without examples are dropped, as the papers' released codes do.
"""

from typing import Any

import numpy as np

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import Federation, Splits, make_federation

Rows = list[np.ndarray]


def _check(num_clients: int, num_examples: int) -> None:
    if not 1 <= num_clients <= num_examples:
        raise InputError(
            f"cannot split {num_examples} examples over {num_clients} clients; give every client "
            "at least one"
        )


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise InputError(f"{name} is {value}; a Dirichlet concentration must be positive")


def iid(num_examples: int, num_clients: int, rng: np.random.Generator) -> Rows:
    """Cuts the examples into equal random parts, whose sizes differ by at most one."""
    _check(num_clients, num_examples)
    return [np.sort(part) for part in np.array_split(rng.permutation(num_examples), num_clients)]


def dirichlet_labels(
    labels: np.ndarray,
    num_clients: int,
    alpha: float,
    rng: np.random.Generator,
    num_groups: int | None = None,
) -> Rows:
    """Deals the examples of each group of labels to the clients by a draw from Dirichlet(alpha).

    This is label skew.

    Args:
        labels: int ``[num_examples]``.
        num_clients: how many clients the examples are dealt to.
        alpha: concentration; a small one gives each client few groups.
        rng: the source of randomness.
        num_groups: labels are shuffled and cut into this many groups. None makes every label its
            own group (EMNIST in FedEM, arXiv 2108.10252, and its paper's text for CIFAR-10); the
            released code cuts CIFAR-10 into 3.
    """
    _check(num_clients, len(labels))
    _positive("alpha", alpha)
    names = rng.permutation(np.unique(labels))
    count = len(names) if num_groups is None else num_groups
    if not 1 <= count <= len(names):
        raise InputError(f"num_groups is {num_groups} but there are {len(names)} labels")
    parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for group in np.array_split(names, count):
        members = rng.permutation(np.nonzero(np.isin(labels, group))[0])
        counts = rng.multinomial(len(members), rng.dirichlet(np.full(num_clients, alpha)))
        for part, own in zip(parts, np.split(members, np.cumsum(counts)[:-1]), strict=True):
            part.append(own)
    rows = [np.concatenate(part) for part in parts]
    return [own for own in rows if len(own)]


def label_shards(
    labels: np.ndarray, num_clients: int, shards_per_client: int, rng: np.random.Generator
) -> Rows:
    """Sorts by label, cuts into shards, and deals a few shards to each client.

    This is the pathological split of FedAvg (arXiv 1602.05629).
    """
    _check(num_clients * shards_per_client, len(labels))
    shards = np.array_split(np.argsort(labels, kind="stable"), num_clients * shards_per_client)
    order = rng.permutation(len(shards)).reshape(num_clients, shards_per_client)
    return [np.concatenate([shards[s] for s in own]) for own in order]


def pachinko(
    labels: np.ndarray,
    coarse_labels: np.ndarray,
    num_clients: int,
    rng: np.random.Generator,
    *,
    size: int | None = None,
    alpha: float = 0.4,
    beta: float = 10.0,
) -> Rows:
    """Allocates examples over a two-level tree of labels, by Pachinko allocation.

    It is that of Reddi et al. (arXiv 2003.00295, appendix F), with which FedEM splits CIFAR-100.
    Every client draws a distribution over coarse labels from Dirichlet(alpha) and, for each, one
    over its fine labels from Dirichlet(beta), over the labels that are left; then it draws ``size``
    images one by one, each without replacement. A label that runs out is removed and the rest
    renormalised.

    Args:
        labels: fine labels, int ``[num_examples]``.
        coarse_labels: int ``[num_examples]``.
        num_clients: how many clients.
        rng: the source of randomness.
        size: examples of each client; by default all of them shared equally.
        alpha: concentration of the coarse labels.
        beta: concentration of the fine labels.

    Raises:
        InputError: more examples are needed than there are, or a concentration that is not
            positive.
    """
    _check(num_clients, len(labels))
    _positive("alpha", alpha)
    _positive("beta", beta)
    size = len(labels) // num_clients if size is None else size
    if size * num_clients > len(labels):
        raise InputError(
            f"{num_clients} clients of {size} examples need more than the {len(labels)} there are"
        )
    pools = {
        fine: list(rng.permutation(np.nonzero(labels == fine)[0])) for fine in np.unique(labels)
    }
    children: dict[Any, list[Any]] = {}
    for fine in pools:
        children.setdefault(coarse_labels[pools[fine][0]], []).append(fine)
    return [_pachinko_client(pools, children, size, alpha, beta, rng) for _ in range(num_clients)]


def _pachinko_client(
    pools: dict[Any, list[int]],
    children: dict[Any, list[Any]],
    size: int,
    alpha: float,
    beta: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draws one client's rows, ``[size]``.

    It takes them out of ``pools``, the rows that are left of each fine label, and labels that run
    out of ``children``, the fine labels of each coarse one.
    """
    coarse = sorted(children)
    coarse_weights = list(rng.dirichlet(np.full(len(coarse), alpha)) + 1e-12)
    fine = {c: list(children[c]) for c in coarse}
    fine_weights = {c: list(rng.dirichlet(np.full(len(fine[c]), beta)) + 1e-12) for c in coarse}
    own = []
    for _ in range(size):
        c = coarse[_draw_place(coarse_weights, rng)]
        at = _draw_place(fine_weights[c], rng)
        name = fine[c][at]
        own.append(pools[name].pop())
        if pools[name]:
            continue
        del fine[c][at], fine_weights[c][at]
        children[c].remove(name)
        if not children[c]:
            del children[c], coarse_weights[coarse.index(c)]
            coarse.remove(c)
    return np.array(own)


def _draw_place(weights: list[float], rng: np.random.Generator) -> int:
    """Draws a place in the list with probabilities in proportion to its entries."""
    total = np.array(weights)
    return int(rng.choice(len(total), p=total / total.sum()))


def split_clients(
    examples: Any,
    rows: Rows,
    rng: np.random.Generator,
    *,
    test_fraction: float = 0.2,
    unseen_fraction: float = 0.0,
) -> Splits:
    """Cuts each client's rows into train and test, and holds some clients out of training.

    A client with fewer than two examples cannot be cut and is dropped.

    Args:
        examples: pytree with leaves ``[num_examples, ...]``.
        rows: one array a client.
        rng: the source of randomness.
        test_fraction: of each client's examples, rounded, at least one on either side.
        unseen_fraction: of the clients, chosen at random.

    Raises:
        InputError: a fraction outside [0, 1) (test: (0, 1)), or nobody left to train with.
    """
    if not 0 < test_fraction < 1:
        raise InputError(f"test_fraction is {test_fraction}; give a share between 0 and 1")
    if not 0 <= unseen_fraction < 1:
        raise InputError(f"unseen_fraction is {unseen_fraction}; give a share in [0, 1)")
    rows = [own for own in rows if len(own) >= 2]
    if not rows:
        raise InputError(
            "no client owns two examples, one to train on and one to test; use fewer clients"
        )
    train, test = [], []
    for own in rows:
        shuffled = rng.permutation(own)
        count = min(max(int(round(test_fraction * len(own))), 1), len(own) - 1)
        test.append(shuffled[:count])
        train.append(shuffled[count:])
    order = rng.permutation(len(rows))
    num_unseen = min(int(round(unseen_fraction * len(rows))), len(rows) - 1)
    held, seen = np.sort(order[:num_unseen]), np.sort(order[num_unseen:])

    first = make_federation(examples, [train[c] for c in seen])

    def unseen(parts: Rows) -> Federation | None:
        if not len(held):
            return None
        return make_federation(first.examples, [parts[c] for c in held])

    judged = make_federation(first.examples, [test[c] for c in seen])
    return Splits(first, judged, unseen(train), unseen(test))
