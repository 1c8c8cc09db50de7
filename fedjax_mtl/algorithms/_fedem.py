"""FedEM: federated multi-task learning under a mixture of distributions.

Marfoq, Neglia, Bellet, Kameni, Vidal, NeurIPS 2021, arXiv 2108.10252. Each client's distribution is a mixture, with its own weights pi_t, of M
underlying ones that share the inputs' marginal; component m is a model theta_m that all clients train together. Algorithm 1 (client-server) and
D-FedEM (over a graph) are the two general compositions around one client update, :func:`fedem_client`.

Shapes: M components, leaves of ``params`` are ``[M, ...]``; responsibilities ``[M, capacity]``; mixture weights ``[M]`` a client.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.training import Schedule, local_losses, loss_gradient, train
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.core.federation import ClientView
from fedjax_mtl.execution import Execution
from fedjax_mtl.models import Model
from fedjax_mtl.rounds.federated import Algorithm, Weighting, decentralized, federated
from fedjax_mtl.server import step_from
from fedjax_mtl.tasks import Task, example_losses

PyTree = Any

_SMALLEST_WEIGHT = (
    1e-30  # log(0) would make a component's responsibility NaN where all others are 0 too
)


class FedEMClientState(NamedTuple):
    """What a FedEM client keeps: mixture weights ``[M]``, and the components' optimiser states ``[M, ...]`` or ``()``."""

    mixture: jax.Array
    optimizer: Any


def responsibilities(losses: jax.Array, mixture: jax.Array) -> jax.Array:
    """E-step: ``q[m, i] = softmax_m(log pi[m] - loss[m, i])``, ``[M, n], [M] -> [M, n]``, in log space."""
    log_prior = jnp.log(jnp.maximum(mixture, _SMALLEST_WEIGHT))
    return jax.nn.softmax(log_prior[:, None] - losses, axis=0)


def update_mixture(q: jax.Array, mask: jax.Array, mixture: jax.Array) -> jax.Array:
    """M-step for pi: the mean responsibility over real examples, ``[M, n], [n] -> [M]``; without examples pi stays."""
    count = jnp.sum(mask)
    mean = jnp.sum(jnp.where(mask, q, 0), axis=1) / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, mixture).astype(mixture.dtype)


def fedem_client(
    model: Model,
    task: Task,
    num_components: int,
    optimizer: optax.GradientTransformation,
    plan: BatchPlan,
    *,
    component_scales: jax.Array | None = None,
    schedule: Schedule | None = None,
    keep_optimizer: bool = False,
    adaptation_iterations: int = 10,
    evaluation_batch_size: int | None = 1024,
) -> ClientUpdate:
    """FedEM's client (algorithm 1, lines 4-9): E-step on all local data, pi, then local SGD on every component.

    All with the received theta and the old pi: first q, then pi, then the components, each on its own weighted loss
    ``1/|B| sum_i q[m, i] loss_i``, with q frozen for the whole round. Every component shuffles for itself, as in the released code: on
    its synthetic data, components that see the same minibatches stay alike for longer and end in poorer optima.

    Args:
        model, task: one component; the task's loss must be a negative log-likelihood.
        num_components: M.
        optimizer, plan: the local solver.
        component_scales: ``[M]`` factors on the learning rate, one a component.
        schedule: factor on the learning rate by round.
        keep_optimizer: keep momenta from round to round (released code).
        adaptation_iterations: EM iterations on pi alone for a newcomer, from uniform.
        evaluation_batch_size: examples whose losses are computed at once in the E-step.
    """
    if num_components < 1:
        raise ValueError(f"num_components is {num_components}; a mixture needs at least 1")
    losses = example_losses(model, task)
    gradient = loss_gradient(losses)
    scales = jnp.ones(num_components) if component_scales is None else jnp.asarray(component_scales)
    if scales.shape != (num_components,):
        raise ValueError(
            f"component_scales has shape {scales.shape}; give one factor for each of the {num_components} components"
        )

    def uniform() -> jax.Array:
        return jnp.full((num_components,), 1.0 / num_components)

    def component_losses(params: PyTree, client: ClientView) -> jax.Array:
        """The loss of every component on every local example, ``[M, capacity]``."""
        of_components = jax.vmap(losses, in_axes=(0, None, None), out_axes=1)
        return local_losses(of_components, params, client, evaluation_batch_size).T

    def init(params):
        state = jax.vmap(optimizer.init)(params) if keep_optimizer else ()
        return FedEMClientState(uniform(), state)

    def update(params, state, client, key):
        mask = jnp.arange(client.rows.shape[0]) < client.size
        q = responsibilities(component_losses(params, client), state.mixture)
        mixture = update_mixture(q, mask, state.mixture)
        starts = state.optimizer if keep_optimizer else jax.vmap(optimizer.init)(params)
        factor = scales if schedule is None else scales * schedule(client.round)

        def train_component(theta, optimizer_state, weights, scale, component_key):
            return train(
                gradient,
                optimizer,
                plan,
                theta,
                optimizer_state,
                client,
                component_key,
                example_weights=weights,
                step_scale=scale,
            )

        keys = jax.random.split(key, num_components)
        trained = jax.vmap(train_component)(params, starts, q, factor, keys)
        kept = FedEMClientState(mixture, trained.optimizer if keep_optimizer else ())
        metrics = {"loss": jnp.sum(trained.loss), "num_steps": trained.num_steps[0]}
        return ClientResult(optax.tree.sub(params, trained.params), kept, metrics)

    def predict(params, state, inputs):
        outputs = jax.vmap(model.apply, in_axes=(0, None, None))(params, inputs, None)
        return task.mix(outputs, state.mixture)

    def adapt(params, client, key):
        del key
        values = component_losses(params, client)
        mask = jnp.arange(client.rows.shape[0]) < client.size

        def iterate(_, mixture):
            return update_mixture(responsibilities(values, mixture), mask, mixture)

        mixture = jax.lax.fori_loop(0, adaptation_iterations, iterate, uniform())
        return init(params)._replace(mixture=mixture)

    return ClientUpdate(init, update, predict, adapt)


