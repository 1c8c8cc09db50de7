"""The one composition: clients update, and a server's transformations decide what becomes of it.

``models="shared"``: the server holds one copy of what travels, and its step moves it (FedAvg,
FedEM, FedGradNorm). ``models="own"``: it holds a copy for every client, and its transformations mix
them (FedU, FedAMP, MaT-FL, gossip). In both, clients may come in groups with different tasks,
models and losses: leaves that all groups have meet in the server's chain, and leaves that only some
have are combined among those who own them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl import costs
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm, Info
from fedjax_mtl.core.checks import InputError, check_choice
from fedjax_mtl.core.federation import Cohort
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds import engine
from fedjax_mtl.rounds.composition import (
    Composition,
    FederatedState,
    Holding,
    execution_for,
    holding_of,
    merge_holdings,
    split_params,
)
from fedjax_mtl.rounds.engine import Weighting
from fedjax_mtl.rounds.groups import (
    Group,
    OwnersServer,
    Server,
    check_full_participation,
    check_group_sizes,
    population_ids,
    population_weights,
)
from fedjax_mtl.rounds.sections import Section, make_sections, whole_section
from fedjax_mtl.rounds.serving import serve
from fedjax_mtl.server.averaging import averages_first, step_from

PyTree = Any


def federated(
    groups: Group | dict[str, Group],
    server: Server,
    *,
    models: str = "shared",
    owners_server: Server | OwnersServer | None = None,
    meeting: trees.PathPredicate = trees.nothing,
    weighting: Weighting | None = None,
    execution: Execution | None = None,
    full_participation: bool = False,
) -> Algorithm:
    """Clients update, each group by its own rule; the server's transformations take the step.

    With ``models="shared"`` every client of a cohort starts from the shared parameters, and

        params <- optax.apply_updates(params, server.update(pseudo-gradients [cohort, ...], ...))

    With ``models="own"`` every client starts from the parameters that the server holds for it, the
    transformations keep the client axis (:mod:`fedjax_mtl.server.mixing`), and

        params[cohort] <- optax.apply_updates(params[cohort], server.update(...))

    There is then no global model: clients that were not sampled keep theirs, and a newcomer is sent
    the mean of all. In both, the server sees by name ``weights``, ``losses``, ``client_ids`` and
    ``present`` (``[cohort]`` each), ``reports`` (the clients' metrics), ``key``, and with own
    models ``population_params`` ``[clients, ...]``. Its pseudo-gradients and reports are 0 where a
    client is absent or diverged; a ``loss`` is NaN where a client made no step. A chain whose first
    step is ``average_clients()`` never holds the cohort's updates: they are summed as they come.

    A client whose update, loss or state is not finite counts as absent in that round, for the
    server and in what it keeps; ``info["diverged"]`` is the number of such clients and
    ``info["participants"]`` that of the others who were there. A round whose weights are all 0
    leaves the parameters and the server's state as they were, and its means are NaN.

    Args:
        groups: one group, or a dict of groups by name. With a dict, ``round`` takes
            ``dict[str, Cohort]`` of the same names (``sampling.by_group``), ``predict`` dicts of
            client numbers and inputs of any of them, ``adapt`` a population of any of them.
        server: usually an ``optax.chain`` that ends in a step, e.g. ``optax.sgd(1.0)``, because
            pseudo-gradients are descended. Its client axis runs over the cohorts of all groups in
            the order of their names, and its ``client_ids`` count through the whole population.
        models: ``shared`` or ``own``.
        owners_server: the chain for leaves that only some groups have, an instance for each set of
            owners, whose weights sum to 1 among them; default plain averaging for shared models,
            and ``server`` for own ones, whose ``client_ids`` then count through the owners'
            clients. A server that knows its clients apart (a graph) is a function of the owners'
            numbers in the whole population, int ``[owners]``, in that order.
        meeting: path predicate of leaves that some groups own and that meet in ``server`` all the
            same (FedHCA2 attends over all decoders). Where a client does not own such a leaf its
            rows are 0; with own models ``owned`` says so, bool ``[cohort]`` for every leaf.
        weighting: see :func:`fedjax_mtl.rounds.engine.cohort_weights`; over all groups together (a
            function is applied to each group's cohort). Default ``samples`` for shared models and
            ``uniform`` for own ones.
        execution: how clients are mapped, within each group; default by platform and model size.
        full_participation: refuse cohorts that are not the whole population, for algorithms whose
            server needs everybody's model. With own models, a server may then move the model of a
            client that is absent, too (clustered FL: it follows its cluster).

    Raises:
        InputError: no group, an empty one, parameters of one name that travel with different
            shapes; (when traced) a server whose step has not the shape of the parameters, or a
            cohort that full participation forbids.
    """
    check_choice("models", models, ("shared", "own"))
    own = models == "own"
    grouped = not isinstance(groups, Group)
    by_name = {"": groups} if isinstance(groups, Group) else dict(sorted(groups.items()))
    _check_groups(by_name, grouped)
    if owners_server is None:
        owners_server = server if own else step_from(optax.sgd(1.0))
    templates = {
        name: jax.eval_shape(group.init_params, jax.random.key(0))
        for name, group in by_name.items()
    }
    travels = {name: group.client.shared for name, group in by_name.items()}
    sections = make_sections(templates, travels, meeting) if grouped else (whole_section(),)
    counts = {name: group.num_clients for name, group in by_name.items()}
    servers = _servers(server, owners_server, sections, counts)
    composition = Composition(
        groups=by_name,
        grouped=grouped,
        servers=servers,
        own=own,
        weighting=("uniform" if own else "samples") if weighting is None else weighting,
        execution=execution,
        full_participation=full_participation,
        templates=templates,
        sections=sections,
        summed=not own
        and meeting is trees.nothing
        and _all_average(servers, sections, templates, travels),
    )
    return Algorithm(
        init=functools.partial(init, composition),
        round=functools.partial(one_round, composition),
        predict=functools.partial(predict, composition),
        adapt=functools.partial(adapt, composition),
        traffic=functools.partial(traffic, composition),
        num_clients=composition.outside(counts),
        parts=composition,
    )


def _servers(
    server: Server,
    owners_server: Server | OwnersServer,
    sections: tuple[Section, ...],
    counts: dict[str, int],
) -> dict[str, optax.GradientTransformationExtraArgs]:
    """The chain of each section, by its name."""

    def of(section: Section) -> Server:
        if not section.owned:
            return server
        if isinstance(owners_server, optax.GradientTransformation):
            return owners_server
        return owners_server(population_ids(section.members, counts))

    return {section.name: optax.with_extra_args_support(of(section)) for section in sections}


def _all_average(
    servers: dict[str, Server],
    sections: tuple[Section, ...],
    templates: dict[str, PyTree],
    travels: dict[str, trees.PathPredicate],
) -> bool:
    """Whether the server of every section only averages, so that nobody needs the updates apart."""
    parts = {name: trees.partition(templates[name], travels[name])[0] for name in templates}
    return all(
        averages_first(servers[section.name], section.one_copy(parts)) for section in sections
    )


def _check_groups(groups: dict[str, Group], grouped: bool) -> None:
    check_group_sizes({name or "clients": group for name, group in groups.items()})
    for name in groups if grouped else ():
        if "+" in name or not name:
            raise InputError(
                f"group name {name!r} is empty or contains '+', which joins the names of owners; "
                "rename it"
            )


# --- The algorithm's functions.


def init(composition: Composition, key: jax.Array) -> FederatedState:
    """All groups' parameters from one key, so that leaves of one path start alike."""
    groups = composition.groups
    made = {name: group.init_params(key) for name, group in groups.items()}
    clients = {
        name: trees.broadcast_clients(group.client.init(made[name]), group.num_clients)
        for name, group in groups.items()
    }
    held = {name: split_params(group, made[name]) for name, group in groups.items()}
    if composition.own:
        held = {
            name: holding._replace(
                travelling=trees.broadcast_clients(holding.travelling, groups[name].num_clients)
            )
            for name, holding in held.items()
        }
    params, personal = merge_holdings(composition, held)
    travelling = {name: holding.travelling for name, holding in held.items()}
    states = {
        section.name: composition.servers[section.name].init(
            section.joined(travelling) if composition.own else section.one_copy(travelling)
        )
        for section in composition.sections
    }
    return FederatedState(
        round=jnp.zeros((), jnp.int32),
        params=params,
        server=states.pop("", ()),
        clients=composition.outside(clients),
        personal=personal,
        owners=states if composition.grouped else (),
    )


def one_round(
    composition: Composition, state: FederatedState, cohort: PyTree, key: jax.Array
) -> tuple[FederatedState, Info]:
    """A round: all groups' cohorts train, then the server takes its steps."""
    cohorts = composition.by_group(cohort)
    _check_participation(composition, cohorts)
    train_key, server_key = jax.random.split(key)
    weights = population_weights(composition.weighting, cohorts)
    clients = composition.by_group(state.clients)
    sent = {}
    for index, (name, own_cohort) in enumerate(cohorts.items()):
        holding, ids = holding_of(composition, state, name), own_cohort.client_ids
        starts, shared = None, trees.combine(*holding)
        if composition.own:
            starts, shared = trees.take_clients(holding.travelling, ids), holding.staying
        sent[name] = engine.run_cohort(
            composition.groups[name].client,
            execution_for(composition, holding),
            starts,
            trees.take_clients(clients[name], ids),
            own_cohort,
            state.round,
            jax.random.fold_in(train_key, index) if composition.grouped else train_key,
            shared_start=shared,
            weights=weights[name] if composition.summed else None,
            round_key=train_key,
        )
    return serve(composition, state, sent, server_key)


def _check_participation(composition: Composition, cohorts: dict[str, Cohort]) -> None:
    for name, cohort in cohorts.items() if composition.full_participation else ():
        check_full_participation(cohort, composition.groups[name].num_clients)


def predict(
    composition: Composition, state: FederatedState, client_ids: PyTree, inputs: PyTree
) -> PyTree:
    """Each client's own model on its inputs, by group where clients come in groups."""
    ids = client_ids if composition.grouped else {"": client_ids}
    inputs = inputs if composition.grouped else {"": inputs}
    clients = state.clients if composition.grouped else {"": state.clients}
    outputs = {}
    for name in ids:
        holding = holding_of(composition, state, name)
        client_predict = composition.groups[name].client.predict
        kept = trees.take_clients(clients[name], ids[name])
        if composition.own:
            models = trees.take_clients(holding.travelling, ids[name])
            outputs[name] = jax.vmap(
                lambda own, keeps, x, predict=client_predict, alike=holding.staying: predict(
                    trees.combine(own, alike), keeps, x
                )
            )(models, kept, inputs[name])
        else:
            params = trees.combine(*holding)
            outputs[name] = jax.vmap(client_predict, (None, 0, 0))(params, kept, inputs[name])
    return composition.outside(outputs)


def adapt(
    composition: Composition, state: FederatedState, newcomers: PyTree, key: jax.Array
) -> FederatedState:
    """The state whose clients are the newcomers; of groups that have none, the clients stay."""
    newcomers = newcomers if composition.grouped else {"": newcomers}
    clients = dict(state.clients) if composition.grouped else {"": state.clients}
    held = {name: holding_of(composition, state, name) for name in composition.groups}
    means = _mean_models(composition, held) if composition.own else {}
    for index, name in enumerate(composition.groups):
        if name not in newcomers:
            continue
        holding = held[name]
        start = trees.combine(means.get(name, holding.travelling), holding.staying)
        clients[name] = engine.adapt_clients(
            composition.groups[name].client,
            execution_for(composition, holding),
            start,
            state.round,
            newcomers[name],
            jax.random.fold_in(key, index) if composition.grouped else key,
        )
        if composition.own:
            copies = trees.broadcast_clients(means[name], newcomers[name].num_clients)
            held[name] = holding._replace(travelling=copies)
    params, personal = merge_holdings(composition, held)
    return state._replace(params=params, personal=personal, clients=composition.outside(clients))


def _mean_models(composition: Composition, held: dict[str, Holding]) -> dict[str, PyTree]:
    """For each group the mean of every travelling leaf over all clients that have it."""
    rows: dict[trees.Path, list[jax.Array]] = {}
    for holding in held.values():
        for path, leaf in trees.leaves_by_path(holding.travelling).items():
            rows.setdefault(path, []).append(leaf)
    means = {path: jnp.mean(jnp.concatenate(leaves), axis=0) for path, leaves in rows.items()}
    return {
        name: trees.map_with_path(lambda path, _: means[path], holding.travelling)
        for name, holding in held.items()
    }


def traffic(composition: Composition, state: FederatedState) -> tuple[int, int]:
    """The bytes of the leaves that travel, up and down; with groups the mean over clients."""
    total, clients = 0, 0
    for name, group in composition.groups.items():
        size = costs.tree_bytes(holding_of(composition, state, name).travelling)
        total += size if composition.own else size * group.num_clients
        clients += group.num_clients
    size = int(round(total / clients))
    return size, size
