"""Who has which data: the Federation, a round's Cohort, and the view that one client has of itself."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

NO_BUDGET = np.iinfo(np.int32).max
"""The local step budget of a client that is nobody's straggler."""


class Federation(NamedTuple):
    """Clients and the rows of a common table of examples that each of them owns.

    The examples are held once: partitioning again, taking a cohort or holding clients out copies row numbers, never data.

    Attributes:
        examples: pytree with leaves ``[num_examples, ...]``; the tasks of this library expect ``inputs`` and ``labels``.
        indices: int32 ``[clients, capacity]``; rows of ``examples``. Entries at and beyond a client's size are padding.
        sizes: int32 ``[clients]``; how many examples each client owns.
    """

    examples: PyTree
    indices: jax.Array
    sizes: jax.Array

    @property
    def num_clients(self) -> int:
        return self.indices.shape[0]

    @property
    def capacity(self) -> int:
        """The most examples a client can own here (a shape, not a count)."""
        return self.indices.shape[1]

    def take(self, client_ids: jax.Array) -> "Federation":
        """The Federation of these clients, ``[cohort]`` of them, over the same examples."""
        return self._replace(indices=self.indices[client_ids], sizes=self.sizes[client_ids])


Population = dict[str, Federation]
"""A heterogeneous population: one Federation for each group of clients with the same task set."""


class Cohort(NamedTuple):
    """The clients of one round.

    Attributes:
        federation: the cohort's rows, ``[cohort]`` clients; the size of an absent client is 0, so it costs no step.
        client_ids: int32 ``[cohort]``; their numbers in the population.
        present: bool ``[cohort]``; False marks a slot that nobody fills this round.
        budgets: int32 ``[cohort]``; the most local steps each client manages (stragglers), or ``NO_BUDGET``.
        shares: float ``[cohort]``; each client's share n_t / N of the whole population's examples.
    """

    federation: Federation
    client_ids: jax.Array
    present: jax.Array
    budgets: jax.Array
    shares: jax.Array


class ClientView(NamedTuple):
    """All that one client sees in a round: its rows of the examples, and the facts of the round.

    Attributes:
        examples: the population's table, leaves ``[num_examples, ...]``, read only through ``rows``.
        rows: int32 ``[capacity]``; size: int32 ``[]``; client_id: int32 ``[]``; budget: int32 ``[]``.
        round: int32 ``[]``, from 0.
        round_key: the key of the round, the same for all clients (common coins).
    """

    examples: PyTree
    rows: jax.Array
    size: jax.Array
    client_id: jax.Array
    budget: jax.Array
    round: jax.Array
    round_key: jax.Array


def make_federation(
    examples: PyTree, rows: Sequence[np.ndarray], capacity: int | None = None
) -> Federation:
    """Builds a Federation from one array of row numbers a client.

    Args:
        examples: pytree with leaves ``[num_examples, ...]``.
        rows: for each client, the rows of ``examples`` that it owns.
        capacity: columns of ``indices``; by default the size of the largest client.

    Raises:
        ValueError: no client, a client without examples, rows out of range, leaves of different length, a capacity that is
            too small, or a NaN or an infinity in the examples. The message names the client or leaf.
    """
    leaves = jax.tree_util.tree_leaves_with_path(examples)
    if not leaves:
        raise ValueError(
            "examples is an empty pytree; give it arrays, e.g. {'inputs': ..., 'labels': ...}"
        )
    num_examples = len(leaves[0][1])
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        if len(leaf) != num_examples:
            raise ValueError(
                f"examples{name} has {len(leaf)} rows but the first leaf has {num_examples}; "
                "all leaves need one row an example"
            )
        if np.issubdtype(leaf.dtype, np.floating):
            bad = ~np.isfinite(np.asarray(leaf)).reshape(num_examples, -1).all(axis=1)
            if bad.any():
                raise ValueError(
                    f"examples{name} holds a NaN or infinity in row {int(np.argmax(bad))} "
                    f"({int(bad.sum())} rows in all); remove or impute these rows first"
                )
    if not len(rows):
        raise ValueError("a federation needs at least one client; rows is empty")
    sizes = np.array([len(r) for r in rows], np.int32)
    if (sizes == 0).any():
        raise ValueError(
            f"client {int(np.argmin(sizes))} owns no example; drop empty clients before building the federation"
        )
    capacity = int(sizes.max()) if capacity is None else capacity
    if capacity < sizes.max():
        raise ValueError(
            f"capacity {capacity} is smaller than client {int(np.argmax(sizes))}, "
            f"which owns {int(sizes.max())} examples; raise the capacity"
        )
    indices = np.zeros((len(rows), capacity), np.int32)
    for client, own in enumerate(rows):
        own = np.asarray(own)
        if own.min() < 0 or own.max() >= num_examples:
            raise ValueError(
                f"client {client} owns row {int(own.max() if own.max() >= num_examples else own.min())}, "
                f"but examples has rows 0..{num_examples - 1}"
            )
        indices[client, : len(own)] = own
    return Federation(jax.tree.map(jnp.asarray, examples), jnp.asarray(indices), jnp.asarray(sizes))


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError if a label lies outside ``0 .. num_classes - 1``, naming the first such row."""
    labels = np.asarray(labels)
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        row = np.unravel_index(int(np.argmax(bad)), bad.shape)
        raise ValueError(
            f"label {labels[row]} in row {int(row[0])} is outside 0..{num_classes - 1}; "
            f"fix the labels or set num_classes to at least {int(labels.max()) + 1}"
        )


class Splits(NamedTuple):
    """One data set, federated: what clients train on and are judged by, and clients that training never sees.

    All four share one table of examples. ``unseen_train`` and ``unseen_test`` are None where nobody is held out.
    """

    train: Federation
    test: Federation
    unseen_train: Federation | None = None
    unseen_test: Federation | None = None
