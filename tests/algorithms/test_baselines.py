"""Every baseline against an independent numpy program, written from its paper.

All in float64, with full batches, on least squares.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_mtl import Solver, algorithms, make_execution, make_federation, server, simulate, tasks
from fedjax_mtl.algorithms._l2sgd import coin_key, geometric
from fedjax_mtl.core import batching, sampling
from fedjax_mtl.models import Model

SIZES = (4, 7, 5)
RNG = np.random.default_rng(5)
XS = [RNG.normal(size=(n, 3)) for n in SIZES]
YS = [RNG.normal(size=(n, 1)) for n in SIZES]
START = RNG.normal(size=(3, 1))
SHARES = np.array(SIZES) / sum(SIZES)
ROUNDS = 4


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def loss(w, t):
    return np.mean(0.5 * np.sum((XS[t] @ w - YS[t]) ** 2, axis=1))


def grad(w, t):
    return XS[t].T @ (XS[t] @ w - YS[t]) / SIZES[t]


def run(algorithm, rounds=ROUNDS, plan_seed=0):
    examples = {"inputs": np.concatenate(XS), "labels": np.concatenate(YS)}
    rows = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    federation = make_federation(examples, rows)
    state = algorithm.init(jax.random.key(0))
    step = jax.jit(algorithm.round)
    cohort = sampling.full_participation()(jax.random.key(0), jnp.int32(0), federation)
    for index in range(rounds):
        state, metrics = step(state, cohort, jax.random.key(index))
    eye = jnp.broadcast_to(jnp.eye(3), (3, 3, 3))
    # The personalised linear models themselves: predictions on unit vectors, [clients, 3, 1].
    return state, metrics, np.asarray(algorithm.predict(state, jnp.arange(3), eye))


def settings(**more):
    return {
        "model": Model(lambda key: jnp.asarray(START), lambda w, x, key=None: x @ w),
        "task": tasks.regression(),
        "num_clients": 3,
        "execution": make_execution("vmap"),
        **more,
    }


def training(steps, rate, **more):
    return settings(solver=Solver(optax.sgd(rate), batching.epochs(steps, None)), **more)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def test_fedavg_and_fedprox():
    for mu in (0.0, 0.7):
        w = START
        for _ in range(ROUNDS):
            local = []
            for t in range(3):
                v = w
                for _ in range(2):
                    v = v - 0.1 * (grad(v, t) + mu * (v - w))
                local.append(v)
            w = sum(s * v for s, v in zip(SHARES, local, strict=True))
        state, _, models = run(algorithms.fedprox(**training(2, 0.1), proximal_strength=mu))
        close(state.params, w)
        close(models, [w] * 3)
    state, _, _ = run(algorithms.fedavg(**training(2, 0.1), weighting="samples"))
    same, _, _ = run(algorithms.fedprox(**training(2, 0.1), proximal_strength=0.0))
    close(state.params, same.params)


def test_fedavg_with_server_adam_is_fedadam():
    adam = optax.chain(server.average_clients(), optax.adam(0.05, b1=0.9, b2=0.99, eps=1e-3))
    state, _, _ = run(algorithms.fedavg(**training(1, 0.1), server=adam))
    w, m, v = START, 0.0, 0.0
    for k in range(1, ROUNDS + 1):
        delta = sum(SHARES[t] * 0.1 * grad(w, t) for t in range(3))
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
        w = w - 0.05 * (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.99**k)) + 1e-3)
    close(state.params, w)


def test_local_and_tuned():
    _, _, models = run(algorithms.local(**training(2, 0.1)))
    for t in range(3):
        w = START
        for _ in range(2 * ROUNDS):
            w = w - 0.1 * grad(w, t)
        close(models[t], w)


def test_tuning_starts_from_the_global_model():
    algorithm = algorithms.fedavg_tuned(**training(1, 0.1), adaptation=batching.epochs(3, None))
    state, _, _ = run(algorithm)
    w = START
    for _ in range(ROUNDS):
        w = w - 0.1 * sum(SHARES[t] * grad(w, t) for t in range(3))
    close(state.params, w)
    examples = {"inputs": np.concatenate(XS), "labels": np.concatenate(YS)}
    newcomer = make_federation(examples, [np.arange(SIZES[0])])
    adapted = algorithm.adapt(state, newcomer, jax.random.key(0))
    for _ in range(3):
        w = w - 0.1 * grad(w, 0)
    close(algorithm.predict(adapted, jnp.array([0]), jnp.eye(3)[None])[0], w)


def test_pfedme_as_published():
    lam, eta, inner, beta = 3.0, 0.1, 0.05, 0.8
    algorithm = algorithms.pfedme(
        **training(2, inner), penalty=lam, learning_rate=eta, inner_steps=4, server_step=beta
    )
    state, _, models = run(algorithm)
    w, theta = START, [START] * 3
    for _ in range(ROUNDS):
        local = []
        for t in range(3):
            v = w
            for _ in range(2):
                for _ in range(4):
                    theta[t] = theta[t] - inner * (grad(theta[t], t) + lam * (theta[t] - v))
                v = v - eta * lam * (v - theta[t])
            local.append(v)
        w = (1 - beta) * w + beta * np.mean(local, axis=0)
    close(state.params, w)
    close(models, theta)


@pytest.mark.parametrize("eta_alpha", [0.0, 0.05])
def test_apfl(eta_alpha):
    algorithm = algorithms.apfl(**training(2, 0.1), alpha=0.3, alpha_learning_rate=eta_alpha)
    state, _, models = run(algorithm)
    w, own, alpha = START, [START] * 3, [0.3] * 3
    for _ in range(ROUNDS):
        local = []
        for t in range(3):
            u = w
            for _ in range(2):
                mixed = alpha[t] * own[t] + (1 - alpha[t]) * u
                g = grad(mixed, t)
                slope = np.sum((own[t] - u) * g)
                u, own[t] = u - 0.1 * grad(u, t), own[t] - 0.1 * alpha[t] * g
                alpha[t] = np.clip(alpha[t] - eta_alpha * slope, 0, 1)
            local.append(u)
        w = sum(s * v for s, v in zip(SHARES, local, strict=True))
    np.testing.assert_allclose(state.params, w, rtol=1e-6)
    expected = [a * v + (1 - a) * w for a, v in zip(alpha, own, strict=True)]
    np.testing.assert_allclose(models, expected, rtol=1e-6)  # alpha is kept in float32


def test_apfl_limits():
    zero, _, _ = run(algorithms.apfl(**training(2, 0.1), alpha=0.0))
    fedavg, _, averaged = run(algorithms.fedavg(**training(2, 0.1)))
    close(zero.params, fedavg.params)
    _, _, alone = run(algorithms.apfl(**training(2, 0.1), alpha=1.0))
    close(alone, run(algorithms.local(**training(2, 0.1)))[2])
    close(run(algorithms.apfl(**training(2, 0.1), alpha=0.0))[2], averaged)


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_l2sgd(fidelity):
    p, rate, lam = 0.4, 0.1, 0.9
    algorithm = algorithms.l2sgd(
        **settings(), learning_rate=rate, penalty=lam, probability=p, fidelity=fidelity
    )
    _, _, models = run(algorithm)
    pull = rate * (1 - p) / p * lam if fidelity == "paper" else 0.0
    theta = [START] * 3
    for index in range(ROUNDS):
        client_round_key, _ = jax.random.split(jax.random.key(index))
        for _ in range(int(geometric(coin_key(client_round_key), p))):
            theta = [v - rate * grad(v, t) for t, v in enumerate(theta)]
        mean = np.mean(theta, axis=0)
        theta = [(1 - pull) * v + pull * mean for v in theta]
    close(models, theta)


def test_the_coin_of_l2sgd_is_geometric():
    draws = jax.vmap(lambda k: geometric(k, 0.25))(jax.random.split(jax.random.key(0), 20000))
    np.testing.assert_allclose(jnp.mean(draws), 3.0, atol=0.1)  # (1 - p) / p
    np.testing.assert_allclose(jnp.mean(draws == 0), 0.25, atol=0.015)


def test_agnostic():
    algorithm = algorithms.agnostic(
        **settings(),
        mixture=jnp.asarray(SHARES),
        optimizer=optax.sgd(0.1),
        mixture_learning_rate=0.3,
    )
    state, _, _ = run(algorithm)
    w, lam = START, SHARES
    for _ in range(ROUNDS):
        step = sum(lam[t] * grad(w, t) for t in range(3))
        v = lam + 0.3 * np.array([loss(w, t) for t in range(3)])
        ordered = np.sort(v)[::-1]
        rho = max(j for j in range(1, 4) if ordered[j - 1] + (1 - ordered[:j].sum()) / j > 0)
        lam = np.maximum(v - (ordered[:rho].sum() - 1) / rho, 0)
        w = w - 0.1 * step
    close(state.params, w)
    close(state.server[0].mixture, lam)


@pytest.mark.parametrize("q", [0.0, 2.0])
def test_q_ffl(q):
    algorithm = algorithms.q_ffl(**settings(plan=batching.epochs(2, None)), learning_rate=0.1, q=q)
    state, _, _ = run(algorithm)
    w = START
    for _ in range(ROUNDS):
        top, bottom = 0.0, 0.0
        for t in range(3):
            v = w
            for _ in range(2):
                v = v - 0.1 * grad(v, t)
            delta, f = (w - v) / 0.1, loss(w, t)
            top = top + f**q * delta
            bottom += q * f ** (q - 1) * np.sum(delta**2) + f**q / 0.1
        w = w - top / bottom
    close(state.params, w)
    if q == 0:
        uniform, _, _ = run(algorithms.fedavg(**training(2, 0.1), weighting="uniform"))
        close(state.params, uniform.params)


def test_released_q_ffl_learns_nothing():
    algorithm = algorithms.q_ffl(
        **settings(plan=batching.epochs(2, None)), learning_rate=0.1, fidelity="released"
    )
    close(run(algorithm)[0].params, START)


def test_one_client_is_centralised_training():
    """FedAvg with one client and one step a round is gradient descent on that client's loss."""
    examples = {"inputs": XS[1], "labels": YS[1]}
    one = make_federation(examples, [np.arange(SIZES[1])])
    arguments = {**training(1, 0.1), "num_clients": 1}
    run_ = simulate(algorithms.fedavg(**arguments), one, num_rounds=5)
    w = START
    for _ in range(5):
        w = w - 0.1 * grad(w, 1)
    close(run_.state.params[0], w)


def test_fedem_with_one_component_is_fedavg():
    one, _, models = run(
        algorithms.fedem(**training(2, 0.1), num_components=1, weighting="samples")
    )
    fedavg, _, averaged = run(algorithms.fedavg(**training(2, 0.1)))
    close(one.params[0], fedavg.params)
    close(models, averaged)


def test_equal_components_stay_equal_and_mixtures_uniform():
    state, _, _ = run(algorithms.fedem(**training(2, 0.1), num_components=3))
    close(state.params[0], state.params[1])  # this model's init ignores its key
    close(state.clients.mixture, np.full((3, 3), 1 / 3))


def test_decentralised_on_the_complete_graph_is_fedavg_over_equal_clients():
    """With W = 1/T everywhere, D-SGD's gossip is the server's mean."""
    gossip = algorithms.decentralized_fedem(
        **training(2, 0.1), num_components=1, mixing_matrix=jnp.full((3, 3), 1 / 3)
    )
    state, _, _ = run(gossip)
    uniform, _, _ = run(algorithms.fedavg(**training(2, 0.1), weighting="uniform"))
    close(state.params[:, 0], [uniform.params] * 3)
