"""Who has which data: the Federation, a round's Cohort, and what one client sees of itself."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.core.checks import InputError

PyTree = Any

NO_BUDGET = np.iinfo(np.int32).max
"""The local step budget of a client that is nobody's straggler."""


class Federation(NamedTuple):
    """Clients and the rows of a common table of examples that each of them owns.

    The examples are held once: partitioning again, taking a cohort or holding clients out copies
    row numbers, never data.

    Attributes:
        examples: pytree with leaves ``[num_examples, ...]``; the tasks of this library expect
            ``inputs`` and ``labels``.
        indices: int32 ``[clients, capacity]``; rows of ``examples``. Entries at and beyond a
            client's size are padding.
        sizes: int32 ``[clients]``; how many examples each client owns.
    """

    examples: PyTree
    indices: jax.Array
    sizes: jax.Array

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return self.indices.shape[0]

    @property
    def capacity(self) -> int:
        """The most examples that a client can own here (a shape, not a count)."""
        return self.indices.shape[1]

    def take(self, client_ids: jax.Array) -> "Federation":
        """Returns the Federation of these clients, ``[cohort]`` of them, over the same examples."""
        return self._replace(indices=self.indices[client_ids], sizes=self.sizes[client_ids])


Population = dict[str, Federation]
"""A heterogeneous population: one Federation for each group of clients with the same task set."""


class Cohort(NamedTuple):
    """The clients of one round.

    Attributes:
        federation: the cohort's rows, ``[cohort]`` clients; the size of an absent client is 0, so
            that it costs no step.
        client_ids: int32 ``[cohort]``; their numbers in the population.
        present: bool ``[cohort]``; False marks a slot that nobody fills this round.
        budgets: int32 ``[cohort]``; the most local steps that each client manages (stragglers), or
            ``NO_BUDGET``.
        shares: float ``[cohort]``; each client's share n_t / N of the whole population's examples.
        work: float ``[cohort]``; the share of its own planned local steps that each client manages.
    """

    federation: Federation
    client_ids: jax.Array
    present: jax.Array
    budgets: jax.Array
    shares: jax.Array
    work: jax.Array


class ClientView(NamedTuple):
    """All that one client sees in a round: its rows of the examples, and the facts of the round.

    Attributes:
        examples: the population's table, leaves ``[num_examples, ...]``, read only through
            ``rows``.
        rows: int32 ``[capacity]``; the client's rows of ``examples``, with padding at the end.
        size: int32 ``[]``; how many of the rows are the client's.
        client_id: int32 ``[]``; its number in the population.
        budget: int32 ``[]``; the most local steps that it manages.
        round: int32 ``[]``, from 0.
        round_key: the key of the round, the same for all clients (common coins).
        work: float ``[]``; the share of the planned local steps that it manages.
    """

    examples: PyTree
    rows: jax.Array
    size: jax.Array
    client_id: jax.Array
    budget: jax.Array
    round: jax.Array
    round_key: jax.Array
    work: jax.Array | float = 1.0


def make_federation(
    examples: PyTree, rows: Sequence[np.ndarray], capacity: int | None = None
) -> Federation:
    """Builds a Federation from one array of row numbers a client.

    Args:
        examples: pytree with leaves ``[num_examples, ...]``.
        rows: for each client, the rows of ``examples`` that it owns.
        capacity: columns of ``indices``; by default the size of the largest client.

    Raises:
        InputError: no client, a client without examples, rows out of range, leaves of different
            length, a capacity that is too small, or a NaN or an infinity in the examples. The
            message names the client or leaf.
    """
    num_examples = _check_examples(examples)
    sizes = _check_sizes(rows)
    capacity = int(sizes.max()) if capacity is None else capacity
    if capacity < sizes.max():
        raise InputError(
            f"capacity {capacity} is smaller than client {int(np.argmax(sizes))}, "
            f"which owns {int(sizes.max())} examples; raise the capacity"
        )
    indices = np.zeros((len(rows), capacity), np.int32)
    for client, own in enumerate(rows):
        own = np.asarray(own)
        if own.min() < 0 or own.max() >= num_examples:
            bad = int(own.max() if own.max() >= num_examples else own.min())
            raise InputError(
                f"client {client} owns row {bad}, but examples has rows 0..{num_examples - 1}"
            )
        indices[client, : len(own)] = own
    return Federation(jax.tree.map(jnp.asarray, examples), jnp.asarray(indices), jnp.asarray(sizes))


def _check_examples(examples: PyTree) -> int:
    """Returns the number of examples, after a check that all leaves have it and are finite."""
    leaves = jax.tree_util.tree_leaves_with_path(examples)
    if not leaves:
        raise InputError(
            "examples is an empty pytree; give it arrays, e.g. {'inputs': ..., 'labels': ...}"
        )
    num_examples = len(leaves[0][1])
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        if len(leaf) != num_examples:
            raise InputError(
                f"examples{name} has {len(leaf)} rows but the first leaf has {num_examples}; "
                "all leaves need one row an example"
            )
        if np.issubdtype(leaf.dtype, np.floating):
            _check_finite(name, leaf)
    return num_examples


def _check_finite(name: str, leaf: np.ndarray) -> None:
    bad = ~np.isfinite(np.asarray(leaf)).reshape(len(leaf), -1).all(axis=1)
    if bad.any():
        raise InputError(
            f"examples{name} holds a NaN or infinity in row {int(np.argmax(bad))} "
            f"({int(bad.sum())} rows in all); remove or impute these rows first"
        )


def _check_sizes(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Returns how many examples each client owns, ``[clients]``; nobody may own none."""
    if not len(rows):
        raise InputError("a federation needs at least one client; rows is empty")
    sizes = np.array([len(own) for own in rows], np.int32)
    if (sizes == 0).any():
        raise InputError(
            f"client {int(np.argmin(sizes))} owns no example; "
            "drop empty clients before building the federation"
        )
    return sizes


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Checks that all labels lie in ``0 .. num_classes - 1``.

    Raises:
        InputError: a label lies outside; the message names the first such row.
    """
    labels = np.asarray(labels)
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        row = np.unravel_index(int(np.argmax(bad)), bad.shape)
        raise InputError(
            f"label {labels[row]} in row {int(row[0])} is outside 0..{num_classes - 1}; "
            f"fix the labels or set num_classes to at least {int(labels.max()) + 1}"
        )


class Splits(NamedTuple):
    """One data set, federated: what clients train on, what they are judged by, and unseen clients.

    All four share one table of examples.

    Attributes:
        train: what the clients train on.
        test: what the same clients are judged by.
        unseen_train: training data of clients that training never sees; None where nobody is held
            out.
        unseen_test: test data of the same unseen clients, or None.
    """

    train: Federation
    test: Federation
    unseen_train: Federation | None = None
    unseen_test: Federation | None = None
