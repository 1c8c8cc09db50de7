"""FedEM on EMNIST: 100 clients, a tenth of the 814,255 images, each label spread by Dirichlet(0.4), FemnistCNN, 200 rounds.

    python -m fedjax_mtl.data.tfds_sets emnist --data_dir=DIR        # once; downloads
    python -m experiments.run --config=configs/fedem_emnist.py --workdir=runs/fedem_emnist --config.data.data_dir=DIR

Published: FedEM 83.5 / bottom decile 76.6, FedAvg 82.6 / 75.0, local 71.9 / 64.3. Not run by us at this size. The variant ``quick`` takes a twentieth of the
images, 10 clients and a small CNN.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False)
    return common.image_experiment(
        "emnist",
        quick=options.quick,
        fraction=0.1,
        partition="dirichlet",
        num_clients=100,
        default=0.03,
        fedem=0.1,
        decentralized_fedem=0.1,
    )
