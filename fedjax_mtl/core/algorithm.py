"""What an algorithm is: pure functions over an explicit state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

PyTree = Any
Info = dict[str, jax.Array]
ByGroup = Any
"""One value (a Cohort, say) if the clients do not come in groups; a dict of them by group if so."""


class Algorithm(NamedTuple):
    """A federated algorithm as pure functions over an explicit state pytree.

    Attributes:
        init: ``key -> state``.
        round: ``(state, cohort, key) -> (state, info)``. ``info`` holds named arrays of any shape,
            ``loss`` among them; its scalars are what a run logs.
        predict: ``(state, client_ids [clients], inputs [clients, batch, ...]) -> outputs
            [clients, batch, ...]``: each client's own personalised model.
        adapt: ``(state, newcomers: Federation, key) -> state``, a state whose clients are the
            newcomers.
        traffic: ``state -> (bytes up, bytes down)``, what one participating client sends and
            receives in a round; the mean over clients where they differ.
        num_clients: clients in the population the algorithm was made for; by group if they come
            in groups. Then cohorts, newcomers, client numbers, inputs and outputs are dicts too.
        tuned: clients are judged after ``adapt`` on their own training data, trained or not
            (FedAvg + tuning).
        parts: what the algorithm is made of, of those that :func:`fedjax_mtl.federated` composes.
    """

    init: Callable[[jax.Array], PyTree]
    round: Callable[[PyTree, ByGroup, jax.Array], tuple[PyTree, Info]]
    predict: Callable[[PyTree, ByGroup, PyTree], PyTree]
    adapt: Callable[[PyTree, ByGroup, jax.Array], PyTree]
    traffic: Callable[[PyTree], tuple[int, int]]
    num_clients: int | dict[str, int]
    tuned: bool = False
    parts: Any = None
