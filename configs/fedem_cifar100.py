"""FedEM on CIFAR-100: 100 clients of 600 images by Pachinko allocation (0.4 over coarse labels, 10 over fine), 200 rounds.

    python -m fedjax_mtl.data.tfds_sets cifar100 --data_dir=DIR      # once; downloads
    python -m experiments.run --config=configs/fedem_cifar100.py --workdir=runs/fedem_cifar100 --config.data.data_dir=DIR

The paper fine-tunes a MobileNetV2 pre-trained on ImageNet (FedEM 44.1 / 35.0, FedAvg 40.9 / 33.2, local 31.5 / 19.9); this trains the CIFAR10CNN with 100 classes
from scratch, see ``fedem_cifar10.py``. Not run by us at this size.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False)
    return common.image_experiment(
        "cifar100",
        quick=options.quick,
        fraction=1.0,
        partition="pachinko",
        num_clients=100,
        default=0.1,
        fedem=0.316,
        decentralized_fedem=0.316,
    )
