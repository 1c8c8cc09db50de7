"""Systems whose clients keep a personal model that something shared pulls at: Ditto, FedAMP, FedMTL."""

from typing import Any, NamedTuple

import jax
import optax

from fedjax_mtl.clients.training import Schedule, quadratic_pull
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate, anchored_trainer, local_trainer
from fedjax_mtl.core import trees
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.execution import Execution
from fedjax_mtl.models import Model
from fedjax_mtl.rounds.federated import Algorithm, Weighting, federated
from fedjax_mtl.rounds.relational import relational
from fedjax_mtl.server import step_from
from fedjax_mtl.server.mixing import attention_mixing, mean_of_others, only
from fedjax_mtl.tasks import Task

PyTree = Any


class DittoState(NamedTuple):
    """What a Ditto client keeps: the states of its two trainers, the one of the global model and the one of its own."""

    shared: PyTree
    own: PyTree


def ditto(
    model: Model,
    task: Task,
    *,
    num_clients: int,
    plan: BatchPlan,
    optimizer: optax.GradientTransformation,
    penalty: float | jax.Array = 0.1,
    personal_plan: BatchPlan | None = None,
    server: optax.GradientTransformation | None = None,
    weighting: Weighting = "samples",
    schedule: Schedule | None = None,
    adaptation: BatchPlan | None = None,
    execution: Execution | None = None,
) -> Algorithm:
    """Ditto (Li et al., arXiv 2012.04221, algorithm 1): FedAvg, and beside it a personal model pulled at by the global one.

    Each round the client trains the received w as in FedAvg, and its own v on ``f(v) + penalty / 2 ||v - w||^2``, w as received. It predicts with v. Penalty 0 is training alone.

    Args:
        personal_plan: local training of v; default ``plan``.
        adaptation: of a newcomer's v, from the global model; default ``personal_plan``. Others as for ``fedavg``.
    """
    personal_plan = personal_plan or plan
    globally = local_trainer(model, task, optimizer, plan, schedule=schedule)
    personally = anchored_trainer(
        model,
        task,
        optimizer,
        personal_plan,
        quadratic_pull(penalty),
        schedule=schedule,
        adaptation=adaptation or personal_plan,
    )

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

    return federated(
        model.init,
        ClientUpdate(init, update, predict, adapt),
        step_from(optax.sgd(1.0)) if server is None else server,
        num_clients=num_clients,
        weighting=weighting,
        execution=execution,
    )


def _anchored(
    model,
    task,
    mixing,
    pull,
    *,
    num_clients,
    plan,
    optimizer,
    execution=None,
    full_participation=False,
    adaptation=None,
    **client,
) -> Algorithm:
    """Anchored trainers, and a server that sends each a mixture of everybody's models."""
    return relational(
        model.init,
        anchored_trainer(
            model, task, optimizer, plan, pull, adaptation=adaptation or plan, **client
        ),
        optax.chain(*mixing, optax.sgd(1.0)),
        num_clients=num_clients,
        execution=execution,
        full_participation=full_participation,
    )


def fedamp(
    model: Model,
    task: Task,
    *,
    penalty: float | jax.Array = 1.0,
    scale: float = 1.0,
    bandwidth: float | str = 1.0,
    per_parameter: bool = False,
    clip: bool = False,
    parts: tuple[str, ...] | None = None,
    fidelity: str = "paper",
    **settings: Any,
) -> Algorithm:
    """FedAMP (Huang et al., arXiv 2007.03797): every client is pulled towards a model of its own in the cloud, more like those it resembles.

    The server sends ``u_i = sum_j xi_ij w_j`` (:func:`attention_mixing`); the client trains its own model on ``f_i(w) + penalty / (2 scale) ||w - u_i||^2``.

    Args:
        penalty: lambda. scale, bandwidth, per_parameter, clip: the attention's; at the published scale and bandwidth of 1 it underflows for all but tiny models, for usable experiments
            take ``bandwidth="median"`` or ``per_parameter=True``.
        parts: top-level names whose attention is computed apart, e.g. ``("encoder", "decoder")`` as FMTL-Bench; default: one over everything.
        fidelity: ``released`` is FMTL-Bench's code, whose penalty is computed on detached values: it has no gradient, and clients train alone.
        settings: ``num_clients``, ``plan``, ``optimizer``, ``schedule``, ``execution``, ``adaptation`` (of newcomers; default ``plan``).
    """
    _check_fidelity(fidelity)
    attention = attention_mixing(
        scale=scale, bandwidth=bandwidth, per_parameter=per_parameter, clip=clip
    )
    mixing = (
        [attention] if parts is None else [only(trees.under(part), attention) for part in parts]
    )
    strength = penalty / scale if fidelity == "paper" else 0.0
    return _anchored(model, task, mixing, quadratic_pull(strength), **settings)


