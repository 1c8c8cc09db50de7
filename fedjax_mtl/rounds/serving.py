"""The server's half of a round: every section's step, what the clients keep, and what is told."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Info
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import Cohort
from fedjax_mtl.rounds import engine
from fedjax_mtl.rounds.composition import Composition, FederatedState, holding_of, merge_holdings
from fedjax_mtl.rounds.engine import Sent
from fedjax_mtl.rounds.groups import client_offsets, population_weights
from fedjax_mtl.rounds.sections import Section
from fedjax_mtl.server.reports import reported

PyTree = Any


def serve_results(
    composition: Composition,
    state: FederatedState,
    results: PyTree,
    cohort: PyTree,
    key: jax.Array,
) -> tuple[FederatedState, Info]:
    """The server's half of a round, for results that any driver has collected.

    A deployment in a real federation runs ``composition.groups[...].client`` where the data are,
    and this function where the results arrive.

    Args:
        composition: of the algorithm, ``algorithm.parts``.
        state: before the round.
        results: a ClientResult with leaves ``[cohort, ...]``, by group if clients come in groups.
        cohort: the Cohort that sent them, by group likewise.
        key: of the server's randomness.
    """
    results, cohorts = composition.by_group(results), composition.by_group(cohort)
    sent = {name: engine.receive(results[name], cohorts[name]) for name in cohorts}
    return serve(composition, state, sent, key)


def serve(
    composition: Composition, state: FederatedState, sent: dict[str, Sent], key: jax.Array
) -> tuple[FederatedState, Info]:
    """The server's half of a round: every section's step, and what the clients keep."""
    cohorts = {name: own.cohort for name, own in sent.items()}
    weights = population_weights(composition.weighting, cohorts)
    held = {name: holding_of(composition, state, name) for name in sent}
    travelling = {name: holding.travelling for name, holding in held.items()}
    states, moved = {"": state.server, **dict(state.owners or {})}, dict(travelling)
    info: Info = {}
    for section in composition.sections:
        step_key = jax.random.fold_in(key, section.number) if composition.grouped else key
        facts = _facts(composition, section, sent, weights) | {"key": step_key}
        step = _take_step(composition, section, states[section.name], travelling, sent, facts)
        states[section.name] = step.state
        info |= {section.label(name): value for name, value in reported(step.state).items()}
        moved = _put(composition, section, moved, step.params, cohorts)
    held = {name: own._replace(travelling=moved[name]) for name, own in held.items()}
    params, personal = merge_holdings(composition, held)
    clients = {
        name: trees.put_clients(
            kept, cohorts[name].client_ids, sent[name].results.state, cohorts[name].present
        )
        for name, kept in composition.by_group(state.clients).items()
    }
    state = FederatedState(
        round=state.round + 1,
        params=params,
        server=states.pop("", ()),
        clients=composition.outside(clients),
        personal=personal,
        owners=states if composition.grouped else (),
    )
    return state, info | _mean_info(composition, sent)


class Step(NamedTuple):
    """What a section's server leaves after its step.

    Attributes:
        params: the parameters of the section; with own models those of the cohort.
        state: the state of the server.
    """

    params: PyTree
    state: optax.OptState


def _facts(
    composition: Composition,
    section: Section,
    sent: dict[str, Sent],
    weights: dict[str, jax.Array],
) -> dict[str, Any]:
    """The extra arguments of a section's server; weights of a part of the groups sum to 1 there."""
    members = [sent[name] for name in section.members]
    own_weights = jnp.concatenate([weights[name] for name in section.members])
    if len(members) < len(sent):
        own_weights = own_weights / jnp.maximum(jnp.sum(own_weights), 1e-30)
    # Own models count through the clients that have the section, shared ones through everybody.
    among = section.members if composition.own else tuple(composition.groups)
    offsets = client_offsets({name: composition.groups[name].num_clients for name in among})
    facts = {
        "weights": own_weights,
        "losses": _metric(members, "loss"),
        "reports": {name: _metric(members, name) for name in _reported_by_all(sent)},
        "client_ids": jnp.concatenate(
            [offsets[name] + sent[name].cohort.client_ids for name in section.members]
        ),
        "present": jnp.concatenate([own.cohort.present for own in members]),
        "already_averaged": composition.summed,
    }
    return facts


def _metric(sent: list[Sent], name: str) -> jax.Array:
    """A metric of the clients of several groups, ``[cohorts]``."""
    return jnp.concatenate([own.results.metrics[name] for own in sent])


def _reported_by_all(sent: dict[str, Sent]) -> list[str]:
    """The metrics that the clients of all groups have."""
    return sorted(set.intersection(*(set(own.results.metrics) for own in sent.values())))


