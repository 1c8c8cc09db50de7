"""What the experiments share: parsing of variants, and FedEM's settings."""

from typing import Any

import ml_collections
from ml_collections import ConfigDict


def parse_variant(variant: str | None, **known: Any) -> ConfigDict:
    """``configs/NAME.py:quick`` or ``:quick,num_clients=20`` to a ConfigDict of the known options.

    Raises:
        ValueError: an option that is not known, or a value of another type.
    """
    options = ConfigDict(known)
    for part in filter(None, (variant or "").split(",")):
        name, _, text = part.partition("=")
        if name not in known:
            raise ValueError(f"unknown variant {name!r}; known: {', '.join(sorted(known))}")
        kind = type(known[name])
        if kind is bool:
            options[name] = text.lower() not in ("0", "false", "no")
        else:
            options[name] = kind(text)
    return options


def experiment(
    *,
    data: dict[str, Any],
    model: dict[str, Any],
    algorithm: dict[str, Any],
    num_rounds: int,
    eval_every: int,
    client: dict[str, Any] | None = None,
    **fields: Any,
) -> ml_collections.ConfigDict:
    """A whole config. Every field can be overridden on the command line, ``--config.client.epochs=5``."""
    config = ConfigDict()
    config.data = ConfigDict(data)
    config.model = ConfigDict(model)
    config.algorithm = ConfigDict(algorithm)
    config.client = ConfigDict(
        {
            "batch_size": 128,  # 0: the whole local set
            "epochs": 1,  # local epochs, or
            "steps": 0,  # local steps
            "name": "sgd",
            "momentum": 0.0,
            "weight_decay": 0.0,
            "max_norm": 0.0,  # gradients are cut to this length; 0: never
            "schedule": "constant",
            "keep_optimizer": False,
            **(client or {}),
        }
    )
    # mode: auto, vmap, map, chunk (with chunk clients at a time) or loop; chunk 0 is none.
    # precision: single, or double for optimisation to small gaps.
    config.execution = ConfigDict(
        {"mode": "auto", "chunk": 0, "num_devices": 1, "precision": "single"}
    )
    # Failures and stragglers: a client drops out of a round with drop_probability; it makes at most a share, uniform in low..high, of one pass of
    # single examples (low = high = 1: no limit), of its own or of the smallest client's.
    config.systems = ConfigDict(
        {"drop_probability": 0.0, "low": 1.0, "high": 1.0, "of_smallest": False}
    )
    config.cohort_size = 0  # 0: everybody
    config.num_rounds = num_rounds
    config.eval_every = eval_every
    config.checkpoint_every = eval_every
    config.evaluation_batch_size = 256
    config.seeds = (0, 1, 2)
    for name in ("execution", "systems"):
        config[name].update(fields.pop(name, {}))
    config.update(fields)
    return config


def baselines(**learning_rates: float) -> dict[str, Any]:
    """Settings of FedEM and its baselines; pick one with ``--config.algorithm.name``.

    Args:
        learning_rates: by algorithm; ``default`` for those not named.
    """
    settings: dict[str, Any] = {
        "agnostic": {"mixture_learning_rate": 0.001},
        "apfl": {"alpha": 0.5, "alpha_learning_rate": 0.0},
        "clustered": {"mean_below": 0.4, "largest_above": 1.6, "fidelity": "paper"},
        "decentralized_fedem": {
            "num_components": 3,
            "graph": "erdos_renyi",
            "edge_probability": 0.5,
            "weights": "fastest",
            "graph_seed": 0,
            "self_loops": True,
        },
        "fedavg": {"weighting": "samples"},
        "fedavg_tuned": {"adaptation_epochs": 1},
        "fedem": {
            "num_components": 3,
            "adaptation_iterations": 10,
            "weighting": "population",
            "fidelity": "paper",
        },
        "fedprox": {"proximal_strength": 0.1},
        "l2sgd": {"penalty": 0.1, "probability": 0.1, "fidelity": "paper"},
        "local": {},
        "pfedme": {
            "penalty": 15.0,
            "inner_learning_rate": 0.05,
            "inner_steps": 5,
            "server_step": 1.0,
            "fidelity": "paper",
        },
        "q_ffl": {"q": 1.0, "fidelity": "paper"},
    }
    for name, own in settings.items():
        own["learning_rate"] = learning_rates.get(name, learning_rates["default"])
    settings["name"] = "fedem"
    return settings


