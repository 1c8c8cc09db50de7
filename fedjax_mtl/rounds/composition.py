"""What an algorithm of :func:`fedjax_mtl.rounds.federated.federated` is made of, and its state."""

from typing import Any, NamedTuple

import jax
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.execution import Execution, default_execution
from fedjax_mtl.rounds.engine import Weighting
from fedjax_mtl.rounds.groups import Group
from fedjax_mtl.rounds.sections import Section

PyTree = Any


class FederatedState(NamedTuple):
    """The state of an algorithm that :func:`federated` composes.

    Attributes:
        round: int32 ``[]``; rounds done.
        params: what the server holds. One group: the whole model, in which leaves that do not
            travel stay as initialised; with ``models="own"`` those that travel have a leading axis
            ``[clients]``. Several groups: the leaves that travel, of all groups merged; with
            ``models="own"`` by group, ``[clients of the group, ...]``.
        server: the state of the server's transformations.
        clients: what each client keeps, leaves ``[clients, ...]``, by group if they come in groups.
        personal: the leaves that do not travel, by group, as initialised; ``()`` with one group.
        owners: the states of the transformations for what some groups own, by the owners' names
            joined by ``+``; ``()`` with one group.
    """

    round: jax.Array
    params: PyTree
    server: optax.OptState
    clients: PyTree
    personal: PyTree = ()
    owners: PyTree = ()


class Composition(NamedTuple):
    """What an algorithm of :func:`federated` is made of; ``Algorithm.parts`` holds it.

    Attributes:
        groups: by name; one group that comes alone is called ``""``.
        grouped: whether clients come in groups.
        servers: the chain of each section, by the section's name.
        own: whether the server holds a model for every client.
        weighting: see :func:`fedjax_mtl.rounds.engine.cohort_weights`.
        execution: how clients are mapped; None picks by platform and model size.
        full_participation: whether every cohort must be the whole population.
        templates: the shapes of each group's parameters.
        sections: the parts of the parameters that have a server step of their own.
        summed: whether every section's server only averages.
    """

    groups: dict[str, Group]
    grouped: bool
    servers: dict[str, optax.GradientTransformationExtraArgs]
    own: bool
    weighting: Weighting
    execution: Execution | None
    full_participation: bool
    templates: dict[str, PyTree]
    sections: tuple[Section, ...]
    summed: bool

    def by_group(self, values: Any) -> dict[str, Any]:
        """Values that the outside gives by group, or bare where clients do not come in groups."""
        if not self.grouped:
            return {"": values}
        if set(values) != set(self.groups):
            raise InputError(
                f"the cohorts are of groups {sorted(values)}, the algorithm is for "
                f"{sorted(self.groups)}; use sampling.by_group"
            )
        return {name: values[name] for name in sorted(values)}

    def outside(self, values: dict[str, Any]) -> Any:
        """The inverse of :meth:`by_group`."""
        return values if self.grouped else values[""]


class Holding(NamedTuple):
    """A group's leaves, those that travel apart from those that stay.

    Each tree has None in the places of the other.

    Attributes:
        travelling: the leaves that travel; with own models ``[clients of the group, ...]``.
        staying: the leaves that stay.
    """

    travelling: PyTree
    staying: PyTree


def split_params(group: Group, params: PyTree) -> Holding:
    """What a group holds of one client's parameters."""
    return Holding(*trees.partition(params, group.client.shared))


def holding_of(composition: Composition, state: FederatedState, name: str) -> Holding:
    """What a group holds in a state."""
    group = composition.groups[name]
    if not composition.grouped:
        return split_params(group, state.params)
    staying = state.personal[name]
    if composition.own:
        return Holding(state.params[name], staying)
    leaves = trees.leaves_by_path(state.params)
    travels = group.client.shared
    travelling = trees.map_with_path(
        lambda path, _: leaves[path] if travels(path) else None, composition.templates[name]
    )
    return Holding(travelling, staying)


def _one_model(composition: Composition, holding: Holding) -> PyTree:
    """One client's model (arrays or shapes): what decides how many fit into a chunk.

    Of own models the leaves that all clients have once do not count.
    """
    if not composition.own:
        return trees.combine(*holding)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), holding.travelling)


def execution_for(composition: Composition, holding: Holding) -> Execution:
    """How a group's clients are mapped."""
    if composition.execution is not None:
        return composition.execution
    return default_execution(_one_model(composition, holding))


def merge_holdings(composition: Composition, held: dict[str, Holding]) -> tuple[PyTree, PyTree]:
    """``params`` and ``personal`` of the state from what each group holds."""
    if not composition.grouped:
        return trees.combine(*held[""]), ()
    personal = {name: holding.staying for name, holding in held.items()}
    if composition.own:
        return {name: holding.travelling for name, holding in held.items()}, personal
    leaves: dict[trees.Path, Any] = {}
    for name in reversed(held):  # of leaves with one path, the first group's count
        leaves |= trees.leaves_by_path(held[name].travelling)
    return trees.from_paths(leaves), personal
