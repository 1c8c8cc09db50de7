"""Cohort samplers: who takes part in a round, as a pure function of a key and the round number.

A sampler is ``(key, round_index, federation) -> Cohort``. Its cohort size is a shape and so the
same in every round; where fewer clients can come, the empty slots are marked absent.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import NO_BUDGET, Cohort, Federation, Population

RoundIndex = int | jax.Array
Sampler = Callable[[jax.Array, RoundIndex, Federation], Cohort]
PopulationSampler = Callable[[jax.Array, RoundIndex, Population], dict[str, Cohort]]


def make_cohort(
    federation: Federation, client_ids: jax.Array, present: jax.Array | None = None
) -> Cohort:
    """The cohort of these clients, who do all that is planned.

    Args:
        federation: the population.
        client_ids: int32 ``[cohort]``.
        present: bool ``[cohort]``; default all.
    """
    present = jnp.ones(client_ids.shape, bool) if present is None else present
    rows = federation.take(client_ids)
    shares = rows.sizes / jnp.sum(federation.sizes)
    return Cohort(
        federation=rows._replace(sizes=jnp.where(present, rows.sizes, 0)),
        client_ids=client_ids,
        present=present,
        budgets=jnp.full(client_ids.shape, NO_BUDGET, jnp.int32),
        shares=jnp.where(present, shares, 0.0),
        work=jnp.ones(client_ids.shape, jnp.float32),
    )


def _check_cohort_size(cohort_size: int, num_clients: int) -> None:
    if not 1 <= cohort_size <= num_clients:
        raise InputError(
            f"cohort_size is {cohort_size} but the federation has {num_clients} clients; "
            f"choose 1..{num_clients}, or sample with replacement"
        )


def full_participation() -> Sampler:
    """All clients, in order, in every round."""

    def sample(key, round_index, federation):
        del key, round_index
        return make_cohort(federation, jnp.arange(federation.num_clients, dtype=jnp.int32))

    return sample


def by_group(samplers: Sampler | dict[str, Sampler]) -> PopulationSampler:
    """A cohort from every group of a heterogeneous population, each drawn on its own.

    Shares are of the whole population's examples.

    Args:
        samplers: one for all groups, or one a group.

    Raises:
        InputError: (when traced) a group without a sampler, or a sampler without a group.
    """

    def sample(key, round_index, population):
        if isinstance(samplers, dict) and set(samplers) != set(population):
            odd = sorted(set(samplers) ^ set(population))[0]
            raise InputError(
                f"group {odd!r} has no {'sampler' if odd in population else 'federation'}; name "
                "the same groups in both"
            )
        total = sum(jnp.sum(federation.sizes) for federation in population.values())
        cohorts = {}
        for index, name in enumerate(sorted(population)):
            sampler = samplers[name] if isinstance(samplers, dict) else samplers
            cohort = sampler(jax.random.fold_in(key, index), round_index, population[name])
            part = jnp.sum(population[name].sizes) / total
            cohorts[name] = cohort._replace(shares=cohort.shares * part)
        return cohorts

    return sample


def uniform(cohort_size: int) -> Sampler:
    """``cohort_size`` different clients, all sets equally likely.

    Raises:
        InputError: (when traced) the federation has fewer clients.
    """

    def sample(key, round_index, federation):
        del round_index
        _check_cohort_size(cohort_size, federation.num_clients)
        ids = jax.random.permutation(key, federation.num_clients)[:cohort_size]
        return make_cohort(federation, ids.astype(jnp.int32))

    return sample


def weighted(cohort_size: int, probabilities: jax.Array, *, replace: bool = False) -> Sampler:
    """Clients drawn in proportion to ``probabilities`` ``[clients]``.

    Without replacement one after the other in proportion to what is left (Gumbel top-k). With
    replacement a client may fill several slots; it makes the same update in each, which so counts
    as often as it was drawn.

    Args:
        cohort_size: how many slots.
        probabilities: ``[clients]``, not negative; their sum does not matter.
        replace: whether a client may be drawn several times.

    Raises:
        InputError: (when traced) the federation has fewer clients and ``replace`` is False, or the
            number of probabilities differs.
    """

    negative = bool(np.any(np.asarray(probabilities) < 0))
    probabilities = jnp.asarray(probabilities)

    def sample(key, round_index, federation):
        del round_index
        if probabilities.shape != (federation.num_clients,) or negative:
            raise InputError(
                f"probabilities has shape {probabilities.shape}; "
                f"give one for each of the {federation.num_clients} clients, none negative"
            )
        log_p = jnp.log(probabilities)
        if replace:
            ids = jax.random.categorical(key, log_p, shape=(cohort_size,))
        else:
            _check_cohort_size(cohort_size, federation.num_clients)
            _, ids = jax.lax.top_k(log_p + jax.random.gumbel(key, log_p.shape), cohort_size)
        # A client of probability 0 can only be drawn when nobody else is left.
        return make_cohort(federation, ids.astype(jnp.int32), probabilities[ids] > 0)

    return sample


def available(cohort_size: int, trace: jax.Array) -> Sampler:
    """Uniform over the clients that are available.

    When fewer than ``cohort_size`` clients are available the remaining slots are absent.

    Args:
        cohort_size: how many slots.
        trace: bool ``[rounds, clients]``; repeated when rounds run past it.

    Raises:
        InputError: (when traced) the trace's clients are not the federation's, or there are fewer
            than ``cohort_size``.
    """

    trace = jnp.asarray(trace, bool)

    def sample(key, round_index, federation):
        if trace.ndim != 2 or trace.shape[1] != federation.num_clients:
            raise InputError(
                f"the availability trace has shape {trace.shape}; "
                f"give [rounds, {federation.num_clients}], a column for each client"
            )
        _check_cohort_size(cohort_size, federation.num_clients)
        here = trace[round_index % trace.shape[0]]
        order = jnp.where(here, jax.random.uniform(key, here.shape), jnp.inf)
        ids = jnp.argsort(order)[:cohort_size].astype(jnp.int32)
        return make_cohort(federation, ids, here[ids])

    return sample


def straggling(sampler: Sampler, budget: Callable[[jax.Array, Cohort], jax.Array]) -> Sampler:
    """Gives the clients of another sampler budgets of local steps.

    Args:
        sampler: who takes part.
        budget: ``(key, cohort) -> int32 [cohort]``, the most steps that each client makes, e.g.
            :func:`fraction_of_data`. For shares of what is planned see :func:`partial_work`.
    """

    def sample(key, round_index, federation):
        cohort_key, budget_key = jax.random.split(key)
        cohort = sampler(cohort_key, round_index, federation)
        return cohort._replace(budgets=budget(budget_key, cohort).astype(jnp.int32))

    return sample


def partial_work(sampler: Sampler, low: float, high: float = 1.0) -> Sampler:
    """Lets the clients of another sampler do a share of their work, uniform in ``[low, high]``.

    A client that would make n local steps makes ``floor(share * n)``, whatever its batches are. It
    counts for the server as it would otherwise, as FedProx's stragglers do; one that makes no step
    has no loss to report.

    Args:
        sampler: who takes part.
        low: the least share of its planned steps that a client makes.
        high: the largest.

    Raises:
        InputError: unless ``0 <= low <= high <= 1``.
    """
    if not 0 <= low <= high <= 1:
        raise InputError(
            f"shares of the planned work between {low} and {high} make no sense; give "
            "0 <= low <= high <= 1"
        )

    def sample(key, round_index, federation):
        cohort_key, work_key = jax.random.split(key)
        cohort = sampler(cohort_key, round_index, federation)
        shape = cohort.present.shape
        return cohort._replace(work=jax.random.uniform(work_key, shape, jnp.float32, low, high))

    return sample


def dropping(sampler: Sampler, probability: float | jax.Array) -> Sampler:
    """Clients of another sampler that fail.

    Each drops out of a round independently of the others and of other rounds.

    Args:
        sampler: who is asked.
        probability: of dropping out; a number, or ``[clients]``.

    Raises:
        InputError: a probability outside 0..1; (when traced) not one a client.
    """
    values = np.asarray(probability)
    if (values < 0).any() or (values > 1).any():
        raise InputError(
            f"drop probability {values.max() if values.max() > 1 else values.min()} is outside 0..1"
        )

    def sample(key, round_index, federation):
        if values.ndim and values.shape != (federation.num_clients,):
            raise InputError(
                f"drop probabilities have shape {values.shape}; give one number or one for each of "
                f"the {federation.num_clients} clients"
            )
        cohort_key, drop_key = jax.random.split(key)
        cohort = sampler(cohort_key, round_index, federation)
        chance = jnp.asarray(values, jnp.float32)
        chance = chance[cohort.client_ids] if values.ndim else chance
        # uniform is below 1: a probability of 1 always drops.
        stays = jax.random.uniform(drop_key, cohort.present.shape, jnp.float32) >= chance
        present = cohort.present & stays
        sizes = jnp.where(present, cohort.federation.sizes, 0)
        return cohort._replace(
            federation=cohort.federation._replace(sizes=sizes),
            present=present,
            shares=jnp.where(present, cohort.shares, 0.0),
        )

    return sample


def fraction_of_data(
    low: float, high: float, *, of_smallest: bool = False
) -> Callable[[jax.Array, Cohort], jax.Array]:
    """Budgets for :func:`straggling`: a share of one pass of single examples, int32 ``[cohort]``.

    It is MOCHA's variability of systems (arXiv 1705.10467, section 5): high 0.1..1, low 0.9..1.

    Args:
        low: the least share.
        high: the largest; shares are uniform between the two.
        of_smallest: of how many examples: those of the smallest node, as in the paper, or the
            node's own, as in the released code.
    """
    if not 0 <= low <= high:
        raise InputError(
            f"budgets between {low} and {high} of a pass make no sense; give 0 <= low <= high"
        )

    def budget(key, cohort):
        sizes = cohort.federation.sizes
        if of_smallest:
            there = jnp.where(sizes > 0, sizes, NO_BUDGET)
            sizes = jnp.full_like(sizes, jnp.min(there))
        share = jax.random.uniform(key, sizes.shape, jnp.float32, low, high)
        return jnp.floor(sizes * share)

    return budget