def _gradnorm(**changes: Any) -> dict[str, Any]:
    return {
        "learning_rate": 0.01,
        "head_learning_rate": 0.02,
        "head_steps": 5,
        "server_learning_rate": 0.01,
        "weight_learning_rate": 0.02,
        "exponent": 0.6,
        "minimum": 0.01,
        **changes,
    }


def gradnorm_algorithms() -> dict[str, Any]:
    """FedGradNorm, its twin with equal weights (Adam on both servers), FedRep and FedPer with plain averaging, local."""
    readings = {"norms": "update", "loss_point": "shared", "local_weighting": False}
    return {
        "name": "fedgradnorm",
        "fedgradnorm": _gradnorm(**readings),
        "equal_weights": _gradnorm(),
        "fedrep": {"learning_rate": 0.02, "head_steps": 5},
        "fedper": {"learning_rate": 0.02},
        "local": {"learning_rate": 0.02},
    }


def hota_algorithms(noise: float, fading: tuple[float, ...]) -> dict[str, Any]:
    """HOTA-FedGradNorm and its twin with equal weights over the same channel."""
    channel = {"num_clusters": len(fading), "threshold": 0.032, "fading": fading, "noise": noise}
    return {
        "name": "hota_fedgradnorm",
        "hota_fedgradnorm": _gradnorm(**channel),
        "hota_equal_weights": _gradnorm(**channel),
    }


def population_algorithms(
    name: str, *, learning_rate: float, shared: str = "all"
) -> dict[str, Any]:
    """Systems and baselines for clients with different tasks; ``shared`` is what FedAvg and its kin average, ``all`` or ``encoder``."""

    def averaging(**changes: Any) -> dict[str, Any]:
        return {
            "learning_rate": learning_rate,
            "shared": shared,
            "keep": 1.0,  # FedDEA's share of kept coordinates; 1: plain averaging
            "rescale": "l1",
            "denominator": "all",
            "scope": "global",
            "server_optimizer": "sgd",
            "server_step": 1.0,
            "proximal_strength": 0.0,
            "weighting": "uniform",
            **changes,
        }

    return {
        "name": name,
        "fedavg": averaging(),
        "feddea": averaging(keep=0.2),
        "fedprox": averaging(proximal_strength=0.05),
        "fedadam": averaging(server_optimizer="adam", server_step=0.03),
        "fedper": averaging(shared="encoder"),
        "fedrep": {"learning_rate": learning_rate, "head_steps": 5, "weighting": "uniform"},
        "local": {"learning_rate": learning_rate},
        "fedbone": {
            "learning_rate": learning_rate,
            "trunk_learning_rate": learning_rate,
            "trunk_optimizer": "adam",
            "drift_learning_rate": 0.001,  # of the copies, with schedule drift
            "attention": "softmax_cosine",
            "project": True,
            "order": "index",
            "schedule": "step",
            "embedding_sync": "fedavg",
            "weighting": "uniform",
        },
    }


def dual_algorithms(
    name: str, *, penalty: float, relation: str, every: int = 0, **rule: Any
) -> dict[str, Any]:
    """MOCHA and what it is compared with, on one problem; ``rule`` are settings of the relation."""
    shared = {"penalty": penalty, "relation": relation, "coupling": 1.0, "ridge": 0.0, **rule}
    learning = {**shared, "relationship_every": every}
    return {
        "name": name,
        "mocha": {
            **learning,
            "passes": 1.0,
            "num_clusters": 2,
            "sparsity": 0.1,
            "sigma_prime": "row_sum",
            "aggregation": 1.0,
            "fidelity": "paper",
        },
        "cocoa": {**learning, "inexactness": 0.5, "max_passes": 50},
        "minibatch_sdca": {**shared, "passes": 1.0, "scaling": 10.0},
        "minibatch_sgd": {**shared, "passes": 1.0, "scaling": 0.1},
        "local_models": {"penalty": penalty, "passes": 1.0, "fidelity": "paper"},
        "global_model": {"penalty": penalty, "passes": 1.0, "fidelity": "paper"},
    }


def preparation(loss: str, *, seed: int, **changes: Any) -> dict[str, Any]:
    """How a table of linear tasks is split and prepared."""
    return {
        "loss": loss,
        "train_share": 0.75,
        "skewed": False,
        "keep_order": False,  # of the table, in each part, as MOCHA's released code
        "standardise": "no",  # pooled or per_task
        "intercept": 0.0,  # the value of an appended column; 0: none
        "fourier_features": 0,  # random features of a Gaussian kernel; 0: the inputs as they are
        "bandwidth": 1.0,
        "one_class": "refuse",  # what to do with a task of one class: refuse or keep
        "seed": seed,
        **changes,
    }


