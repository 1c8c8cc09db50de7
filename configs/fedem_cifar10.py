"""FedEM on CIFAR-10: 80 clients, each label spread by Dirichlet(0.4), 200 rounds.

    python -m fedjax_mtl.data.tfds_sets cifar10 --data_dir=DIR       # once; downloads
    python -m experiments.run --config=configs/fedem_cifar10.py --workdir=runs/fedem_cifar10 \\
        --config.data.data_dir=DIR

Not run by us at this size. What differs from the paper, and its figures: section ``fedem_cifar10``
of ``configs/README.md``.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False)
    return common.image_experiment(
        {"source": "cifar10", "num_clients": 80},
        quick=options.quick,
        learning_rate=0.03,
        fedem=0.1,
        decentralized_fedem=0.1,
        pfedme=0.1,
    )
