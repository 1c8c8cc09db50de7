"""FedEM on CIFAR-100: 100 clients of 600 images by Pachinko allocation (0.4 over coarse labels, 10 over fine), 200 rounds.

    python -m fedjax_mtl.data.tfds_sets cifar100 --data_dir=DIR      # once; downloads
    python -m experiments.run --config=configs/fedem_cifar100.py --workdir=runs/fedem_cifar100 --config.data.data_dir=DIR

The paper fine-tunes a MobileNetV2 pre-trained on ImageNet (FedEM 44.1 / 35.0, FedAvg 40.9 / 33.2, local 31.5 / 19.9); this trains the CIFAR10CNN with 100 classes
from scratch, see ``fedem_cifar10.py``. Not run by us at this size.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False)
    data = {
        "name": "images",
        "source": "cifar100",
        "data_dir": "",
        "fraction": 1.0,
        "partition": "pachinko",
        "num_clients": 100,
        "num_groups": 0,
        "alpha": 0.4,
        "beta": 10.0,
        "test_fraction": 0.2,
        "unseen_fraction": 0.2,
        "seed": 12345,
    }
    model = {"name": "cnn", "channels": (32, 64), "kernel": 5, "hidden": 2048}
    if options.quick:
        data |= {"fraction": 0.05, "num_clients": 10}
        model |= {"channels": (8, 16), "hidden": 64}
    return common.experiment(
        data=data,
        model=model,
        algorithm=common.baselines(default=0.1, fedem=0.316, decentralized_fedem=0.316),
        client=common.fedem_training(),
        num_rounds=2 if options.quick else 200,
        eval_every=1 if options.quick else 10,
        seeds=(0,) if options.quick else (0, 1, 2),
    )
