"""Systems that relate personal models, side by side with FedEM on the clients of ``fedem_digits``.

    python -m experiments.sweep --config=configs/relational_digits.py --workdir=runs/relational \\
        --grid=algorithm.name=fedem,fedu,fedamp,matfl,fedhca2,ditto,fedmtl,sheaf_fmtl,fedavg,local

Clients mix three meanings of the labels, so that a client is related to all others, and more to
some. Half a minute to three minutes a method on one CPU core. Results: section
``relational_digits`` of ``configs/README.md``. ``quick`` is a smoke test.
"""

from configs import common, fedem_digits

RELATED = {
    "ditto": {"penalty": 0.5},
    "fedamp": {
        "penalty": 0.01,
        "scale": 0.01,
        "bandwidth": "median",
        "clip": True,
        "parts": ("encoder", "decoder"),
    },
    "fedu": {"graph": "learned(smoothness=0.5)", "strength": 0.3, "neighbours": "all"},
    "matfl": {"num_clusters": 3, "encoder": "everything"},
    # The maps hold 2 x edges x compression x parameters^2 numbers.
    "sheaf_fmtl": {
        "adjacency": "erdos_renyi(probability=0.1)",
        "strength": 0.01,
        "map_step": 0.001,
        "compression": 0.005,
    },
}


def get_config(variant: str | None = None):
    said = fedem_digits.settings(variant)
    said["algorithm"] = said["algorithm"] | RELATED | {"name": "fedu"}
    return common.experiment(**said)
