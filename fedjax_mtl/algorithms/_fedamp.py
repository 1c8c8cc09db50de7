"""FedAMP: every client is pulled at by a model made for it, of those that resemble its own."""

from typing import Any

import jax
import optax

from fedjax_mtl.algorithms._anchored import mixed_anchors
from fedjax_mtl.clients.training import Solver, quadratic_pull
from fedjax_mtl.core import trees
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.core.checks import InputError, check_fidelity
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.groups import Counts, Models, Server, Tasks, group_shapes
from fedjax_mtl.server.mixing import attention_mixing, only

PyTree = Any


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
        InputError: an unknown choice, or a part that no client has.
    """
    check_fidelity(fidelity)
    attention = attention_mixing(
        scale=scale, bandwidth=bandwidth, per_parameter=per_parameter, clip=clip
    )
    if parts is not None:
        _check_parts(parts, group_shapes(model, num_clients))
    return mixed_anchors(
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
            raise InputError(
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
