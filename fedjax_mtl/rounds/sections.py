"""Which leaves meet in which server step: those that all groups have, and those that some own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError

PyTree = Any
Shapes = dict[trees.Path, jax.ShapeDtypeStruct]


class Section(NamedTuple):
    """Leaves that go through one server step, and the groups whose clients have them.

    Attributes:
        name: ``""`` for what all groups have; the owners joined by ``+`` for what some own.
        number: 0 for what all have, then 1, 2, ...: the step's key is folded from it.
        members: the groups whose clients meet in the step, in the order of the client axis.
        shapes: the shapes of one client's leaves, by path; None for one group that comes alone,
            whose travelling leaves all belong to the section, whatever tree they form.
    """

    name: str
    number: int
    members: tuple[str, ...]
    shapes: Shapes | None

    @property
    def owned(self) -> bool:
        """Whether only some groups have these leaves."""
        return bool(self.name)

    def label(self, report: str) -> str:
        """The name in a round's info of what the section's server reports."""
        return f"{report}/{self.name}" if self.owned else report

    def pick(self, tree: PyTree) -> PyTree:
        """The section's leaves of a group's tree, as nested dicts."""
        if self.shapes is None:
            return tree
        leaves = trees.leaves_by_path(tree)
        return trees.from_paths({path: leaves[path] for path in self.shapes if path in leaves})

    def one_copy(self, travelling: dict[str, PyTree]) -> PyTree:
        """The section's leaves of shared parameters, in which all who have one agree."""
        if self.shapes is None:
            return travelling[self.members[0]]
        leaves: dict[trees.Path, jax.Array] = {}
        for name in self.members:
            leaves |= trees.leaves_by_path(travelling[name])
        return trees.from_paths({path: leaves[path] for path in self.shapes})

    def joined(self, rows: dict[str, PyTree]) -> PyTree:
        """The members' rows one group after the other, ``[clients of the members, ...]``.

        Where a group lacks a leaf that meets here, its rows are 0.
        """
        if self.shapes is None:
            return rows[self.members[0]]
        parts = [self._filled(rows[name]) for name in self.members]
        joined = {path: jnp.concatenate([part[path] for part in parts]) for path in parts[0]}
        return trees.from_paths(joined)

    def owned_rows(self, rows: dict[str, PyTree]) -> PyTree:
        """For every leaf of :meth:`joined`, which rows are a client's own, bool ``[clients]``."""
        if self.shapes is None:
            return jax.tree.map(lambda x: jnp.ones(x.shape[0], bool), rows[self.members[0]])
        has = [(trees.leaves_by_path(rows[name]), _num_rows(rows[name])) for name in self.members]
        owned = {
            path: jnp.concatenate([jnp.full(count, path in leaves) for leaves, count in has])
            for path in self.shapes
        }
        return trees.from_paths(owned)

    def replaced(self, tree: PyTree, part: PyTree) -> PyTree:
        """A group's tree with the section's leaves from ``part``, as far as the group has them."""
        if self.shapes is None:
            return part
        new = trees.leaves_by_path(part)
        return trees.map_with_path(lambda path, leaf: new.get(path, leaf), tree)

    def _filled(self, tree: PyTree) -> dict[trees.Path, jax.Array]:
        leaves, count = trees.leaves_by_path(tree), _num_rows(tree)
        shapes = self.shapes or {}
        return {
            path: leaves[path] if path in leaves else jnp.zeros((count, *one.shape), one.dtype)
            for path, one in shapes.items()
        }


def _num_rows(tree: PyTree) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def whole_section() -> Section:
    """The section of one group that comes alone: all that travels."""
    return Section("", 0, ("",), None)


def make_sections(
    templates: dict[str, PyTree],
    travels: dict[str, trees.PathPredicate],
    meeting: trees.PathPredicate = trees.nothing,
) -> tuple[Section, ...]:
    """The sections of a population of groups.

    Args:
        templates: the shapes of each group's parameters.
        travels: path predicate of each group's leaves that travel.
        meeting: path predicate of leaves that join those that all groups have, whoever owns them.

    Raises:
        InputError: leaves of one path that travel with different shapes.
    """
    owners: dict[trees.Path, list[str]] = {}
    shapes: dict[trees.Path, tuple[str, Any]] = {}
    for name in sorted(templates):
        for path, leaf in trees.leaves_by_path(templates[name]).items():
            if not travels[name](path):
                continue
            first, known = shapes.setdefault(path, (name, leaf))
            if (known.shape, known.dtype) != (leaf.shape, leaf.dtype):
                raise InputError(
                    f"{'/'.join(path)} is {known.shape} in group {first!r} but {leaf.shape} in "
                    f"group {name!r}; parameters of one name that travel are shared, so give them "
                    "one shape, different names, or keep them personal"
                )
            owners.setdefault(path, []).append(name)
    everybody = tuple(sorted(templates))
    parts: dict[str, Shapes] = {}
    for path, names in owners.items():
        common = len(names) == len(everybody) or meeting(path)
        parts.setdefault("" if common else "+".join(names), {})[path] = shapes[path][1]
    ordered = sorted(parts)
    first_owned = 1 if "" not in parts else 0
    return tuple(
        Section(name, number, tuple(name.split("+")) if name else everybody, parts[name])
        for number, name in enumerate(ordered, first_owned)
    )
