"""FedEM on its synthetic mixture of linear classifiers: 300 clients, 3 components, 200 rounds.

    python -m experiments.run --config=configs/fedem_synthetic.py --workdir=runs/fedem_synthetic
    python -m experiments.run --config=configs/fedem_synthetic.py:quick --workdir=runs/quick \\
        --config.algorithm.name=fedavg

The generator is the paper's; ``--config.data.fidelity=released`` repeats the slip of the released
one, on which the published numbers were made. Results: section ``fedem_synthetic`` of
``configs/README.md``.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False)
    small = {"num_clients": 24, "dimension": 20, "num_test": 100}
    return common.experiment(
        data={"name": "synthetic"} | (small if options.quick else {}),
        model={"name": "linear"},
        algorithm=common.baselines(learning_rate=0.1, fedem=0.316, decentralized_fedem=0.316),
        client=common.fedem_training(0.1),
        num_rounds=4 if options.quick else 200,
        eval_every=2 if options.quick else 20,
    )