def adapter_algorithms(
    name: str,
    *,
    learning_rate: float,
    prompt_learning_rate: float,
    strength: float,
    graph: str,
    **lora: Any,
) -> dict[str, Any]:
    """MIRA and what it is compared with; ``lora`` are the adapters' targets, rank, alpha, dropout and deviation."""
    tuning = {"learning_rate": learning_rate, "dropout": 0.0, "deviation": 0.0, **lora}
    return {
        "name": name,
        "mira": {
            **tuning,
            "graph": graph,  # group, random, complete, learned or updates
            "graph_seed": 0,
            "smoothness": 0.5,
            "strength": strength,  # eta x lambda
            "neighbours": "sampled",  # or all
        },
        "fedit": tuning,
        "local_adapters": tuning,
        "fedptuning": {"learning_rate": prompt_learning_rate, "num_tokens": 20, "hidden": 128},
    }


def relational_algorithms(learning_rate: float) -> dict[str, Any]:
    """Systems in which every client keeps a model of its own and the server relates them."""
    return {
        "ditto": {"learning_rate": learning_rate, "penalty": 0.5},
        "fedamp": {
            "learning_rate": learning_rate,
            "penalty": 0.01,
            "scale": 0.01,
            "bandwidth": "median",
            "clip": True,
            "fidelity": "paper",
        },
        "fedhca2": {
            "learning_rate": learning_rate,
            "alpha": 0.4,
            "initial": 0.1,
            "hyper_learning_rate": 0.01,
        },
        "fedmtl": {
            "learning_rate": learning_rate,
            "penalty": 0.0,
            "regulariser": "sum",
            "fidelity": "paper",
        },
        "fedu": {
            "learning_rate": learning_rate,
            "graph": "learned",
            "graph_seed": 0,
            "smoothness": 0.5,
            "strength": 0.3,
            "neighbours": "all",
        },
        "matfl": {
            "learning_rate": learning_rate,
            "num_clusters": 3,
            "soft": False,
            "threshold": 0.0,
            "whole_model": True,
        },
        "sheaf_fmtl": {
            "learning_rate": learning_rate,
            # The maps hold 2 x edges x compression x parameters^2 numbers.
            "graph": "erdos_renyi",
            "edge_probability": 0.1,
            "graph_seed": 0,
            "strength": 0.01,
            "map_step": 0.001,
            "compression": 0.005,
        },
    }


def fedem_training() -> dict[str, Any]:
    """Local training in FedEM's experiments: batch 128, one epoch, momentum 0.9, weight decay 5e-4, tenfold decay at 1/2 and 3/4.

    The released code keeps each client's momentum from round to round, without the paper saying so; ``--config.client.keep_optimizer=True`` does too.
    """
    return {
        "batch_size": 128,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "multi_step",
    }


def image_experiment(
    source: str,
    *,
    quick: bool,
    fraction: float,
    partition: str,
    num_clients: int,
    **learning_rates: float,
) -> ml_collections.ConfigDict:
    """FedEM on an image set that TFDS has prepared: the released CNN, 200 rounds, a fifth of the clients held out.

    ``quick`` takes a twentieth of the images, 10 clients and a small CNN.
    """
    data = {
        "name": "images",
        "source": source,
        "data_dir": "",  # empty: TFDS's own default
        "fraction": fraction / 20 if quick else fraction,
        "partition": partition,
        "num_clients": 10 if quick else num_clients,
        "num_groups": 0,  # groups of labels that are dealt together; 0: every label its own
        "alpha": 0.4,
        "beta": 10.0,
        "test_fraction": 0.2,
        "unseen_fraction": 0.2,
        "seed": 12345,
    }
    model = {"name": "cnn", "channels": (32, 64), "kernel": 5, "hidden": 2048}
    return experiment(
        data=data,
        model=model | ({"channels": (8, 16), "hidden": 64} if quick else {}),
        algorithm=baselines(**learning_rates),
        client=fedem_training(),
        num_rounds=2 if quick else 200,
        eval_every=1 if quick else 10,
        seeds=(0,) if quick else (0, 1, 2),
    )
