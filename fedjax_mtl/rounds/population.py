"""The composition for heterogeneous populations: groups of clients with different tasks around one server.

Every group has its own parameters beside those that all have; nobody holds or computes a decoder that it does not train. Updates of what all groups share meet in one server
chain, updates of what only some own are combined among the owners.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl import costs
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate
from fedjax_mtl.core import trees
from fedjax_mtl.core.federation import Cohort
from fedjax_mtl.execution import Execution, default_execution, map_clients
from fedjax_mtl.rounds.federated import (
    Algorithm,
    Weighting,
    adapt_clients,
    check_step,
    client_key,
    cohort_inputs,
    cohort_weights,
    is_finite,
    mean_metrics,
    view,
    without_diverged,
)
from fedjax_mtl.server.averaging import step_from

PyTree = Any
Server = optax.GradientTransformation


class Group(NamedTuple):
    """Clients with the same task set.

    Attributes:
        init_params: ``key -> params``, nested dicts; entries of the same name and shape in several groups are the same parameters.
        client: what one of them does.
        num_clients: how many there are.
    """

    init_params: Callable[[jax.Array], PyTree]
    client: ClientUpdate
    num_clients: int


class PopulationState(NamedTuple):
    """The state of a :func:`heterogeneous` algorithm.

    Attributes:
        round: int32 ``[]``; rounds done.
        params: the parameters that travel, of all groups, merged.
        personal: the leaves that do not travel, by group, as initialised; newcomers start from them.
        server: the state of the server's transformations, for what all groups share.
        owners: those for what some groups own, by the owners' names joined by ``+``.
        clients: what each client keeps, by group, leaves ``[clients of the group, ...]``.
    """

    round: jax.Array
    params: PyTree
    personal: dict[str, PyTree]
    server: optax.OptState
    owners: dict[str, optax.OptState]
    clients: dict[str, PyTree]


class _Layout(NamedTuple):
    """Which leaves there are and who has them; a fact of the groups, not of a run."""

    templates: dict[str, PyTree]
    common: tuple[trees.Path, ...]
    owned: dict[str, tuple[trees.Path, ...]]

    def of_group(self, name: str, params: PyTree, personal: dict[str, PyTree]) -> PyTree:
        """A group's parameters: its part of those that travel, and its own."""
        leaves = trees.leaves_by_path(params) | trees.leaves_by_path(personal[name])
        return trees.from_paths(
            {path: leaves[path] for path in trees.leaves_by_path(self.templates[name])}
        )


def client_offsets(num_clients: dict[str, int]) -> dict[str, int]:
    """The number of each group's first client in the whole population: groups follow each other by name."""
    starts = np.cumsum([0] + [num_clients[name] for name in sorted(num_clients)])
    return dict(zip(sorted(num_clients), starts[:-1].tolist(), strict=True))


def _layout(groups: dict[str, Group]) -> _Layout:
    templates = {
        name: jax.eval_shape(group.init_params, jax.random.key(0)) for name, group in groups.items()
    }
    owners: dict[trees.Path, list[str]] = {}
    shapes: dict[trees.Path, tuple[str, Any]] = {}
    for name in sorted(groups):
        for path, leaf in trees.leaves_by_path(templates[name]).items():
            if not groups[name].client.shared(path):
                continue
            first, known = shapes.setdefault(path, (name, leaf))
            if (known.shape, known.dtype) != (leaf.shape, leaf.dtype):
                raise ValueError(
                    f"{'/'.join(path)} is {known.shape} in group {first!r} but {leaf.shape} in group {name!r}; parameters of one "
                    "name that travel are shared, so give them one shape, different names, or keep them personal"
                )
            owners.setdefault(path, []).append(name)
    common = tuple(path for path, names in owners.items() if len(names) == len(groups))
    owned: dict[str, tuple[trees.Path, ...]] = {}
    for path, names in owners.items():
        if len(names) < len(groups):
            owned["+".join(names)] = (*owned.get("+".join(names), ()), path)
    return _Layout(templates, common, owned)


def check_group_sizes(groups: dict[str, Any]) -> None:
    """Raises ValueError if there is no group, or a group without clients."""
    if not groups:
        raise ValueError("a heterogeneous population needs at least one group; groups is empty")
    for name, group in groups.items():
        if group.num_clients < 1:
            raise ValueError(
                f"group {name!r} has {group.num_clients} clients; a task without clients cannot be learned, drop it"
            )


def _check_groups(groups: dict[str, Group]) -> None:
    check_group_sizes(groups)
    for name in groups:
        if "+" in name:
            raise ValueError(
                f"group name {name!r} contains '+', which joins the names of owners; rename it"
            )


def _pick(params: PyTree, paths: tuple[trees.Path, ...]) -> PyTree:
    leaves = trees.leaves_by_path(params)
    return trees.from_paths({path: leaves[path] for path in paths})


def _put(params: PyTree, part: PyTree) -> PyTree:
    return trees.from_paths(trees.leaves_by_path(params) | trees.leaves_by_path(part))


