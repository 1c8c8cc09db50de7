"""FedGradNorm, its wireless hierarchy, and their twins with equal weights."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.parts import Parts
from fedjax_mtl import Algorithm, algorithms
from fedjax_mtl.core import batching, trees


def _gradnorm_settings(
    parts: Parts,
    *,
    learning_rate: float,
    head_learning_rate: float,
    head_steps: int,
    server_learning_rate: float,
    weight_learning_rate: float,
    exponent: float,
    minimum: float,
    dynamic: bool,
) -> dict[str, Any]:
    """Of FedGradNorm on a body and a head: norms at the body's last layer, Adam on the server, plain SGD on the clients."""
    parts.refuse_client_settings("FedGradNorm's clients train by plain SGD at a constant rate")
    last = f"dense_{len(_layers(parts)) - 1}"
    return {
        "model": parts.model,
        "task": parts.problem.task,
        "head": trees.under("decoder"),
        "head_plan": batching.steps(head_steps, parts.plan.batch_size),
        "plan": parts.plan,
        "head_learning_rate": head_learning_rate,
        "learning_rate": learning_rate,
        "server_optimizer": optax.adam(server_learning_rate),
        "weight_learning_rate": weight_learning_rate,
        "exponent": exponent,
        "measured": lambda path: last in path and path[-1] == "kernel",
        "dynamic": dynamic,
        "minimum": minimum,
        "execution": parts.execution,
    }


def _layers(parts: Parts) -> list[str]:
    params = jax.eval_shape(parts.model.init, jax.random.key(0))
    if "encoder" not in params or "decoder" not in params:
        raise ValueError(
            "FedGradNorm needs a model with encoder and decoder; use --config.model.name=body_and_head"
        )
    return sorted(params["encoder"])


def _fedgradnorm(
    parts: Parts,
    *,
    learning_rate: float,
    head_learning_rate: float = 0.02,
    head_steps: int = 5,
    server_learning_rate: float = 0.01,
    weight_learning_rate: float = 0.02,
    exponent: float = 0.6,
    minimum: float = 0.01,
    dynamic: bool = True,
    norms: str = "update",
    loss_point: str = "shared",
    local_weighting: bool = False,
) -> Algorithm:
    settings = _gradnorm_settings(
        parts,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        head_steps=head_steps,
        server_learning_rate=server_learning_rate,
        weight_learning_rate=weight_learning_rate,
        exponent=exponent,
        minimum=minimum,
        dynamic=dynamic,
    )
    return algorithms.fedgradnorm(
        **settings,
        num_clients=parts.num_clients,
        norms=norms,
        loss_point=loss_point,
        local_weighting=local_weighting,
    )


def _hota_fedgradnorm(
    parts: Parts,
    *,
    learning_rate: float,
    num_clusters: int,
    threshold: float = 0.032,
    fading: tuple[float, ...] = (1.0,),
    noise: float = 0.001,
    head_learning_rate: float = 0.02,
    head_steps: int = 5,
    server_learning_rate: float = 0.01,
    weight_learning_rate: float = 0.02,
    exponent: float = 0.6,
    minimum: float = 0.01,
    dynamic: bool = True,
) -> Algorithm:
    if parts.num_clients % num_clusters or len(fading) not in (1, num_clusters):
        raise ValueError(
            f"config.algorithm.hota_fedgradnorm has num_clusters={num_clusters} and fading of {len(fading)} for "
            f"{parts.num_clients} clients; clusters must divide clients, fading be one number or one a cluster"
        )
    settings = _gradnorm_settings(
        parts,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        head_steps=head_steps,
        server_learning_rate=server_learning_rate,
        weight_learning_rate=weight_learning_rate,
        exponent=exponent,
        minimum=minimum,
        dynamic=dynamic,
    )
    return algorithms.hota_fedgradnorm(
        **settings,
        num_clusters=num_clusters,
        cluster_size=parts.num_clients // num_clusters,
        threshold=threshold,
        fading=jnp.asarray(fading if len(fading) > 1 else fading[0]),
        noise=noise,
    )


def _equal(factory: Callable[..., Algorithm]) -> Callable[..., Algorithm]:
    """The twin with equal static weights, of the same settings."""

    @functools.wraps(factory)
    def make(parts: Parts, **settings: Any) -> Algorithm:
        return factory(parts, **settings | {"dynamic": False})

    return make


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "equal_weights": _equal(_fedgradnorm),
    "fedgradnorm": _fedgradnorm,
    "hota_equal_weights": _equal(_hota_fedgradnorm),
    "hota_fedgradnorm": _hota_fedgradnorm,
}
