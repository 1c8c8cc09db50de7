"""FedEM: federated multi-task learning under a mixture of distributions.

Marfoq, Neglia, Bellet, Kameni, Vidal, NeurIPS 2021, arXiv 2108.10252. Each client's distribution is
a mixture, with its own weights pi_t, of M underlying ones that share the inputs' marginal.
Component m is a model theta_m that all clients train together. Algorithm 1 (client-server) and
D-FedEM (over a graph) are the two general compositions around one client update,
:func:`fedem_client`.

Shapes: M components, leaves of ``params`` are ``[M, ...]``; responsibilities ``[M, capacity]``;
mixture weights ``[M]`` a client.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.clients.training import Losses, Solver, Trained, local_losses, loss_gradient, train
from fedjax_mtl.clients.updates import ClientResult, ClientUpdate
from fedjax_mtl.core.algorithm import Algorithm
from fedjax_mtl.core.checks import InputError, check_fidelity
from fedjax_mtl.core.federation import ClientView
from fedjax_mtl.core.model import Model
from fedjax_mtl.core.task import Task, example_losses
from fedjax_mtl.execution import Execution
from fedjax_mtl.rounds.engine import Weighting
from fedjax_mtl.rounds.federated import federated
from fedjax_mtl.rounds.groups import Counts, Group, Models, Server, Tasks, each_group
from fedjax_mtl.rounds.wrappers import decentralized
from fedjax_mtl.server import step_from

PyTree = Any

# log(0) would make a component's responsibility NaN where all others are 0 too.
_SMALLEST_WEIGHT = 1e-30


class FedEMClientState(NamedTuple):
    """What a FedEM client keeps.

    Attributes:
        mixture: its mixture weights pi, ``[M]``.
        optimizer: the components' optimiser states, leaves ``[M, ...]``, or ``()`` where they start
            afresh in every round.
    """

    mixture: jax.Array
    optimizer: Any


def responsibilities(losses: jax.Array, mixture: jax.Array) -> jax.Array:
    """The E-step, in log space: ``q[m, i] = softmax_m(log pi[m] - loss[m, i])``.

    The shapes are ``[M, n], [M] -> [M, n]``.
    """
    log_prior = jnp.log(jnp.maximum(mixture, _SMALLEST_WEIGHT))
    return jax.nn.softmax(log_prior[:, None] - losses, axis=0)


def update_mixture(q: jax.Array, mask: jax.Array, mixture: jax.Array) -> jax.Array:
    """The M-step for pi: the mean responsibility over real examples, ``[M, n], [n] -> [M]``.

    Without examples pi stays.
    """
    count = jnp.sum(mask)
    mean = jnp.sum(jnp.where(mask, q, 0), axis=1) / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, mixture).astype(mixture.dtype)


class MixtureTraining(NamedTuple):
    """What :func:`fedem_client` was asked for; its arguments explain each."""

    model: Model
    task: Task
    losses: Losses
    solver: Solver
    component_scales: jax.Array
    adaptation_iterations: int
    evaluation_batch_size: int | None

    @property
    def num_components(self) -> int:
        """M."""
        return self.component_scales.shape[0]

    def uniform(self) -> jax.Array:
        """The mixture weights that everybody starts with, ``[M]``."""
        return jnp.full((self.num_components,), 1.0 / self.num_components)

    def component_losses(self, params: PyTree, client: ClientView) -> jax.Array:
        """The loss of every component on every local example, ``[M, capacity]``."""
        of_components = jax.vmap(self.losses, in_axes=(0, None, None), out_axes=1)
        return local_losses(of_components, params, client, self.evaluation_batch_size).T


def fedem_client(
    model: Model,
    task: Task,
    num_components: int,
    solver: Solver,
    *,
    component_scales: jax.Array | None = None,
    adaptation_iterations: int = 10,
    evaluation_batch_size: int | None = 1024,
) -> ClientUpdate:
    """FedEM's client (algorithm 1, lines 4-9): E-step on all local data, pi, then local SGD.

    All start from the received theta and the old pi: first q, then pi, then the components, each on
    its own weighted loss ``1/|B| sum_i q[m, i] loss_i``, with q frozen for the whole round. Every
    component shuffles for itself, as in the released code: on its synthetic data, components that
    see the same minibatches stay alike for longer and end in poorer optima.

    Args:
        model: one component.
        task: of every component; its loss must be a negative log-likelihood.
        num_components: M.
        solver: local training of each component. Its optimiser starts afresh in every round unless
            ``keep_optimizer``, as in the released code.
        component_scales: ``[M]`` factors on the learning rate, one a component.
        adaptation_iterations: EM iterations on pi alone for a newcomer, from uniform.
        evaluation_batch_size: examples whose losses are computed at once in the E-step; None takes
            all.

    Raises:
        InputError: no component, or not one factor a component.
    """
    if num_components < 1:
        raise InputError(f"num_components is {num_components}; a mixture needs at least 1")
    scales = jnp.ones(num_components) if component_scales is None else jnp.asarray(component_scales)
    if scales.shape != (num_components,):
        raise InputError(
            f"component_scales has shape {scales.shape}; give one factor for each of the "
            f"{num_components} components"
        )
    training = MixtureTraining(
        model=model,
        task=task,
        losses=example_losses(model, task),
        solver=solver,
        component_scales=scales,
        adaptation_iterations=adaptation_iterations,
        evaluation_batch_size=evaluation_batch_size,
    )
    return ClientUpdate(
        init=functools.partial(_init_client, training),
        update=functools.partial(_update_client, training),
        predict=functools.partial(_predict_mixture, training),
        adapt=functools.partial(_adapt_mixture, training),
    )


def _init_optimizers(training: MixtureTraining, params: PyTree) -> optax.OptState:
    return jax.vmap(training.solver.optimizer.init)(params)


def _init_client(training: MixtureTraining, params: PyTree) -> FedEMClientState:
    keeps = training.solver.keep_optimizer
    return FedEMClientState(training.uniform(), _init_optimizers(training, params) if keeps else ())


def _is_real(client: ClientView) -> jax.Array:
    """Which positions hold examples of the client, bool ``[capacity]``."""
    return jnp.arange(client.rows.shape[0]) < client.size


def _update_client(
    training: MixtureTraining,
    params: PyTree,
    state: FedEMClientState,
    client: ClientView,
    key: jax.Array,
) -> ClientResult:
    q = responsibilities(training.component_losses(params, client), state.mixture)
    mixture = update_mixture(q, _is_real(client), state.mixture)
    keeps = training.solver.keep_optimizer
    starts = state.optimizer if keeps else _init_optimizers(training, params)
    trained = _train_components(training, params, starts, q, client, key)
    kept = FedEMClientState(mixture, trained.optimizer if keeps else ())
    metrics = {"loss": jnp.sum(trained.loss), "num_steps": trained.num_steps[0]}
    return ClientResult(optax.tree.sub(params, trained.params), kept, metrics)


def _train_components(
    training: MixtureTraining,
    params: PyTree,
    optimizer_states: optax.OptState,
    q: jax.Array,
    client: ClientView,
    key: jax.Array,
) -> Trained:
    """Local training of every component on the loss weighted by its ``q``; leaves ``[M, ...]``."""
    solver, gradient = training.solver, loss_gradient(training.losses)

    def train_component(theta, optimizer_state, weights, scale, component_key):
        return train(
            gradient,
            solver.optimizer,
            solver.plan,
            theta,
            optimizer_state,
            client,
            component_key,
            example_weights=weights,
            step_scale=scale,
        )

    keys = jax.random.split(key, training.num_components)
    scales = training.component_scales * solver.step_scale(client.round)
    return jax.vmap(train_component)(params, optimizer_states, q, scales, keys)


def _predict_mixture(
    training: MixtureTraining, params: PyTree, state: FedEMClientState, inputs: jax.Array
) -> jax.Array:
    outputs = jax.vmap(training.model.apply, in_axes=(0, None, None))(params, inputs, None)
    return training.task.mix(outputs, state.mixture)


def _adapt_mixture(
    training: MixtureTraining, params: PyTree, client: ClientView, key: jax.Array
) -> FedEMClientState:
    del key
    losses, mask = training.component_losses(params, client), _is_real(client)

    def iterate(_, mixture):
        return update_mixture(responsibilities(losses, mixture), mask, mixture)

    count = training.adaptation_iterations
    mixture = jax.lax.fori_loop(0, count, iterate, training.uniform())
    return _init_client(training, params)._replace(mixture=mixture)


def init_components(model: Model, num_components: int) -> Callable[[jax.Array], PyTree]:
    """Returns ``key -> params`` with leaves ``[M, ...]``.

    Components differ only through their initialisation, so each has its own key.
    """

    def init(key):
        return jax.vmap(model.init)(jax.random.split(key, num_components))

    return init


def _groups(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    num_components: int,
    component_scales: jax.Array | None,
    adaptation_iterations: int,
    evaluation_batch_size: int | None,
    fidelity: str,
) -> Group | dict[str, Group]:
    """The clients of :func:`fedem` and :func:`decentralized_fedem`."""
    check_fidelity(fidelity)

    def make_client(model, task):
        return fedem_client(
            model,
            task,
            num_components,
            solver.keeping(fidelity == "released"),
            component_scales=component_scales,
            adaptation_iterations=adaptation_iterations,
            evaluation_batch_size=evaluation_batch_size,
        )

    def make_init(model):
        return init_components(model, num_components)

    return each_group(model, task, num_clients, make_client, make_init)


def fedem(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    num_components: int = 3,
    server: Server | None = None,
    weighting: Weighting = "population",
    component_scales: jax.Array | None = None,
    adaptation_iterations: int = 10,
    evaluation_batch_size: int | None = 1024,
    fidelity: str = "paper",
    execution: Execution | None = None,
) -> Algorithm:
    """FedEM, client-server (algorithm 1).

    With one component it is FedAvg. ``predict`` mixes the components' predictive distributions with
    the client's own pi; ``adapt`` learns only pi. Communication and memory are M times FedAvg's.

    Args:
        model: as for :func:`fedavg`; one component.
        task: as for :func:`fedavg`; its loss must be a negative log-likelihood.
        num_clients: as for :func:`fedavg`; the paper's T.
        solver: as for :func:`fedem_client`.
        num_components: M; the paper takes 3.
        server: a chain over pseudo-gradients ``[clients, M, ...]``; default plain averaging.
        weighting: ``population`` (default): ``theta + sum over the cohort of n_t / N (theta_t -
            theta)``, clients that stay away counting with the model they were sent, as the authors
            confirm they intend; ``samples`` renormalises over the cohort.
        component_scales: as for :func:`fedem_client`.
        adaptation_iterations: as for :func:`fedem_client`.
        evaluation_batch_size: as for :func:`fedem_client`.
        fidelity: ``released`` keeps each client's optimiser state from round to round, as the
            released code does without saying so; ``paper`` starts it afresh. A solver that says
            ``keep_optimizer`` itself decides in both.
        execution: as for :func:`fedavg`.
    """
    groups = _groups(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        num_components=num_components,
        component_scales=component_scales,
        adaptation_iterations=adaptation_iterations,
        evaluation_batch_size=evaluation_batch_size,
        fidelity=fidelity,
    )
    return federated(
        groups,
        step_from(optax.sgd(1.0)) if server is None else server,
        weighting=weighting,
        execution=execution,
    )


def decentralized_fedem(
    model: Models,
    task: Tasks,
    *,
    num_clients: Counts,
    solver: Solver,
    mixing_matrix: jax.Array,
    num_components: int = 3,
    component_scales: jax.Array | None = None,
    adaptation_iterations: int = 10,
    evaluation_batch_size: int | None = 1024,
    fidelity: str = "paper",
    execution: Execution | None = None,
) -> Algorithm:
    """D-FedEM: every client keeps its own components and mixes them with its neighbours'.

    It does so after each local round.

    Args:
        model: as for :func:`fedem`.
        task: as for :func:`fedem`.
        num_clients: as for :func:`fedem`.
        solver: as for :func:`fedem`.
        mixing_matrix: ``[clients, clients]``, doubly stochastic on the graph
            (:mod:`fedjax_mtl.relations.gossip`). The released code's matrix has a zero diagonal (a
            client throws its own model away); ``gossip.without_self_loops`` makes it so.
        num_components: as for :func:`fedem`.
        component_scales: as for :func:`fedem`.
        adaptation_iterations: as for :func:`fedem`.
        evaluation_batch_size: as for :func:`fedem`.
        fidelity: as for :func:`fedem`.
        execution: as for :func:`fedem`.
    """
    groups = _groups(
        model,
        task,
        num_clients=num_clients,
        solver=solver,
        num_components=num_components,
        component_scales=component_scales,
        adaptation_iterations=adaptation_iterations,
        evaluation_batch_size=evaluation_batch_size,
        fidelity=fidelity,
    )
    return decentralized(groups, mixing_matrix, execution=execution)
