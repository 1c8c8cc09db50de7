"""Simulates many rounds, seeds, hyper-parameters and stages, each stage as one compiled program."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_mtl.core.algorithm import Algorithm, ByGroup, Info
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import Federation, Population
from fedjax_mtl.core.sampling import PopulationSampler, Sampler, by_group, full_participation

PyTree = Any
Evaluate = Callable[[Algorithm, PyTree, PyTree, jax.Array], Any]


class Stage(NamedTuple):
    """A part of a run with an algorithm of its own.

    The algorithm may depend on what the stage before learned.

    Attributes:
        build: ``previous state -> (algorithm, state)``, called on the host when the stage begins.
            The previous state is the last of the stage before, with the leading axis ``[seeds]``;
            it is None in the first stage. The state that is returned has the same leading axis, or
            is None for the algorithm's own ``init``.
        rounds: how many rounds the stage has.
        name: names the stage in metrics; default its number.
    """

    build: Callable[[PyTree | None], tuple[Algorithm, PyTree | None]]
    rounds: int
    name: str = ""


class Block(NamedTuple):
    """What the host sees between two compiled blocks of rounds.

    Leaves have a leading axis ``[seeds]``, or ``[hyper-parameters, seeds]`` where hyper-parameters
    are mapped.

    Attributes:
        round: rounds done, in all stages together.
        state: the algorithm's state. It is donated to the next block: copy it to keep it.
        metrics: per-round info of this block, scalars and arrays, ``[..., block_rounds, ...]``;
            empty before the first round.
        evaluation: whatever ``evaluate`` returned.
        stage: the number of the stage.
        algorithm: the stage's algorithm; None where hyper-parameters are mapped.
    """

    round: int
    state: PyTree
    metrics: dict[str, jax.Array]
    evaluation: Any
    stage: int = 0
    algorithm: Algorithm | None = None


def root_keys(seeds: Sequence[int]) -> jax.Array:
    """One root key a seed, ``[seeds]``; everything a run draws comes from it.

    Raises:
        InputError: no seed, a negative one, or one twice.
    """
    if len(seeds) == 0:
        raise InputError("seeds is empty; give at least one, e.g. seeds=(0,)")
    if min(seeds) < 0:
        raise InputError(f"seed {min(seeds)} is negative; give 0 or more")
    if len(set(seeds)) != len(seeds):
        raise InputError(f"seeds {tuple(seeds)} repeat; each seed is one run")
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def num_clients(federation: Federation | Population) -> int | dict[str, int]:
    """How many clients there are, by group if they come in groups."""
    if isinstance(federation, dict):
        return {name: group.num_clients for name, group in federation.items()}
    return federation.num_clients


def stage_of(stages: Sequence[Stage], done: int) -> tuple[int, int]:
    """The stage that goes on after ``done`` rounds, and the round at which it began.

    At a boundary it is the later stage, except at the very end.
    """
    first = 0
    for index, stage in enumerate(stages):
        if done < first + stage.rounds or index == len(stages) - 1:
            return index, first
        first += stage.rounds
    raise InputError("there is no stage; give at least one")


# Streams of a run's root key.
_INIT, _ROUNDS, _EVALUATION = 0, 1, 2


def init_key(key: jax.Array, stage: int = 0) -> jax.Array:
    """The key with which a stage's algorithm starts, from a run's root key."""
    key = jax.random.fold_in(key, _INIT)
    return key if stage == 0 else jax.random.fold_in(key, stage)


class _Plan(NamedTuple):
    """What all blocks of a stage share."""

    make: Callable[[dict[str, jax.Array]], Algorithm]
    settings: dict[str, jax.Array]
    mapped: bool
    keys: jax.Array
    federation: Federation | Population
    sampler: Sampler | PopulationSampler
    evaluate: Evaluate | None
    evaluation_data: PyTree
    eval_every: int

    @property
    def num_axes(self) -> int:
        """Leading axes of everything: seeds, and hyper-parameters outside them."""
        return 2 if self.mapped else 1


class _Programs(NamedTuple):
    """The compiled programs of a stage."""

    init: Callable[..., PyTree]
    block: Callable[..., tuple[PyTree, dict[str, jax.Array]]]
    evaluate: Callable[..., Any]


def _over_runs(fn: Callable, axes: tuple[int | None, ...], mapped: bool) -> Callable:
    """Maps ``fn(setting, key, *arguments)`` over seeds and, outside them, settings.

    Axis None marks what all runs share.
    """
    over_seeds = jax.vmap(fn, in_axes=(None, 0, *axes))
    if not mapped:
        return over_seeds
    return jax.vmap(over_seeds, in_axes=(0, None, *axes))


def _one_round(
    plan: _Plan,
    setting: dict[str, jax.Array],
    key: jax.Array,
    state: PyTree,
    index: jax.Array,
    federation: ByGroup,
) -> tuple[PyTree, Info]:
    """Round ``index`` of one run; it draws from ``fold_in(key of the seed, index)``."""
    algorithm, there = plan.make(setting), num_clients(federation)
    if algorithm.num_clients != there:
        raise InputError(
            f"the algorithm was made for {algorithm.num_clients} clients but the federation has "
            f"{there}; pass num_clients=federation.num_clients"
        )
    round_key = jax.random.fold_in(jax.random.fold_in(key, _ROUNDS), index)
    cohort_key, key = jax.random.split(round_key)
    return algorithm.round(state, plan.sampler(cohort_key, index, federation), key)


def _empty_history(shape: jax.ShapeDtypeStruct, length: int) -> jax.Array:
    fill = jnp.nan if jnp.issubdtype(shape.dtype, jnp.inexact) else 0
    return jnp.full((length, *shape.shape), fill, shape.dtype)


def _compile(plan: _Plan, stage: int) -> _Programs:
    """The programs of a stage; shorter blocks run in the same program as whole ones."""

    def init_run(setting, key):
        return plan.make(setting).init(init_key(key, stage))

    def run_block(setting, key, state, start, stop, federation):
        shapes = jax.eval_shape(
            lambda s, k, x: _one_round(plan, s, k, x, start, federation), setting, key, state
        )[1]
        history = {name: _empty_history(x, plan.eval_every) for name, x in shapes.items()}

        def body(index, carry):
            state, history = carry
            state, info = _one_round(plan, setting, key, state, index, federation)
            row = index - start
            return state, {name: history[name].at[row].set(x) for name, x in info.items()}

        return jax.lax.fori_loop(start, stop, body, (state, history))

    def evaluate_run(setting, key, state, index, data):
        if plan.evaluate is None:
            return None
        key = jax.random.fold_in(jax.random.fold_in(key, _EVALUATION), index)
        return plan.evaluate(plan.make(setting), state, data, key)

    return _Programs(
        init=jax.jit(_over_runs(init_run, (), plan.mapped)),
        block=jax.jit(_over_runs(run_block, (0, None, None, None), plan.mapped), donate_argnums=2),
        evaluate=jax.jit(_over_runs(evaluate_run, (0, None, None), plan.mapped)),
    )


def _run_stage(
    plan: _Plan, stage: int, state: PyTree | None, done: int, until: int, announce: bool
) -> Iterator[Block]:
    """The blocks of one stage; ``announce`` yields one before its first round too."""
    programs = _compile(plan, stage)
    algorithm = None if plan.mapped else plan.make({})

    def block(index, state, history):
        evaluation = None
        if plan.evaluate is not None:
            arguments = (plan.settings, plan.keys, state, jnp.int32(index))
            evaluation = programs.evaluate(*arguments, plan.evaluation_data)
        return Block(index, state, history, evaluation, stage, algorithm)

    state = programs.init(plan.settings, plan.keys) if state is None else state
    if announce:
        yield block(done, state, {})
    while done < until:
        # Blocks end at multiples of eval_every, wherever the run was taken up.
        stop = min(until, (done // plan.eval_every + 1) * plan.eval_every)
        state, history = programs.block(
            plan.settings, plan.keys, state, jnp.int32(done), jnp.int32(stop), plan.federation
        )
        rounds = stop - done
        history = {
            name: jax.lax.slice_in_dim(x, 0, rounds, axis=plan.num_axes)
            for name, x in history.items()
        }
        done = stop
        yield block(done, state, history)


def simulate_blocks(
    algorithm: Algorithm | Callable[..., Algorithm] | list[Stage],
    federation: Federation | Population,
    *,
    num_rounds: int | None = None,
    seeds: Sequence[int] = (0,),
    sampler: Sampler | PopulationSampler | None = None,
    evaluate: Evaluate | None = None,
    evaluation_data: PyTree = None,
    eval_every: int | None = None,
    hyperparameters: dict[str, jax.Array] | None = None,
    initial: Callable[[PyTree], PyTree] | None = None,
    state: PyTree | None = None,
    start_round: int = 0,
    previous: PyTree | None = None,
) -> Iterator[Block]:
    """Runs rounds in compiled blocks; yields a Block before the first round and after each block.

    A block has ``eval_every`` rounds. All blocks of a stage, shorter ones too, are one compiled
    program, inside which seeds and hyper-parameters are vmapped. Round r of a seed draws from
    ``fold_in(key of the seed, r)``, so a run that is continued from a saved state equals the run
    that was never interrupted.

    Args:
        algorithm: an Algorithm; with ``hyperparameters`` a function of them by name; or a list of
            stages, which follow each other.
        federation: the training clients; of clients in groups one Federation a group.
        num_rounds: rounds in all, those before ``start_round`` included; default those of the
            stages.
        seeds: one run each.
        sampler: who takes part; default everybody.
        evaluate: ``(algorithm, state, evaluation_data, key) -> pytree`` of one run; compiled, and
            mapped over the runs.
        evaluation_data: what ``evaluate`` reads, e.g. Splits. An argument, because arrays that a
            compiled function closes over are copied into it.
        eval_every: rounds in a block; default all of them.
        hyperparameters: arrays ``[settings, ...]``, of one length; ``algorithm(**setting)`` is
            traced once for all.
        initial: changes the state after the first ``init``, outside of any compiled program, e.g.
            puts a checkpoint's weights in; it sees the leading axes of :class:`Block`.
        state: continue from here (it is copied); by default from ``init``. No Block is yielded for
            the start.
        start_round: the rounds that ``state`` has behind it.
        previous: with stages, the last state of the stage before the one that goes on at
            ``start_round``; see :func:`stage_of`.

    Raises:
        InputError: a count that makes no sense, stages of another number of rounds, or
            hyper-parameters of different lengths.
    """
    stages, make = _as_stages(algorithm, num_rounds, hyperparameters)
    total = sum(stage.rounds for stage in stages)
    num_rounds = total if num_rounds is None else num_rounds
    if num_rounds < 0 or not 0 <= start_round <= num_rounds:
        raise InputError(f"cannot run from round {start_round} to round {num_rounds}")
    if num_rounds > total:
        raise InputError(f"num_rounds is {num_rounds} but the stages have {total} rounds together")
    eval_every = max(num_rounds, 1) if eval_every is None else eval_every
    if eval_every < 1:
        raise InputError(f"eval_every is {eval_every}; give at least 1 round")
    _check_lengths(hyperparameters or {})
    plan = _Plan(
        make=make,
        settings=hyperparameters or {},
        mapped=hyperparameters is not None,
        keys=root_keys(seeds),
        federation=federation,
        sampler=_everybody(federation) if sampler is None else sampler,
        evaluate=evaluate,
        evaluation_data=evaluation_data,
        eval_every=eval_every,
    )
    start = None if state is None else jax.tree.map(jnp.copy, state)  # blocks donate it
    return _run_stages(plan, stages, num_rounds, start, start_round, previous, initial)


def _run_stages(
    plan: _Plan,
    stages: Sequence[Stage],
    num_rounds: int,
    state: PyTree | None,
    done: int,
    previous: PyTree | None,
    initial: Callable[[PyTree], PyTree] | None,
) -> Iterator[Block]:
    index, first = stage_of(stages, done)
    fresh = state is None
    while True:
        until = min(num_rounds, first + stages[index].rounds)
        made, started = stages[index].build(previous)
        state = started if state is None else state
        own = plan if plan.mapped else plan._replace(make=_always(made))
        if fresh and index == 0 and initial is not None:
            keys_state = _compile(own, 0).init(own.settings, own.keys) if state is None else state
            state = initial(keys_state)
        for block in _run_stage(own, index, state, done, until, announce=fresh and done == 0):
            state, done = block.state, block.round
            yield block
        first += stages[index].rounds
        if first >= num_rounds or index == len(stages) - 1:
            return
        previous, state, fresh, index = state, None, False, index + 1


def _always(algorithm: Algorithm) -> Callable[[dict[str, jax.Array]], Algorithm]:
    return lambda setting: algorithm


def _everybody(federation: Federation | Population) -> Sampler | PopulationSampler:
    whole = full_participation()
    return by_group(whole) if isinstance(federation, dict) else whole


def _as_stages(
    algorithm: Any, num_rounds: int | None, hyperparameters: Any
) -> tuple[list[Stage], Callable[[dict[str, jax.Array]], Algorithm]]:
    """The stages of a run, and the algorithm as a function of mapped hyper-parameters."""
    if isinstance(algorithm, list):
        _check_stages(algorithm, hyperparameters)
        return algorithm, lambda _: algorithm[0].build(None)[0]
    if num_rounds is None:
        raise InputError("num_rounds says how many rounds to run; give it")
    if hyperparameters is None:
        return [Stage(lambda _: (algorithm, None), num_rounds)], _always(algorithm)
    # What a stage builds is not looked at where hyper-parameters are mapped.
    return [Stage(lambda _: (algorithm, None), num_rounds)], lambda setting: algorithm(**setting)


def _check_stages(stages: Sequence[Stage], hyperparameters: Any) -> None:
    if not stages:
        raise InputError("there is no stage; give at least one")
    if hyperparameters is not None:
        raise InputError(
            "hyper-parameters are mapped inside one program, and stages are several; "
            "give one of them"
        )
    for index, stage in enumerate(stages):
        if stage.rounds < 0:
            raise InputError(f"stage {index} has {stage.rounds} rounds; give 0 or more")


def _check_lengths(hyperparameters: dict[str, jax.Array]) -> None:
    lengths = {name: len(values) for name, values in hyperparameters.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(
            f"hyper-parameters are mapped together but have different lengths: {lengths}"
        )


class Simulation(NamedTuple):
    """A finished simulation; leading axes as in :class:`Block`.

    Attributes:
        state: the last state.
        metrics: per-round info, ``[..., num_rounds, ...]``; NaN in rounds of stages that do not
            report a name. Arrays whose shape differs between stages are kept by stage, as
            ``<name>/stage_<i>``.
        rounds: the rounds at which ``evaluations`` were made, from 0.
        evaluations: what ``evaluate`` returned at each.
    """

    state: PyTree
    metrics: dict[str, jax.Array]
    rounds: list[int]
    evaluations: list[Any]


def simulate(
    algorithm: Algorithm | Callable[..., Algorithm] | list[Stage],
    federation: Federation | Population,
    *,
    num_rounds: int | None = None,
    seeds: Sequence[int] = (0,),
    sampler: Sampler | PopulationSampler | None = None,
    evaluate: Evaluate | None = None,
    evaluation_data: PyTree = None,
    eval_every: int | None = None,
    hyperparameters: dict[str, jax.Array] | None = None,
    initial: Callable[[PyTree], PyTree] | None = None,
    state: PyTree | None = None,
    start_round: int = 0,
    previous: PyTree | None = None,
) -> Simulation:
    """Runs :func:`simulate_blocks` to its end, with the same arguments, and collects its blocks."""
    blocks = simulate_blocks(
        algorithm,
        federation,
        num_rounds=num_rounds,
        seeds=seeds,
        sampler=sampler,
        evaluate=evaluate,
        evaluation_data=evaluation_data,
        eval_every=eval_every,
        hyperparameters=hyperparameters,
        initial=initial,
        state=state,
        start_round=start_round,
        previous=previous,
    )
    last, metrics, rounds, evaluations = state, [], [], []
    for block in blocks:
        last = block.state
        if block.metrics:
            metrics.append((block.stage, block.metrics))
        rounds.append(block.round)
        evaluations.append(block.evaluation)
    axes = 1 if hyperparameters is None else 2
    return Simulation(last, _join_metrics(metrics, axes), rounds, evaluations)


def _join_metrics(
    blocks: list[tuple[int, dict[str, jax.Array]]], num_axes: int
) -> dict[str, jax.Array]:
    """All blocks' metrics along the axis of rounds."""
    kinds: dict[str, set[tuple[int, ...]]] = {}
    for _, metrics in blocks:
        for name, values in metrics.items():
            kinds.setdefault(name, set()).add(values.shape[num_axes + 1 :])
    lengths = [next(iter(metrics.values())).shape[num_axes] for _, metrics in blocks]
    parts: dict[str, dict[int, jax.Array]] = {}
    for index, (stage, metrics) in enumerate(blocks):
        for name, values in metrics.items():
            full = name if len(kinds[name]) == 1 else f"{name}/stage_{stage}"
            parts.setdefault(full, {})[index] = values

    def joined(own: dict[int, jax.Array]) -> jax.Array:
        like = next(iter(own.values()))

        def missing(length):
            shape = (*like.shape[:num_axes], length, *like.shape[num_axes + 1 :])
            return jnp.full(shape, jnp.nan, jnp.promote_types(like.dtype, jnp.float32))

        pieces = [own[i] if i in own else missing(length) for i, length in enumerate(lengths)]
        return jnp.concatenate(pieces, axis=num_axes)

    return {name: joined(own) for name, own in parts.items()}
