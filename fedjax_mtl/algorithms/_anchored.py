"""Systems whose clients keep a model of their own that something shared pulls at.

Ditto's clients are pulled at by one global model, FedAMP's by a mixture of the models that resemble
theirs, FedMTL's by all the others' models.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from fedjax_mtl.clients.training import Pull, Solver, quadratic_pull
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate, anchored_trainer, local_trainer
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.core.checks import check_choice, check_fidelity
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.engine import Weighting
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import (
    Counts,
    Models,
    Server,
    Tasks,
    each_group,
    group_shapes,
    population_size,
)
from fedjax_mtl.server import step_from
from fedjax_mtl.server.mixing import attention_mixing, mean_of_others, only

PyTree = Any


class DittoState(NamedTuple):
    """What a Ditto client keeps: the states of its two trainers.

    Attributes:
        shared: of the trainer of the global model.
        own: of the trainer of its own model.
    """

    shared: PyTree
    own: PyTree


def ditto(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    penalty: float | jax.Array = 0.1,
    personal_plan: BatchPlan | None = None,
    server: Server | None = None,
    weighting: Weighting = "samples",
    personal: trees.PathPredicate = trees.nothing,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """Ditto (Li et al., arXiv 2012.04221, algorithm 1): FedAvg, and beside it personal models.

    Each round the client trains the received w as in FedAvg, and its own v on
    ``f(v) + penalty / 2 ||v - w||^2``, with w as received. It predicts with v. Penalty 0 is
    training alone.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: local training of both models, each with an optimiser of its own.
        penalty: the paper's lambda.
        personal_plan: local training of v; default the solver's plan.
        server: as for :func:`fedavg`.
        weighting: as for :func:`fedavg`.
        personal: path predicate of the leaves of which every client has its own, of w as of v: they
            neither travel nor are pulled at.
        adaptation: of a newcomer's v, from the global model; default ``personal_plan``.
        execution: as for :func:`fedavg`.
    """
    personal_plan = personal_plan or solver.plan

    def make_client(model, task):
        globally = local_trainer(model, task, solver, personal=personal)
        personally = anchored_trainer(
            model,
            task,
            solver._replace(plan=personal_plan),
            quadratic_pull(penalty),
            personal=personal,
            adaptation=adaptation or personal_plan,
        )
        return _side_by_side(globally, personally)

    return federated(
        each_group(model, task, num_clients, make_client),
        step_from(optax.sgd(1.0)) if server is None else server,
        weighting=weighting,
        execution=execution,
    )


def _side_by_side(globally: ClientUpdate, personally: ClientUpdate) -> ClientUpdate:
    """Trains what was received and, beside it, a model of its own that it predicts with."""

    def init(params):
        return DittoState(globally.init(params), personally.init(params))

    def update(params, state, client, key):
        # The same batches for both, as when one loop trains them side by side.
        shared = globally.update(params, state.shared, client, key)
        own = personally.update(params, state.own, client, key)
        # The loss is that of what travels: servers may weigh clients by it.
        metrics = {**shared.metrics, "personal_loss": own.metrics["loss"]}
        return ClientResult(shared.pseudo_gradient, DittoState(shared.state, own.state), metrics)

    def predict(params, state, inputs):
        return personally.predict(params, state.own, inputs)

    def adapt(params, client, key):
        return DittoState(globally.init(params), personally.adapt(params, client, key))

    return ClientUpdate(init, update, predict, adapt, shared=globally.shared)


def _mixed_anchors(
    model: Models,
    task: Tasks,
    num_clients: Counts,
    solver: Solver,
    *,
    pull: Pull,
    mixing: Server,
    personal: trees.PathPredicate,
    adaptation: BatchPlan | None,
    execution: Execution | None,
    full_participation: bool = False,
) -> Algorithm:
    """Anchored trainers, and a server that sends each a mixture of everybody's models."""

    def make_client(model, task):
        return anchored_trainer(
            model, task, solver, pull, personal=personal, adaptation=adaptation or solver.plan
        )

    return federated(
        each_group(model, task, num_clients, make_client),
        optax.chain(mixing, optax.sgd(1.0)),
        models="own",
        execution=execution,
        full_participation=full_participation,
    )


def fedamp(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    penalty: float | jax.Array = 1.0,
    scale: float = 1.0,
    bandwidth: float | str = 1.0,
    per_parameter: bool = False,
    clip: bool = False,
    parts: tuple[str, ...] | None = None,
    personal: trees.PathPredicate = trees.nothing,
    fidelity: str = "paper",
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """FedAMP (Huang et al., arXiv 2007.03797): every client is pulled at by a model made for it.

    The server sends ``u_i = sum_j xi_ij w_j``, in which clients count that resemble the receiver
    (:func:`fedjax_mtl.server.attention_mixing`); the client trains its own model on
    ``f_i(w) + penalty / (2 scale) ||w - u_i||^2``. Leaves that only some groups of clients have,
    e.g. their decoders, attend among the clients that have them.

    Args:
        model: as for :func:`fedavg`.
        task: as for :func:`fedavg`.
        num_clients: as for :func:`fedavg`.
        solver: local training of the client's own model.
        penalty: the paper's lambda.
        scale: the attention's alpha_K.
        bandwidth: the attention's sigma, or ``median``. At the published scale and bandwidth of 1
            the attention underflows for all but tiny models: for usable experiments take
            ``median``, or ``per_parameter``.
        per_parameter: divides the attention's distances by the number of parameters.
        clip: keeps a client's weight of its own model from going negative.
        parts: top-level names whose attention is computed apart, e.g. ``("encoder", "decoder")`` as
            in FMTL-Bench; default one attention over everything.
        personal: path predicate of the leaves that neither travel nor are pulled at.
        fidelity: ``released`` is FMTL-Bench's code, whose penalty is computed on detached values:
            it has no gradient, and clients train alone.
        adaptation: training of a newcomer, from the mean of all; default the solver's plan.
        execution: as for :func:`fedavg`.

    Raises:
        ValueError: an unknown choice, or a part that no client has.
    """
    check_fidelity(fidelity)
    attention = attention_mixing(
        scale=scale, bandwidth=bandwidth, per_parameter=per_parameter, clip=clip
    )
    if parts is not None:
        _check_parts(parts, group_shapes(model, num_clients))
    return _mixed_anchors(
        model,
        task,
        num_clients,
        solver,
        pull=quadratic_pull(penalty / scale if fidelity == "paper" else 0.0),
        mixing=attention if parts is None else _part_by_part(parts, attention),
        personal=personal,
        adaptation=adaptation,
        execution=execution,
    )


def _top_names(params: PyTree) -> set[str]:
    return {path[0] for path in trees.leaves_by_path(params) if path}


def _check_parts(parts: tuple[str, ...], shapes: dict[str, PyTree]) -> None:
    known = sorted(set().union(*map(_top_names, shapes.values())))
    for part in parts:
        if part not in known:
            raise ValueError(
                f"no client has a part {part!r}; at the top the parameters are {', '.join(known)}"
            )


def _part_by_part(parts: tuple[str, ...], transformation: Server) -> Server:
    """The transformation on each part for itself, of the parts that the parameters have.

    What some groups of clients own is mixed apart from what all have, so a step may see only some
    of the parts.
    """

    def on(params: PyTree) -> optax.GradientTransformationExtraArgs:
        here = [part for part in parts if part in _top_names(params)]
        return optax.chain(*[only(trees.under(part), transformation) for part in here])

    def init(params):
        return on(params).init(params)

    def update(updates, state, params=None, **extra_args):
        return on(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


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
    algorithm = _mixed_anchors(
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
