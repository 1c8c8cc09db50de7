"""FedEM on the handwritten digits of scikit-learn, as a mixture of three label permutations.

    python -m experiments.sweep --config=configs/fedem_digits.py --workdir=runs/digits \\
        --grid=algorithm.name=fedem,fedavg,local

Each of 100 clients draws 30 training images from three underlying distributions that share the
images and differ in what the labels mean; a quarter of the clients is never trained with. About a
quarter of a minute an algorithm on 2 CPU cores. Other partitions and results: section
``fedem_digits`` of ``configs/README.md``. ``quick`` is a smoke test.
"""

from typing import Any

from configs import common


def settings(variant: str | None = None) -> dict[str, Any]:
    """What this experiment says, for those that change a part of it."""
    options = common.parse_variant(variant, quick=False, data_seed=0)
    data = {"name": "digits", "seed": options.data_seed}
    algorithm = common.baselines(learning_rate=0.3, fedem=1.0, decentralized_fedem=1.0, pfedme=0.05)
    algorithm["fedavg_tuned"] = {"adaptation": "plan(epochs=5)"}
    return {
        "data": data | ({"num_clients": 8, "test_size": 10} if options.quick else {}),
        "model": {"name": "mlp"},
        "algorithm": algorithm,
        "client": {"batch_size": 8, "learning_rate": 0.3},
        "num_rounds": 4 if options.quick else 200,
        "eval_every": 2 if options.quick else 10,
    }


def get_config(variant: str | None = None):
    return common.experiment(**settings(variant))
