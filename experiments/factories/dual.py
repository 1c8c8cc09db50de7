"""MOCHA and what it is compared with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.parts import Parts
from experiments.settings import choose
from fedjax_mtl import Algorithm, algorithms
from fedjax_mtl.relations import covariance
from fedjax_mtl.relations.covariance import Relationship


def _settings(parts: Parts, penalty: float) -> dict[str, Any]:
    """What all dual methods take; local training by batches is not among it."""
    parts.refuse_client_settings(
        "MOCHA and its kin do not train by batches, work is set by config.algorithm's passes"
    )
    if parts.problem.dual_loss is None:
        raise ValueError(
            "MOCHA and its kin need data with a dual loss; use one of the data sets related_tasks, task_table, human_activity"
        )
    train = parts.problem.splits.train
    return {
        "loss": parts.problem.dual_loss,
        "sizes": train.sizes,
        "capacity": train.capacity,
        "features": parts.problem.input_shape[0],
        "penalty": penalty,
        "dtype": jnp.float64 if jax.config.jax_enable_x64 else jnp.float32,
    }


def make_relationship(
    penalty: float,
    *,
    relation: str,
    coupling: float,
    ridge: float,
    num_clusters: int,
    sparsity: float,
) -> Relationship:
    """Sigma by name; ``ridge`` and ``coupling`` as the rule reads them."""
    table = {
        "independent": lambda: covariance.independent(),
        "mean": lambda: covariance.mean_regularised(penalty, coupling, ridge),
        "learned": lambda: covariance.task_relationship(ridge),
        "clustered": lambda: covariance.clustered(num_clusters),
        "sparse": lambda: covariance.sparse_precision(penalty, sparsity, ridge=ridge),
    }
    return choose(table, relation, "relation")()


def _mocha(
    parts: Parts,
    *,
    penalty: float,
    relation: str,
    relationship_every: int = 0,
    coupling: float = 1.0,
    ridge: float = 0.0,
    num_clusters: int = 2,
    sparsity: float = 0.1,
    passes: float = 1.0,
    sigma_prime: str = "row_sum",
    aggregation: float = 1.0,
    fidelity: str = "paper",
) -> Algorithm:
    return algorithms.mocha(
        **_settings(parts, penalty),
        relationship=make_relationship(
            penalty,
            relation=relation,
            coupling=coupling,
            ridge=ridge,
            num_clusters=num_clusters,
            sparsity=sparsity,
        ),
        relationship_every=relationship_every or None,
        passes=passes,
        sigma_prime=sigma_prime,
        aggregation=aggregation,
        fidelity=fidelity,
        measure_inexactness=True,
    )


def _cocoa(
    parts: Parts,
    *,
    penalty: float,
    relation: str,
    relationship_every: int = 0,
    coupling: float = 1.0,
    ridge: float = 0.0,
    inexactness: float = 0.5,
    max_passes: int = 50,
) -> Algorithm:
    return algorithms.cocoa(
        **_settings(parts, penalty),
        relationship=make_relationship(
            penalty, relation=relation, coupling=coupling, ridge=ridge, num_clusters=2, sparsity=0.1
        ),
        relationship_every=relationship_every or None,
        inexactness=inexactness,
        max_passes=max_passes,
    )


def _minibatch(
    factory: Callable[..., Algorithm], default_scaling: float
) -> Callable[..., Algorithm]:
    def make(
        parts: Parts,
        *,
        penalty: float,
        relation: str,
        coupling: float = 1.0,
        ridge: float = 0.0,
        passes: float = 1.0,
        scaling: float = default_scaling,
    ) -> Algorithm:
        return factory(
            **_settings(parts, penalty),
            relationship=make_relationship(
                penalty,
                relation=relation,
                coupling=coupling,
                ridge=ridge,
                num_clusters=2,
                sparsity=0.1,
            ),
            passes=passes,
            scaling=scaling,
        )

    return make


def _alone(factory: Callable[..., Algorithm]) -> Callable[..., Algorithm]:
    def make(
        parts: Parts, *, penalty: float, passes: float = 1.0, fidelity: str = "paper"
    ) -> Algorithm:
        return factory(**_settings(parts, penalty), passes=passes, fidelity=fidelity)

    return make


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "cocoa": _cocoa,
    "global_model": _alone(algorithms.global_model),
    "local_models": _alone(algorithms.local_models),
    "minibatch_sdca": _minibatch(algorithms.minibatch_sdca, 10.0),
    "minibatch_sgd": _minibatch(algorithms.minibatch_sgd, 0.1),
    "mocha": _mocha,
}
