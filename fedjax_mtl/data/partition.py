"""Partitioners: which client owns which rows. Plain numpy, made once; each returns one array of row numbers a client.

Clients that a random partition leaves without examples are dropped, as the papers' released codes do.
"""

from typing import Any

import numpy as np

from fedjax_mtl.core.federation import Federation, Splits, make_federation

Rows = list[np.ndarray]


def _check(num_clients: int, num_examples: int) -> None:
    if not 1 <= num_clients <= num_examples:
        raise ValueError(
            f"cannot split {num_examples} examples over {num_clients} clients; give every client at least one"
        )


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; a Dirichlet concentration must be positive")


def iid(num_examples: int, num_clients: int, rng: np.random.Generator) -> Rows:
    """Equal random parts (sizes differ by at most one)."""
    _check(num_clients, num_examples)
    return [np.sort(part) for part in np.array_split(rng.permutation(num_examples), num_clients)]


def dirichlet_labels(
    labels: np.ndarray,
    num_clients: int,
    alpha: float,
    rng: np.random.Generator,
    num_groups: int | None = None,
) -> Rows:
    """Label skew: the examples of each group of labels are dealt to the clients by a draw from Dirichlet(alpha).

    Args:
        labels: int ``[num_examples]``.
        alpha: concentration; small gives each client few groups.
        num_groups: labels are shuffled and cut into this many groups. None: every label its own (EMNIST in FedEM, arXiv 2108.10252, and its paper's
            text for CIFAR-10); the released code cuts CIFAR-10 into 3.
    """
    _check(num_clients, len(labels))
    _positive("alpha", alpha)
    names = rng.permutation(np.unique(labels))
    count = len(names) if num_groups is None else num_groups
    if not 1 <= count <= len(names):
        raise ValueError(f"num_groups is {num_groups} but there are {len(names)} labels")
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
    """The pathological split of FedAvg (arXiv 1602.05629): sorted by label, cut into shards, a few dealt to each client."""
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
    """Pachinko allocation over a two-level label tree (Reddi et al., arXiv 2003.00295, appendix F; FedEM's CIFAR-100).

    Every client draws a distribution over coarse labels from Dirichlet(alpha) and, for each, one over its fine labels from Dirichlet(beta), over the labels
    that are left; then ``size`` images one by one, each without replacement. A label that runs out is removed and the rest renormalised.

    Args:
        labels, coarse_labels: int ``[num_examples]``, fine and coarse.
        size: examples of each client; default all of them shared equally.
    """
    _check(num_clients, len(labels))
    _positive("alpha", alpha)
    _positive("beta", beta)
    size = len(labels) // num_clients if size is None else size
    if size * num_clients > len(labels):
        raise ValueError(
            f"{num_clients} clients of {size} examples need more than the {len(labels)} there are"
        )
    pools = {
        fine: list(rng.permutation(np.nonzero(labels == fine)[0])) for fine in np.unique(labels)
    }
    children: dict[Any, list] = {}
    for fine in pools:
        children.setdefault(coarse_labels[pools[fine][0]], []).append(fine)

    def draw(names: list, weights: np.ndarray) -> int:
        return int(rng.choice(len(names), p=weights / weights.sum()))

    rows = []
    for _ in range(num_clients):
        coarse = sorted(children)
        coarse_weights = list(rng.dirichlet(np.full(len(coarse), alpha)) + 1e-12)
        fine = {c: list(children[c]) for c in coarse}
        fine_weights = {c: list(rng.dirichlet(np.full(len(fine[c]), beta)) + 1e-12) for c in coarse}
        own = []
        for _ in range(size):
            c = coarse[draw(coarse, np.array(coarse_weights))]
            at = draw(fine[c], np.array(fine_weights[c]))
            name = fine[c][at]
            own.append(pools[name].pop())
            if pools[name]:
                continue
            del fine[c][at], fine_weights[c][at]
            children[c].remove(name)
            if not children[c]:
                del children[c], coarse_weights[coarse.index(c)]
                coarse.remove(c)
        rows.append(np.array(own))
    return rows


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
        examples: pytree with leaves ``[num_examples, ...]``. rows: one array a client.
        test_fraction: of each client's examples, rounded, at least one on either side.
        unseen_fraction: of the clients, chosen at random.

    Raises:
        ValueError: a fraction outside [0, 1) (test: (0, 1)), or nobody left to train with.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}; give a share between 0 and 1")
    if not 0 <= unseen_fraction < 1:
        raise ValueError(f"unseen_fraction is {unseen_fraction}; give a share in [0, 1)")
    rows = [own for own in rows if len(own) >= 2]
    if not rows:
        raise ValueError(
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

    def of(parts: Rows, clients: np.ndarray) -> Federation | None:
        if not len(clients):
            return None
        return make_federation(first.examples, [parts[c] for c in clients])

    return Splits(first, of(test, seen), of(train, held), of(test, held))
