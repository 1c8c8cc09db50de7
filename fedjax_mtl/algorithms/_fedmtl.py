"""FedMTL: every client is pulled at by all the others' models."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedjax_mtl.algorithms._anchored import mixed_anchors
from fedjax_mtl.clients.training import Pull, Solver, quadratic_pull
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.core.checks import check_choice, check_fidelity
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.groups import Counts, Models, Tasks, group_shapes, population_size
from fedjax_mtl.server.mixing import mean_of_others

PyTree = Any


class TravellingTensor(NamedTuple):
    """One parameter tensor that travels: some rows of FedMTL's matrix of all clients' models.

    Attributes:
        shape: of one client's.
        owners: how many clients have it.
    """

    shape: jax.ShapeDtypeStruct
    owners: int

    @property
    def num_bytes(self) -> int:
        """The bytes of one client's."""
        return self.shape.size * self.shape.dtype.itemsize


Tensors = dict[trees.Path, TravellingTensor]


def _travelling(model: Models, num_clients: Counts, personal: trees.PathPredicate) -> Tensors:
    counts = num_clients if isinstance(num_clients, dict) else {"": num_clients}
    tensors: Tensors = {}
    for name, shapes in group_shapes(model, num_clients).items():
        for path, shape in trees.leaves_by_path(shapes).items():
            before = tensors[path].owners if path in tensors else 0
            if not personal(path):
                tensors[path] = TravellingTensor(shape, before + counts[name])
    return tensors


def fedmtl_exponent(rows: int) -> int:
    """The f of FedMTL's factor ``10^-f``, from the number of parameters.

    It is ``int(log10(rows) + 1) + 1``, so 9 for 18 million.
    """
    return len(str(rows)) + 1


def fedmtl_pull(num_clients: int, factor: float) -> Pull:
    """The gradient of FedMTL's regulariser in the client's own column w_k.

    The regulariser is ``factor (||W||_F^2 + sum_rows (omega sum_k W_rk)^2)`` with
    ``omega = 1 - 1 / clients``; the others' tensors are known by their mean.
    """
    omega = 1 - 1 / num_clients

    def pull(own, others):
        return jax.tree.map(
            lambda w, m: factor * (2 * w + 2 * omega**2 * (w + (num_clients - 1) * m)), own, others
        )

    return pull


def mean_pull(num_clients: int, penalty: float) -> Pull:
    """The gradient of ``penalty sum_j ||w_j - mean||^2`` in w_k, from the mean of the others.

    It is ``2 (w_k - mean)``, and ``w_k - mean = (1 - 1 / clients) (w_k - mean of the others)``.
    """
    return quadratic_pull(2 * penalty * (1 - 1 / num_clients))


def _tensor_by_tensor(make_pull: Callable[[int], Pull], tensors: Tensors) -> Pull:
    """The pull of every tensor among the clients that have it, ``make_pull(owners)``."""

    def pull(own, received):
        theirs = trees.leaves_by_path(received)
        return trees.map_with_path(
            lambda path, leaf: make_pull(tensors[path].owners)(leaf, theirs[path]), own
        )

    return pull


def fedmtl(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    penalty: float | None = None,
    regulariser: str = "sum",
    personal: trees.PathPredicate = trees.nothing,
    fidelity: str = "paper",
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """FedMTL, the multi-task baseline of FMTL-Bench (arXiv 2402.12876): everybody sees all models.

    It is named after MOCHA. ``sum`` is the benchmark's regulariser, made differentiable:
    ``10^-f (||W||_F^2 + sum_rows (omega sum_k W_rk)^2)``, ``omega = 1 - 1 / clients``. It shrinks
    the sum of all models; the code's omega comes from a matrix of ones where a centring one was
    probably meant. ``mean`` is what that would be, ``penalty sum_k ||w_k - mean||^2`` (mean
    regularisation). In both only the client's own column moves during local training; the others
    are those of the last round's end. Nothing is averaged. A tensor that only some groups of
    clients have counts among them.

    It needs full participation. The others' mean stands for the K - 1 models that the method sends,
    and ``traffic`` counts these.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: local training of the client's own model.
        penalty: factor of the regulariser; default ``10^-f`` for ``sum``, 0.1 for ``mean``.
        regulariser: ``sum`` or ``mean``.
        personal: path predicate of the leaves that are neither sent nor regularised; the benchmark
            leaves the last convolutions of decoders out.
        fidelity: ``released`` computes the regulariser on detached values: clients train alone.
        adaptation: training of a newcomer, from the mean of all; default the solver's plan.
        execution: as for :func:`fedavg`.

    Raises:
        ValueError: an unknown choice.
    """
    check_fidelity(fidelity)
    check_choice("regulariser", regulariser, ("sum", "mean"))
    tensors = _travelling(model, num_clients, personal)
    algorithm = mixed_anchors(
        model,
        task,
        num_clients,
        solver,
        pull=_fedmtl_pull(tensors, penalty, regulariser, fidelity),
        mixing=mean_of_others(),
        personal=personal,
        adaptation=adaptation,
        execution=execution,
        full_participation=True,
    )
    everybody = population_size(num_clients)
    received = sum(own.owners * (own.owners - 1) * own.num_bytes for own in tensors.values())

    def traffic(state: PyTree) -> tuple[int, int]:
        up, _ = algorithm.traffic(state)
        return up, int(round(received / everybody))

    return algorithm._replace(traffic=traffic)


def _fedmtl_pull(tensors: Tensors, penalty: float | None, regulariser: str, fidelity: str) -> Pull:
    if fidelity == "released":
        return quadratic_pull(0.0)
    if regulariser == "mean":
        strength = 0.1 if penalty is None else penalty
        return _tensor_by_tensor(lambda owners: mean_pull(owners, strength), tensors)
    rows = sum(own.shape.size for own in tensors.values())
    factor = 10.0 ** -fedmtl_exponent(rows) if penalty is None else penalty
    return _tensor_by_tensor(lambda owners: fedmtl_pull(owners, factor), tensors)
