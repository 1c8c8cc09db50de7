"""Groups of clients: who has which model and task, and how clients are counted."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl.clients.updates import ClientUpdate
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import Cohort
from fedjax_mtl.core.model import Model
from fedjax_mtl.core.task import Task
from fedjax_mtl.rounds import engine
from fedjax_mtl.rounds.engine import Weighting

PyTree = Any
Server: TypeAlias = optax.GradientTransformation
OwnersServer: TypeAlias = Callable[[np.ndarray], Server]
Models: TypeAlias = Model | dict[str, Model]
Tasks: TypeAlias = Task | dict[str, Task]
Counts: TypeAlias = int | dict[str, int]


class Group(NamedTuple):
    """Clients with the same task, model and local training.

    Attributes:
        init_params: ``key -> params``. In a population of groups, leaves of the same path and shape
            in several groups are the same parameters.
        client: what one of them does.
        num_clients: how many there are.
    """

    init_params: Callable[[jax.Array], PyTree]
    client: ClientUpdate
    num_clients: int


def each_group(
    model: Models,
    task: Tasks,
    num_clients: Counts,
    make_client: Callable[[Model, Task], ClientUpdate],
    make_init: Callable[[Model], Callable[[jax.Array], PyTree]] = lambda model: model.init,
) -> Group | dict[str, Group]:
    """The group, or groups by name, in which ``make_client(model, task)`` is the client update.

    Args:
        model: one model, or one for each group.
        task: one task, or one for each group.
        num_clients: how many clients; by group if they come in groups, which decides whether they
            do. A model or task that is given once then serves all groups.
        make_client: the client update of a group.
        make_init: how a group's parameters are initialised, from its model.

    Raises:
        InputError: a group without a model or a task.
    """

    def group(name: str, count: int) -> Group:
        own = _of_group(model, name, "model")
        return Group(make_init(own), make_client(own, _of_group(task, name, "task")), count)

    if isinstance(num_clients, dict):
        return {name: group(name, count) for name, count in num_clients.items()}
    return group("", num_clients)


def _of_group(value: Any, name: str, what: str) -> Any:
    """A group's own of values given by group, or the one that all have."""
    if not isinstance(value, dict):
        return value
    if name not in value:
        raise InputError(
            f"group {name!r} has no {what}; they are given for {', '.join(sorted(value))}"
        )
    return value[name]


def group_shapes(model: Models, num_clients: Counts) -> dict[str, PyTree]:
    """The shapes of each group's parameters; one group that comes alone is called ``""``."""

    names = sorted(num_clients) if isinstance(num_clients, dict) else [""]
    models = {name: _of_group(model, name, "model") for name in names}
    return {name: jax.eval_shape(own.init, jax.random.key(0)) for name, own in models.items()}


def check_group_sizes(groups: dict[str, Any]) -> None:
    """Raises InputError if there is no group, or a group without clients."""
    if not groups:
        raise InputError("a population needs at least one group; groups is empty")
    for name, group in groups.items():
        if group.num_clients < 1:
            raise InputError(
                f"group {name!r} has {group.num_clients} clients; a task without clients cannot be "
                "learned, drop it"
            )


def client_offsets(num_clients: dict[str, int]) -> dict[str, int]:
    """The number of each group's first client among all: groups follow each other by name."""
    starts = np.cumsum([0] + [num_clients[name] for name in sorted(num_clients)])
    return dict(zip(sorted(num_clients), starts[:-1].tolist(), strict=True))


def population_size(num_clients: Counts) -> int:
    """How many clients there are in all groups together."""
    return sum(num_clients.values()) if isinstance(num_clients, dict) else num_clients


def population_ids(groups: tuple[str, ...], num_clients: dict[str, int]) -> np.ndarray:
    """The numbers that some groups' clients have in the whole population, int ``[clients]``."""
    starts = client_offsets(num_clients)
    return np.concatenate([starts[name] + np.arange(num_clients[name]) for name in groups])


def check_full_participation(cohort: Cohort, num_clients: int) -> None:
    """Raises InputError unless the cohort has a slot for every client of the population."""
    if cohort.client_ids.shape[0] != num_clients:
        raise InputError(
            f"this algorithm needs all {num_clients} clients in every round, the cohort has "
            f"{cohort.client_ids.shape[0]}; use full participation"
        )


def population_weights(weighting: Weighting, cohorts: dict[str, Cohort]) -> dict[str, jax.Array]:
    """:func:`fedjax_mtl.rounds.engine.cohort_weights` over all groups together, split by group."""
    if callable(weighting) or len(cohorts) == 1:
        return {name: engine.cohort_weights(weighting, own) for name, own in cohorts.items()}
    joined = next(iter(cohorts.values()))._replace(
        present=jnp.concatenate([cohort.present for cohort in cohorts.values()]),
        shares=jnp.concatenate([cohort.shares for cohort in cohorts.values()]),
    )
    ends = np.cumsum([cohort.present.shape[0] for cohort in cohorts.values()])[:-1]
    parts = jnp.split(engine.cohort_weights(weighting, joined), ends)
    return dict(zip(cohorts, parts, strict=True))
