"""What the experiments share: parsing of variants, and FedEM's settings."""

from typing import Any

from ml_collections import ConfigDict

from experiments.fields import with_fields
from fedjax_mtl.core.checks import InputError


def parse_variant(variant: str | None, **known: Any) -> ConfigDict:
    """``configs/NAME.py:quick`` or ``:quick,num_clients=20`` to a ConfigDict of the known options.

    Raises:
        InputError: an option that is not known, or a value of another type.
    """
    options = ConfigDict(known)
    for part in filter(None, (variant or "").split(",")):
        name, _, text = part.partition("=")
        if name not in known:
            raise InputError(f"unknown variant {name!r}; known: {', '.join(sorted(known))}")
        kind = type(known[name])
        if kind is bool:
            options[name] = text.lower() not in ("0", "false", "no")
        else:
            options[name] = kind(text)
    return options


def experiment(**said: Any) -> ConfigDict:
    """A whole config, from what differs from the defaults.

    Every field, said here or not, can be changed on the command line:
    ``--config.client.epochs=5``, ``--config.algorithm.fedem.num_components=2``.

    Args:
        said: the sections ``data``, ``model``, ``algorithm``, ``client``, ``pretraining``,
            ``execution`` and ``systems``, see :mod:`experiments.plan`, and the fields of
            :class:`experiments.plan.Course`.
    """
    return with_fields(said)


def baselines(*, learning_rate: float, **others: float) -> dict[str, Any]:
    """FedEM and what it is compared with; pick one with ``--config.algorithm.name``.

    The proximal optimisers of FedProx and pFedMe have no momentum. L2SGD and q-FFL are plain SGD,
    and agnostic learning makes one step a round.

    Args:
        learning_rate: of whoever is not named, as ``config.client.learning_rate``.
        others: learning rates by algorithm.
    """
    plain = {"momentum": 0.0, "weight_decay": 0.0}
    settings: dict[str, Any] = {
        "agnostic": {"schedule": "constant"},
        "decentralized_fedem": {"mixing_matrix": "fastest(graph=erdos_renyi)"},
        "fedprox": {"momentum": 0.0},
        "l2sgd": {"penalty": 0.1, **plain},
        "pfedme": {
            "learning_rate": learning_rate,
            "solver": {"learning_rate": 0.05, "momentum": 0.0},
        },
        "q_ffl": plain,
    }
    for name, rate in others.items():
        settings[name] = {**settings.get(name, {}), "learning_rate": rate}
    return {"name": "fedem", **settings}


def fedem_training(learning_rate: float) -> dict[str, Any]:
    """Local training in FedEM's experiments: momentum 0.9, tenfold decay at 1/2 and 3/4.

    The released code keeps each client's momentum from round to round, without the paper saying
    so; ``--config.client.keep_optimizer=True`` does too.

    Args:
        learning_rate: of the algorithms without one of their own.
    """
    return {
        "learning_rate": learning_rate,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "multi_step",
    }


def image_experiment(
    data: dict[str, Any], *, quick: bool, learning_rate: float, **others: float
) -> ConfigDict:
    """FedEM on an image set that TFDS has prepared: the released CNN, 200 rounds.

    Args:
        data: the set, and how it is split.
        quick: a twentieth of the images, 10 clients and a small CNN.
        learning_rate: as for :func:`baselines`.
        others: as for :func:`baselines`.
    """
    small = {"num_clients": 10, "fraction": data.get("fraction", 1.0) / 20}
    return experiment(
        data={"name": "images", **data} | (small if quick else {}),
        model={"name": "cnn"} | ({"channels": (8, 16), "hidden": 64} if quick else {}),
        algorithm=baselines(learning_rate=learning_rate, **others),
        client=fedem_training(learning_rate),
        num_rounds=2 if quick else 200,
        eval_every=1 if quick else 10,
        seeds=(0,) if quick else (0, 1, 2),
    )
