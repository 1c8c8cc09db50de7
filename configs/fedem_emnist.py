"""FedEM on EMNIST: 100 clients, a tenth of the 814,255 images, each label spread by Dirichlet(0.4), FemnistCNN, 200 rounds.

    python -m fedjax_mtl.data.tfds_sets emnist --data_dir=DIR        # once; downloads
    python -m experiments.run --config=configs/fedem_emnist.py --workdir=runs/fedem_emnist --config.data.data_dir=DIR

Published: FedEM 83.5 / bottom decile 76.6, FedAvg 82.6 / 75.0, local 71.9 / 64.3. Not run by us at this size. The variant ``quick`` takes 2 % of the
images, 10 clients and a small CNN.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False)
    data = {
        "name": "images",
        "source": "emnist",
        "data_dir": "",  # empty: TFDS's own default
        "fraction": 0.1,
        "partition": "dirichlet",
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
        data |= {"fraction": 0.02, "num_clients": 10}
        model |= {"channels": (8, 16), "hidden": 64}
    return common.experiment(
        data=data,
        model=model,
        algorithm=common.baselines(default=0.03, fedem=0.1, decentralized_fedem=0.1),
        client=common.fedem_training(),
        num_rounds=2 if options.quick else 200,
        eval_every=1 if options.quick else 10,
        seeds=(0,) if options.quick else (0, 1, 2),
    )
