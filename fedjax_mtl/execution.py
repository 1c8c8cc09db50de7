"""Client map: how the one-client function is run over a cohort.

An algorithm writes its client for one client and calls :func:`map_clients`. Which of the strategies
below runs it is the user's choice, and all give the same numbers up to the order of float sums.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError

PyTree = Any
ClientFunction = Callable[..., tuple[PyTree, PyTree]]
"""``fn(shared, *client) -> (term, output)``: the work of one client."""

MODES = ("vmap", "map", "chunk", "loop")
CLIENT_AXIS = "clients"

# A chunk of clients should fit a core's cache on CPUs, and leave an accelerator room for
# activations.
_CPU_CHUNK_BYTES = 2**18
_ACCELERATOR_CHUNK_BYTES = 2**31
_LARGEST_CPU_CHUNK = 32


class Execution(NamedTuple):
    """How clients are mapped.

    Attributes:
        mode: ``vmap`` all at once; ``map`` one after the other, in bounded memory; ``chunk`` a scan
            over vmapped chunks; ``loop`` unrolled in Python, for debugging and for few large
            clients.
        chunk: clients in a chunk; only with mode ``chunk``.
        mesh: with a mesh the clients are split over its devices first, and the mode applies on each
            device.
    """

    mode: str
    chunk: int | None = None
    mesh: Mesh | None = None


def make_execution(mode: str, chunk: int | None = None, num_devices: int = 1) -> Execution:
    """Returns a checked Execution.

    Args:
        mode: one of ``MODES``; see :class:`Execution`.
        chunk: clients in a chunk, for mode ``chunk`` and for no other.
        num_devices: above 1, the client axis is sharded over so many devices.

    Raises:
        InputError: unknown mode, a chunk that is missing, not positive, or given to another mode,
            or more devices than there are.
    """
    if mode not in MODES:
        raise InputError(f"unknown execution mode {mode!r}; expected one of {', '.join(MODES)}")
    if mode == "chunk" and (chunk is None or chunk < 1):
        raise InputError(f"execution mode 'chunk' needs a chunk of at least 1 client, got {chunk}")
    if mode != "chunk" and chunk is not None:
        raise InputError(f"chunk={chunk} goes with mode 'chunk', not {mode!r}")
    if num_devices < 1:
        raise InputError(f"num_devices is {num_devices}; give at least 1")
    if num_devices > len(jax.devices()):
        raise InputError(
            f"{num_devices} devices asked for but there are {len(jax.devices())}; on a CPU set "
            "XLA_FLAGS=--xla_force_host_platform_device_count before starting"
        )
    mesh = None
    if num_devices > 1:
        mesh = jax.make_mesh((num_devices,), (CLIENT_AXIS,), axis_types=(AxisType.Auto,))
    return Execution(mode, chunk, mesh)


def default_execution(params: PyTree, platform: str | None = None) -> Execution:
    """Returns the strategy measured to be fastest for a model of this size on this platform.

    On CPUs a chunk has as many clients as keep parameters and gradients in a part of a core's
    cache; models that fill it alone go one at a time. Convolutional models should use
    ``models.PatchConv``: a stock convolution is slow in any chunk on a CPU. On accelerators the
    chunks are large, so that launches are shared.

    Args:
        params: the shared parameters (arrays or shapes), all components and decoders included.
        platform: ``cpu``, ``gpu`` or ``tpu``; default the one JAX runs on.
    """
    platform = jax.default_backend() if platform is None else platform
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    if platform == "cpu":
        chunk = min(_CPU_CHUNK_BYTES // max(size, 1), _LARGEST_CPU_CHUNK)
    else:
        # Parameters, gradient, optimiser state and the pseudo-gradient of every client in flight.
        chunk = _ACCELERATOR_CHUNK_BYTES // max(4 * size, 1)
    return Execution("map") if chunk <= 1 else Execution("chunk", int(chunk))


def _num_clients(mapped: tuple[PyTree, ...]) -> int:
    return jax.tree.leaves(mapped)[0].shape[0]


def _pad(tree: PyTree, padding: int) -> PyTree:
    """Repeats the first client ``padding`` times at the end.

    It is real data, so that no padding can produce a NaN.
    """
    if padding == 0:
        return tree
    return jax.tree.map(
        lambda leaf: jnp.concatenate([leaf, jnp.repeat(leaf[:1], padding, axis=0)]), tree
    )


def _add_sum(total: PyTree, terms: PyTree, real: jax.Array) -> PyTree:
    """Adds the real ones of the stacked terms ``[chunk, ...]`` to the total."""

    def add(t: jax.Array, x: jax.Array) -> jax.Array:
        mask = trees.along_first_axis(real, x)
        return t + jnp.sum(jnp.where(mask, x, 0), axis=0)

    return jax.tree.map(add, total, terms)


def _run_chunks(
    fn: ClientFunction, shared: PyTree, mapped: tuple[PyTree, ...], chunk: int
) -> tuple[PyTree, PyTree]:
    """Scans over chunks of ``chunk`` clients (1: no vmap at all); ``fn`` returns (term, output)."""
    count = _num_clients(mapped)
    num_chunks = -(-count // chunk)
    chunk = -(-count // num_chunks)  # the same number of chunks, less padding in the last
    mapped = _pad(mapped, num_chunks * chunk - count)
    blocks = jax.tree.map(lambda x: x.reshape(num_chunks, chunk, *x.shape[1:]), mapped)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), mapped)
    term, _ = jax.eval_shape(fn, shared, *one)
    zero = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), term)

    def body(total: PyTree, args: tuple[jax.Array, PyTree]) -> tuple[PyTree, PyTree]:
        index, block = args
        if chunk == 1:
            term, out = fn(shared, *jax.tree.map(lambda x: x[0], block))
            total = jax.tree.map(jnp.add, total, term)
            return total, jax.tree.map(lambda x: x[None], out)
        terms, outs = jax.vmap(fn, in_axes=(None,) + (0,) * len(block))(shared, *block)
        real = index * chunk + jnp.arange(chunk) < count
        return _add_sum(total, terms, real), outs

    total, outs = jax.lax.scan(body, zero, (jnp.arange(num_chunks), blocks))
    outs = jax.tree.map(lambda x: x.reshape(num_chunks * chunk, *x.shape[2:])[:count], outs)
    return total, outs


def _run_vmap(
    fn: ClientFunction, shared: PyTree, mapped: tuple[PyTree, ...]
) -> tuple[PyTree, PyTree]:
    terms, outs = jax.vmap(fn, in_axes=(None,) + (0,) * len(mapped))(shared, *mapped)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), terms), outs


def _run_loop(
    fn: ClientFunction, shared: PyTree, mapped: tuple[PyTree, ...]
) -> tuple[PyTree, PyTree]:
    count = _num_clients(mapped)
    results = [fn(shared, *jax.tree.map(lambda x, c=c: x[c], mapped)) for c in range(count)]
    terms, outs = zip(*results, strict=True)
    total = jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *terms)
    return total, jax.tree.map(lambda *xs: jnp.stack(xs), *outs)


def _run(
    fn: ClientFunction,
    shared: PyTree,
    mapped: tuple[PyTree, ...],
    execution: Execution,
    work: jax.Array | None,
) -> tuple[PyTree, PyTree]:
    count = _num_clients(mapped)
    if execution.mode == "loop":
        return _run_loop(fn, shared, mapped)
    chunk = execution.chunk or 1  # None in every other mode
    if execution.mode == "vmap" or (execution.mode == "chunk" and chunk >= count):
        return _run_vmap(fn, shared, mapped)
    if execution.mode == "map":
        return _run_chunks(fn, shared, mapped, 1)
    if work is None:
        return _run_chunks(fn, shared, mapped, chunk)
    order = jnp.argsort(work)
    in_order = jax.tree.map(lambda x: x[order], mapped)
    total, outs = _run_chunks(fn, shared, in_order, chunk)
    place = jnp.argsort(order)
    return total, jax.tree.map(lambda x: x[place], outs)


def _run_sharded(
    fn: ClientFunction,
    shared: PyTree,
    mapped: tuple[PyTree, ...],
    execution: Execution,
    mesh: Mesh,
    work: jax.Array | None,
) -> tuple[PyTree, PyTree]:
    count = _num_clients(mapped)
    padding = -count % mesh.devices.size
    real = jnp.arange(count + padding) < count
    work = jnp.zeros(count) if work is None else work
    mapped, work = _pad((mapped, work), padding)

    def masked(shared: PyTree, is_real: jax.Array, *args: PyTree) -> tuple[PyTree, PyTree]:
        term, out = fn(shared, *args)
        return jax.tree.map(lambda t: jnp.where(is_real, t, 0), term), out

    def on_device(
        shared: PyTree, is_real: jax.Array, work: jax.Array, mapped: tuple[PyTree, ...]
    ) -> tuple[PyTree, PyTree]:
        total, outs = _run(masked, shared, (is_real, *mapped), execution, work)
        return jax.lax.psum(total, CLIENT_AXIS), outs

    clients = PartitionSpec(CLIENT_AXIS)
    total, outs = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), clients, clients, clients),
        out_specs=(PartitionSpec(), clients),
        check_vma=False,
    )(shared, real, work, mapped)
    return total, jax.tree.map(lambda x: x[:count], outs)


def sum_and_map_clients(
    fn: ClientFunction, execution: Execution, work: jax.Array | None = None
) -> Callable[..., tuple[PyTree, PyTree]]:
    """Maps ``fn(shared, *client) -> (term, output)`` over clients: sums terms, stacks outputs.

    The sum is carried from chunk to chunk, so that memory does not grow with the number of clients:
    that is what a server that only averages needs.

    Args:
        fn: the function of one client; ``shared`` is what all clients read.
        execution: how; see :class:`Execution`.
        work: ``[clients]``; a measure of each client's work. Clients with like work then share a
            chunk, which runs as long as its slowest client. Outputs come back in the order given.

    Returns:
        ``run(shared, *mapped) -> (sum of terms, outputs [clients, ...])``, where every leaf of
        ``mapped`` is ``[clients, ...]``.
    """

    def run(shared: PyTree, *mapped: PyTree) -> tuple[PyTree, PyTree]:
        if execution.mesh is None:
            return _run(fn, shared, mapped, execution, work)
        return _run_sharded(fn, shared, mapped, execution, execution.mesh, work)

    return run


def map_clients(
    fn: Callable[..., PyTree], execution: Execution, work: jax.Array | None = None
) -> Callable[..., PyTree]:
    """Maps ``fn(shared, *client) -> output`` over clients; see :func:`sum_and_map_clients`."""

    def run(shared: PyTree, *mapped: PyTree) -> PyTree:
        run_both = sum_and_map_clients(lambda *args: ((), fn(*args)), execution, work)
        return run_both(shared, *mapped)[1]

    return run
