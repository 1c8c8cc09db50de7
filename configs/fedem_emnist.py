"""FedEM on EMNIST: 100 clients, a tenth of the images, Dirichlet(0.4), FemnistCNN, 200 rounds.

    python -m fedjax_mtl.data.tfds_sets emnist --data_dir=DIR        # once; downloads
    python -m experiments.run --config=configs/fedem_emnist.py --workdir=runs/fedem_emnist \\
        --config.data.data_dir=DIR

Not run by us at this size. The paper's figures: section ``fedem_emnist`` of ``configs/README.md``.
The variant ``quick`` takes a twentieth of the images, 10 clients and a small CNN.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False)
    return common.image_experiment(
        {"source": "emnist", "fraction": 0.1},
        quick=options.quick,
        learning_rate=0.03,
        fedem=0.1,
        decentralized_fedem=0.1,
    )