def _take_step(
    composition: Composition,
    section: Section,
    state: optax.OptState,
    travelling: dict[str, PyTree],
    sent: dict[str, Sent],
    facts: dict[str, Any],
) -> Step:
    """One section's server step; where all weights are 0 nothing moves, momentum included."""
    if composition.own:
        ids = {name: sent[name].cohort.client_ids for name in section.members}
        rows = {name: trees.take_clients(travelling[name], ids[name]) for name in ids}
        start = section.joined(rows)
        facts |= {
            "population_params": section.joined(travelling),
            "owned": section.owned_rows(rows),
        }
    else:
        start = section.one_copy(travelling)
    if composition.summed:
        updates = _summed_updates(section, sent, facts["weights"])
    else:
        pseudo_gradients = {name: sent[name].results.pseudo_gradient for name in section.members}
        updates = section.joined(pseudo_gradients)
    steps, new_state = composition.servers[section.name].update(updates, state, start, **facts)
    _check_client_axis(steps, start) if composition.own else engine.check_step(steps, start)
    attended = jnp.any(facts["weights"] != 0)
    steps = jax.tree.map(lambda x: jnp.where(attended, x, 0), steps)
    return Step(optax.apply_updates(start, steps), trees.where(attended, new_state, state))


def _summed_updates(section: Section, sent: dict[str, Sent], weights: jax.Array) -> PyTree:
    """The weighted sum that the cohorts sent, in the weights of those who count in the end.

    The sum was taken with the weights of all; the factor is 1 unless somebody diverged or the
    weights are those of a part of the groups.
    """
    members = [sent[name] for name in section.members]
    summed = sum(jnp.sum(own.summed) for own in members)
    rescale = jnp.where(summed > 0, jnp.sum(weights) / jnp.where(summed > 0, summed, 1), 0)
    parts = [section.pick(own.total) for own in members]
    total = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *parts)
    return jax.tree.map(lambda x: jnp.where(summed > 0, rescale * x, 0).astype(x.dtype), total)


def _put(
    composition: Composition,
    section: Section,
    travelling: dict[str, PyTree],
    moved: PyTree,
    cohorts: dict[str, Cohort],
) -> dict[str, PyTree]:
    """Every group's travelling leaves after a section's step."""
    if not composition.own:
        return travelling | {
            name: section.replaced(travelling[name], moved) for name in section.members
        }
    counts = [cohorts[name].client_ids.shape[0] for name in section.members]
    result = dict(travelling)
    for name, rows in zip(section.members, _split_rows(moved, counts), strict=True):
        old, cohort = travelling[name], cohorts[name]
        rows = section.replaced(trees.take_clients(old, cohort.client_ids), rows)
        moves = cohort.present | composition.full_participation
        result[name] = trees.put_clients(old, cohort.client_ids, rows, moves)
    return result


def _split_rows(tree: PyTree, counts: list[int]) -> list[PyTree]:
    """Consecutive rows of every leaf, in parts of these lengths."""
    ends = np.cumsum([0, *counts])
    spans = zip(ends[:-1], ends[1:], strict=True)
    return [jax.tree.map(lambda x, a=a, b=b: x[a:b], tree) for a, b in spans]


def _check_client_axis(steps: PyTree, starts: PyTree) -> None:
    for step, start in zip(jax.tree.leaves(steps), jax.tree.leaves(starts), strict=True):
        if step.shape != start.shape:
            raise InputError(
                f"the server turned updates into a step of shape {step.shape} for the cohort's "
                f"parameters of shape {start.shape}; average_clients() and its kin remove the "
                "client axis: use them with models='shared', or a transformation that keeps it"
            )


def _mean_info(composition: Composition, sent: dict[str, Sent]) -> Info:
    """Means over all clients of what all groups report; each group's are ``<metric>/<group>``."""
    weights = population_weights("samples", {name: own.cohort for name, own in sent.items()})
    joined = {name: _metric(list(sent.values()), name) for name in _reported_by_all(sent)}
    info = engine.mean_metrics(joined, jnp.concatenate(list(weights.values())))
    for group in sent if composition.grouped else ():
        means = engine.mean_metrics(sent[group].results.metrics, weights[group])
        info |= {f"{name}/{group}": value for name, value in means.items()}
    diverged = jnp.concatenate([own.diverged for own in sent.values()])
    present = jnp.concatenate([own.cohort.present for own in sent.values()])
    counts = {"diverged": jnp.sum(diverged), "participants": jnp.sum(present)}
    return info | {name: count.astype(jnp.float32) for name, count in counts.items()}