def init_components(model: Model, num_components: int):
    """``key -> params`` with leaves ``[M, ...]``: components differ only through their initialisation, so each has its own key."""

    def init(key):
        return jax.vmap(model.init)(jax.random.split(key, num_components))

    return init


def _resolve_fidelity(fidelity: str, settings: dict[str, Any]) -> dict[str, Any]:
    if fidelity not in ("paper", "released"):
        raise ValueError(f"fidelity must be 'paper' or 'released', got {fidelity!r}")
    settings.setdefault("keep_optimizer", fidelity == "released")
    return settings


def fedem(
    model: Model,
    task: Task,
    *,
    num_clients: int,
    num_components: int,
    plan: BatchPlan,
    optimizer: optax.GradientTransformation,
    server: optax.GradientTransformation | None = None,
    weighting: Weighting = "population",
    fidelity: str = "paper",
    execution: Execution | None = None,
    **client: Any,
) -> Algorithm:
    """FedEM, client-server (algorithm 1).

    With one component it is FedAvg. ``predict`` mixes the components' predictive distributions with the client's own pi;
    ``adapt`` learns only pi. Communication and memory are M times FedAvg's.

    Args:
        num_clients, num_components: T and M.
        model, task, plan, optimizer, client: see :func:`fedem_client`.
        server: a chain over pseudo-gradients ``[clients, M, ...]``; default plain averaging.
        weighting: ``population`` (default): ``theta + sum over the cohort of n_t / N (theta_t - theta)``, clients that stay away
            counting with the model they were sent, as the authors confirm they intend; ``samples`` renormalises over the cohort.
        fidelity: ``released`` keeps each client's optimiser state from round to round, as the released code does without saying so;
            ``paper`` starts it afresh.
    """
    update = fedem_client(
        model, task, num_components, optimizer, plan, **_resolve_fidelity(fidelity, client)
    )
    return federated(
        init_components(model, num_components),
        update,
        step_from(optax.sgd(1.0)) if server is None else server,
        num_clients=num_clients,
        weighting=weighting,
        execution=execution,
    )


def decentralized_fedem(
    model: Model,
    task: Task,
    *,
    mixing_matrix: jax.Array,
    num_components: int,
    plan: BatchPlan,
    optimizer: optax.GradientTransformation,
    fidelity: str = "paper",
    execution: Execution | None = None,
    **client: Any,
) -> Algorithm:
    """D-FedEM: every client keeps its own components and mixes them with its neighbours' after each local round.

    Args:
        mixing_matrix: ``[clients, clients]``, doubly stochastic on the graph (:mod:`fedjax_mtl.relations.gossip`). The released code's matrix has a zero
            diagonal (a client throws its own model away); ``topology.without_self_loops`` makes it so.
        fidelity: as for :func:`fedem`. Other arguments: see :func:`fedem_client`.
    """
    update = fedem_client(
        model, task, num_components, optimizer, plan, **_resolve_fidelity(fidelity, client)
    )
    return decentralized(
        init_components(model, num_components), update, mixing_matrix, execution=execution
    )
