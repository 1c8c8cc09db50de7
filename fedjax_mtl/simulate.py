"""The one verb: many rounds, seeds and hyper-parameters in one compiled program."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_mtl.core.federation import Federation, Population
from fedjax_mtl.core.sampling import PopulationSampler, Sampler, by_group, full_participation
from fedjax_mtl.rounds.federated import Algorithm

PyTree = Any


class Block(NamedTuple):
    """What the host sees between two compiled blocks of rounds.

    Leaves have a leading axis ``[seeds]``, or ``[hyper-parameters, seeds]`` where hyper-parameters are mapped.

    Attributes:
        round: rounds done.
        state: the algorithm's state. It is donated to the next block: copy it to keep it.
        metrics: per-round metrics of this block, ``[..., rounds of the block]``; empty before the first round.
        evaluation: whatever ``evaluate`` returned.
    """

    round: int
    state: PyTree
    metrics: dict[str, jax.Array]
    evaluation: Any


def root_keys(seeds: Sequence[int]) -> jax.Array:
    """One root key a seed, ``[seeds]``; everything a run draws comes from it."""
    if len(seeds) == 0:
        raise ValueError("seeds is empty; give at least one, e.g. seeds=(0,)")
    if min(seeds) < 0:
        raise ValueError(f"seed {min(seeds)} is negative; give 0 or more")
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds {tuple(seeds)} repeat; each seed is one run")
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def num_clients(federation: Federation | Population) -> int | dict[str, int]:
    """How many clients there are, by group if they come in groups."""
    if isinstance(federation, dict):
        return {name: group.num_clients for name, group in federation.items()}
    return federation.num_clients


# Streams of a run's root key.
_INIT, _ROUNDS, _EVALUATION = 0, 1, 2


def _over_runs(fn: Callable, axes: tuple[int | None, ...], mapped_settings: bool) -> Callable:
    """Maps ``fn(setting, key, *arguments)`` over seeds and, outside them, settings; axis None marks what all runs share."""
    over_seeds = jax.vmap(fn, in_axes=(None, 0, *axes))
    if not mapped_settings:
        return over_seeds
    return jax.vmap(over_seeds, in_axes=(0, None, *axes))


def simulate_blocks(
    algorithm: Algorithm | Callable[..., Algorithm],
    federation: Federation | Population,
    *,
    num_rounds: int,
    seeds: Sequence[int] = (0,),
    sampler: Sampler | PopulationSampler | None = None,
    evaluate: Callable[[Algorithm, PyTree, PyTree, jax.Array], Any] | None = None,
    evaluation_data: PyTree = None,
    eval_every: int | None = None,
    hyperparameters: dict[str, jax.Array] | None = None,
    initial: Callable[[PyTree], PyTree] | None = None,
    state: PyTree | None = None,
    start_round: int = 0,
) -> Iterator[Block]:
    """Runs rounds in compiled blocks and yields a Block before the first round and after every ``eval_every`` rounds.

    All blocks, the shorter last one too, are one compiled program; seeds and hyper-parameters are vmapped inside it. Round r of a seed
    draws from ``fold_in(key of the seed, r)``, so a run continued from a saved state is the run that was never interrupted.

    Args:
        algorithm: an Algorithm, or with ``hyperparameters`` a function of them by name.
        federation: the training clients; for an algorithm of a heterogeneous population one Federation a group.
        num_rounds: rounds in all, those before ``start_round`` included.
        seeds: one run each.
        sampler: who takes part; default everybody.
        evaluate: ``(algorithm, state, evaluation_data, key) -> pytree`` of one run; compiled, and mapped over the runs.
        evaluation_data: what ``evaluate`` reads, e.g. Splits. An argument, because arrays that a compiled function closes over are copied into it.
        eval_every: rounds in a block; default all of them.
        hyperparameters: arrays ``[settings, ...]``, of one length; ``algorithm(**setting)`` is traced once for all.
        initial: changes the state after ``init``, outside of any compiled program, e.g. puts a checkpoint's weights in; it sees the leading axes of :class:`Block`.
        state, start_round: continue from here (the state is copied); by default from ``init``. No Block is yielded for the start.

    Raises:
        ValueError: a count that makes no sense, or hyper-parameters of different lengths.
    """
    if num_rounds < 0 or not 0 <= start_round <= num_rounds:
        raise ValueError(f"cannot run from round {start_round} to round {num_rounds}")
    eval_every = max(num_rounds, 1) if eval_every is None else eval_every
    if eval_every < 1:
        raise ValueError(f"eval_every is {eval_every}; give at least 1 round")
    lengths = {name: len(values) for name, values in (hyperparameters or {}).items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"hyper-parameters are mapped together but have different lengths: {lengths}"
        )
    if sampler is None:
        sampler = (
            by_group(full_participation()) if isinstance(federation, dict) else full_participation()
        )
    keys = root_keys(seeds)
    settings = {} if hyperparameters is None else hyperparameters
    mapped = hyperparameters is not None

    def make(setting):
        return algorithm(**setting) if mapped else algorithm

    def init_run(setting, key):
        return make(setting).init(jax.random.fold_in(key, _INIT))

    def one_round(setting, key, state, index, federation):
        made_for = make(setting).num_clients
        there = num_clients(federation)
        if made_for != there:
            raise ValueError(
                f"the algorithm was made for {made_for} clients but the federation has {there}; "
                "pass num_clients=federation.num_clients"
            )
        round_key = jax.random.fold_in(jax.random.fold_in(key, _ROUNDS), index)
        cohort_key, key = jax.random.split(round_key)
        return make(setting).round(state, sampler(cohort_key, index, federation), key)

    def run_block(setting, key, state, start, stop, federation):
        shapes = jax.eval_shape(one_round, setting, key, state, start, federation)[1]
        history = {k: jnp.full((eval_every,), jnp.nan, v.dtype) for k, v in shapes.items()}

        def body(index, carry):
            state, history = carry
            state, metrics = one_round(setting, key, state, index, federation)
            return state, {k: history[k].at[index - start].set(v) for k, v in metrics.items()}

        return jax.lax.fori_loop(start, stop, body, (state, history))

    def evaluate_run(setting, key, state, index, data):
        key = jax.random.fold_in(jax.random.fold_in(key, _EVALUATION), index)
        return evaluate(make(setting), state, data, key)

    init_all = jax.jit(_over_runs(init_run, (), mapped))
    block_all = jax.jit(_over_runs(run_block, (0, None, None, None), mapped), donate_argnums=2)
    evaluate_all = jax.jit(_over_runs(evaluate_run, (0, None, None), mapped))

    def evaluation_at(index, state):
        if evaluate is None:
            return None
        return evaluate_all(settings, keys, state, jnp.int32(index), evaluation_data)

    if state is None:
        state = init_all(settings, keys)
        state = state if initial is None else initial(state)
        yield Block(0, state, {}, evaluation_at(0, state))
    else:
        state = jax.tree.map(jnp.copy, state)  # blocks donate it
    done = start_round
    while done < num_rounds:
        # Blocks end at multiples of eval_every, wherever the run was taken up.
        stop = min(num_rounds, (done // eval_every + 1) * eval_every)
        state, history = block_all(
            settings, keys, state, jnp.int32(done), jnp.int32(stop), federation
        )
        history = jax.tree.map(lambda x, n=stop - done: x[..., :n], history)
        done = stop
        yield Block(done, state, history, evaluation_at(done, state))


class Simulation(NamedTuple):
    """A finished simulation; leading axes as in :class:`Block`.

    Attributes:
        state: the last state.
        metrics: per-round metrics, ``[..., num_rounds]``.
        rounds: the rounds at which ``evaluations`` were made, from 0.
        evaluations: what ``evaluate`` returned at each.
    """

    state: PyTree
    metrics: dict[str, jax.Array]
    rounds: list[int]
    evaluations: list[Any]


def simulate(
    algorithm: Algorithm | Callable[..., Algorithm],
    federation: Federation | Population,
    **arguments: Any,
) -> Simulation:
    """Runs :func:`simulate_blocks` to its end, with the same arguments, and collects what it yields."""
    state, metrics, rounds, evaluations = None, [], [], []
    for block in simulate_blocks(algorithm, federation, **arguments):
        state = block.state
        if block.metrics:
            metrics.append(block.metrics)
        rounds.append(block.round)
        evaluations.append(block.evaluation)
    joined = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=-1), *metrics) if metrics else {}
    return Simulation(state, joined, rounds, evaluations)
