"""FedEM on CIFAR-100: 100 clients of 600 images by Pachinko allocation, 200 rounds.

    python -m fedjax_mtl.data.tfds_sets cifar100 --data_dir=DIR      # once; downloads
    python -m experiments.run --config=configs/fedem_cifar100.py --workdir=runs/fedem_cifar100 \\
        --config.data.data_dir=DIR

Not run by us at this size. What differs from the paper, and its figures: section ``fedem_cifar100``
of ``configs/README.md``.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False)
    return common.image_experiment(
        {"source": "cifar100", "partition": "pachinko"},
        quick=options.quick,
        learning_rate=0.1,
        fedem=0.316,
        decentralized_fedem=0.316,
    )