def _join(parts: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


class _Sent(NamedTuple):
    """What the clients of one group sent, their cohort without those that diverged, and how many these were."""

    results: ClientResult
    cohort: Cohort
    diverged: jax.Array


def _train_group(
    client: ClientUpdate,
    execution: Execution,
    params: PyTree,
    states: PyTree,
    round_index: jax.Array,
    cohort: Cohort,
    key: jax.Array,
) -> _Sent:
    """The local training of one group's cohort; ``states`` of all the group's clients, ``[clients of the group, ...]``."""

    def one_client(shared, own, own_state):
        params, examples, round_index, round_key = shared
        me = view(examples, own, round_index, round_key)
        result = client.update(params, own_state, me, client_key(round_key, me.client_id))
        finite = is_finite((result.pseudo_gradient, result.metrics["loss"], result.state))
        return result, finite | (me.size == 0)

    results, finite = map_clients(one_client, execution, cohort.federation.sizes)(
        (params, cohort.federation.examples, round_index, key),
        cohort_inputs(cohort),
        trees.take_clients(states, cohort.client_ids),
    )
    diverged = jnp.sum(cohort.present & ~finite)
    return _Sent(results, without_diverged(cohort, finite), diverged)


class _Round(NamedTuple):
    """What all groups sent, by group.

    Attributes:
        results, cohorts, diverged: see :class:`_Sent`.
        weights: of the clients, over all groups together.
        reported: the metrics that all groups have.
    """

    results: dict[str, ClientResult]
    cohorts: dict[str, Cohort]
    diverged: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    reported: tuple[str, ...]

    def updates(self, members: list[str], paths: tuple[trees.Path, ...]) -> PyTree:
        """The members' pseudo-gradients of some leaves, ``[clients of all members, ...]``."""
        return _join([_pick(self.results[name].pseudo_gradient, paths) for name in members])

    def metric(self, name: str, members: list[str]) -> jax.Array:
        """A metric of the members' clients, ``[clients of all members]``."""
        return jnp.concatenate([self.results[member].metrics[name] for member in members])

    def facts(self, members: list[str], offsets: dict[str, int]) -> dict[str, Any]:
        """The extra arguments of a server among the members; the weights of a part of the groups sum to 1 among them."""
        weights = jnp.concatenate([self.weights[name] for name in members])
        if len(members) < len(self.results):
            weights = weights / jnp.maximum(jnp.sum(weights), 1e-30)
        return {
            "weights": weights,
            "losses": self.metric("loss", members),
            "reports": {name: self.metric(name, members) for name in self.reported},
            "client_ids": jnp.concatenate(
                [offsets[n] + self.cohorts[n].client_ids for n in members]
            ),
            "present": jnp.concatenate([self.cohorts[name].present for name in members]),
        }


def _round_of(sent: dict[str, _Sent], weighting: Weighting) -> _Round:
    cohorts = {name: own.cohort for name, own in sent.items()}
    return _Round(
        results={name: own.results for name, own in sent.items()},
        cohorts=cohorts,
        diverged={name: own.diverged for name, own in sent.items()},
        weights=_population_weights(weighting, cohorts),
        reported=tuple(
            sorted(set.intersection(*(set(own.results.metrics) for own in sent.values())))
        ),
    )


def heterogeneous(
    groups: dict[str, Group],
    server: Server,
    *,
    owners_server: Server | None = None,
    weighting: Weighting = "samples",
    execution: Execution | None = None,
) -> Algorithm:
    """Clients with different tasks around one server.

    Leaves that travel (``client.shared``) in every group go through ``server``, whose client axis runs over all groups' cohorts, groups in the
    order of their names: its ``client_ids`` count through the whole population (:func:`client_offsets`), its ``weights`` are those of ``weighting`` over all clients together (a function is
    applied to each group's cohort and its values taken as they are). Leaves that
    travel in some groups only (the decoder of a task with several groups or clients) go through an instance of ``owners_server`` among their owners, whose weights
    sum to 1 among them. Leaves that do not travel stay with each client. The server's ``reports`` hold the metrics that all groups have.

    Args:
        groups: by name. ``round`` takes ``dict[str, Cohort]`` of the same names (``sampling.by_group``), ``predict`` dicts of client numbers and inputs of
            any of them, ``adapt`` a population of any of them.
        server: usually an ``optax.chain``, for what everybody shares.
        owners_server: for what some own; default plain averaging.
        weighting, execution: as for :func:`fedjax_mtl.rounds.federated.federated`; execution applies within each group, by default chosen for its model.

    Raises:
        ValueError: no group, an empty one, parameters of one name that travel with different shapes.
    """
    _check_groups(groups)
    names = sorted(groups)
    layout = _layout(groups)
    server = optax.with_extra_args_support(server)
    owners_server = optax.with_extra_args_support(
        step_from(optax.sgd(1.0)) if owners_server is None else owners_server
    )
    sizes = {name: groups[name].num_clients for name in names}
    offsets = client_offsets(sizes)

    def how(params):
        return default_execution(params) if execution is None else execution

    def init(key):
        params: PyTree = {}
        personal, clients = {}, {}
        for name in reversed(names):  # of parameters with one name, the first group's count
            made = trees.leaves_by_path(groups[name].init_params(key))
            travels = groups[name].client.shared
            params = _put(
                params, trees.from_paths({p: leaf for p, leaf in made.items() if travels(p)})
            )
            personal[name] = trees.from_paths(
                {p: leaf for p, leaf in made.items() if not travels(p)}
            )
        for name in names:
            own = groups[name].client.init(layout.of_group(name, params, personal))
            clients[name] = trees.broadcast_clients(own, sizes[name])
        owners = {
            who: owners_server.init(_pick(params, paths)) for who, paths in layout.owned.items()
        }
        start = server.init(_pick(params, layout.common)) if layout.common else ()
        return PopulationState(jnp.zeros((), jnp.int32), params, personal, start, owners, clients)

    def one_round(state, cohorts, key):
        if set(cohorts) != set(names):
            raise ValueError(
                f"the cohorts are of groups {sorted(cohorts)}, the algorithm is for {names}; use sampling.by_group"
            )
        train_key, server_key = jax.random.split(key)
        sent = {}
        for index, name in enumerate(names):
            params = layout.of_group(name, state.params, state.personal)
            own_key = jax.random.fold_in(train_key, index)
            sent[name] = _train_group(
                groups[name].client,
                how(params),
                params,
                state.clients[name],
                state.round,
                cohorts[name],
                own_key,
            )
        gathered = _round_of(sent, weighting)

        def step(transformation, transformation_state, paths, members, number):
            part = _pick(state.params, paths)
            facts = gathered.facts(members, offsets) | {
                "key": jax.random.fold_in(server_key, number)
            }
            steps, new = transformation.update(
                gathered.updates(members, paths), transformation_state, part, **facts
            )
            check_step(steps, part)
            return optax.apply_updates(part, steps), new

        params, server_state, owners = state.params, state.server, {}
        if layout.common:
            moved, server_state = step(server, state.server, layout.common, names, 0)
            params = _put(params, moved)
        for number, (who, paths) in enumerate(sorted(layout.owned.items()), 1):
            moved, owners[who] = step(
                owners_server, state.owners[who], paths, who.split("+"), number
            )
            params = _put(params, moved)
        clients = {
            name: trees.put_clients(
                state.clients[name], c.client_ids, gathered.results[name].state, c.present
            )
            for name, c in gathered.cohorts.items()
        }
        state = PopulationState(
            state.round + 1, params, state.personal, server_state, owners, clients
        )
        return state, _metrics(gathered)

    def predict(state, client_ids, inputs):
        outputs = {}
        for name, ids in client_ids.items():
            params = layout.of_group(name, state.params, state.personal)
            own = trees.take_clients(state.clients[name], ids)
            outputs[name] = jax.vmap(groups[name].client.predict, (None, 0, 0))(
                params, own, inputs[name]
            )
        return outputs

    def adapt(state, newcomers, key):
        clients = dict(state.clients)
        for index, name in enumerate(names):
            if name in newcomers:
                params = layout.of_group(name, state.params, state.personal)
                own_key = jax.random.fold_in(key, index)
                clients[name] = adapt_clients(
                    groups[name].client, how(params), params, state.round, newcomers[name], own_key
                )
        return state._replace(clients=clients)

    def traffic(state):
        """The mean over clients: what a group's clients send is the leaves that travel in it."""
        total = 0
        for name in names:
            moving = trees.partition(
                layout.of_group(name, state.params, state.personal), groups[name].client.shared
            )[0]
            total += sizes[name] * costs.tree_bytes(moving)
        size = int(round(total / sum(sizes.values())))
        return size, size

    return Algorithm(init, one_round, predict, adapt, traffic, sizes)


def _population_weights(weighting: Weighting, cohorts: dict[str, Cohort]) -> dict[str, jax.Array]:
    """:func:`cohort_weights` over all groups together, split by group."""
    together = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves),
        *[(c.present, c.shares) for _, c in sorted(cohorts.items())],
    )
    if callable(weighting):
        return {name: cohort_weights(weighting, cohort) for name, cohort in cohorts.items()}
    anyone = next(iter(cohorts.values()))
    joined = cohort_weights(weighting, anyone._replace(present=together[0], shares=together[1]))
    ends = np.cumsum([cohorts[name].present.shape[0] for name in sorted(cohorts)])[:-1]
    return dict(zip(sorted(cohorts), jnp.split(joined, ends), strict=True))


def _metrics(sent: _Round) -> dict[str, jax.Array]:
    """Means over all clients of what all groups report, and each group's own as ``<metric>/<group>``."""
    weights = _population_weights("samples", sent.cohorts)
    named = {}
    for name, own in weights.items():
        means = mean_metrics(sent.results[name].metrics, own)
        named |= {f"{what}/{name}": value for what, value in means.items()}
    joined = {what: sent.metric(what, list(weights)) for what in sent.reported}
    overall = mean_metrics(joined, jnp.concatenate(list(weights.values())))
    return overall | named | {"diverged": sum(sent.diverged.values()).astype(jnp.float32)}