def fedmtl_exponent(rows: int) -> int:
    """The f of FedMTL's factor ``10^-f``: ``int(log10(rows) + 1) + 1`` of the number of parameters, 9 for 18 million."""
    return len(str(rows)) + 1


def fedmtl_pull(num_clients: int, factor: float) -> Any:
    """The gradient in w_k of ``factor (||W||_F^2 + sum_rows (omega sum_k W_rk)^2)``, ``omega = 1 - 1 / clients``, from the mean of the others' models."""
    omega = 1 - 1 / num_clients

    def pull(own, others):
        return jax.tree.map(
            lambda w, m: factor * (2 * w + 2 * omega**2 * (w + (num_clients - 1) * m)), own, others
        )

    return pull


def fedmtl(
    model: Model,
    task: Task,
    *,
    num_clients: int,
    penalty: float | None = None,
    regulariser: str = "sum",
    fidelity: str = "paper",
    **settings: Any,
) -> Algorithm:
    """FedMTL, the multi-task baseline of FMTL-Bench (arXiv 2402.12876), after MOCHA in name: every client sees all others' models.

    ``sum`` is the benchmark's regulariser, made differentiable: ``10^-f (||W||_F^2 + sum_rows (omega sum_k W_rk)^2)``, ``omega = 1 - 1 / clients``. It shrinks the sum of all models; the code's omega comes from a matrix of ones where a
    centring one was probably meant. ``mean`` is what that would be, ``penalty sum_k ||w_k - mean||^2`` (mean regularisation). In both only the client's own column moves during local training; the others are those of
    the last round's end. Nothing is averaged. ``fidelity="released"`` computes the regulariser on detached values: clients train alone.

    It needs full participation. Bytes: the others' mean stands for the K - 1 models that the method sends.

    Args:
        penalty: factor of the regulariser; default ``10^-f`` for ``sum``, 0.1 for ``mean``.
        settings: ``plan``, ``optimizer``, ``schedule``, ``execution``, ``adaptation`` (of newcomers; default ``plan``).
    """
    _check_fidelity(fidelity)
    if regulariser not in ("sum", "mean"):
        raise ValueError(f"unknown regulariser {regulariser!r}; expected 'sum' or 'mean'")
    rows = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    if fidelity == "released":
        pull = quadratic_pull(0.0)
    elif regulariser == "sum":
        factor = 10.0 ** -fedmtl_exponent(rows) if penalty is None else penalty
        pull = fedmtl_pull(num_clients, factor)
    else:
        # d/dw_k sum_j ||w_j - mean||^2 = 2 (w_k - mean), and w_k - mean = (1 - 1 / clients) (w_k - mean of the others).
        pull = quadratic_pull(2 * (0.1 if penalty is None else penalty) * (1 - 1 / num_clients))
    algorithm = _anchored(
        model,
        task,
        [mean_of_others()],
        pull,
        num_clients=num_clients,
        full_participation=True,
        **settings,
    )

    def traffic(state):
        up, _ = algorithm.traffic(state)
        return up, up * (num_clients - 1)

    return algorithm._replace(traffic=traffic)


def _check_fidelity(fidelity: str) -> None:
    if fidelity not in ("paper", "released"):
        raise ValueError(f"fidelity must be 'paper' or 'released', got {fidelity!r}")
