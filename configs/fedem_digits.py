"""FedEM on the handwritten digits of scikit-learn, as a mixture of three label permutations: 100 clients of 30 training images.

    python -m experiments.sweep --config=configs/fedem_digits.py --workdir=runs/digits --grid=algorithm.name=fedem,fedavg,local

Each client draws its images from three underlying distributions that share the images and differ in what the labels mean, with weights from
Dirichlet(0.4); 25 of the 100 clients are never trained with. Other partitions: ``--config.data.partition=rotated`` or ``dirichlet``. About a quarter of a minute an algorithm
on 2 CPU cores; the README has the table. ``quick`` is a smoke test.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, data_seed=0)
    data = {
        "name": "digits",
        "partition": "label_permuted",
        "num_clients": 100,
        "num_components": 3,
        "alpha": 0.4,
        "train_size": 30,
        "test_size": 60,
        "unseen_fraction": 0.25,
        "seed": options.data_seed,
    }
    algorithm = common.baselines(
        default=0.3, fedem=1.0, decentralized_fedem=1.0, pfedme=0.05, agnostic=0.3, clustered=0.3
    )
    algorithm["fedavg_tuned"]["adaptation_epochs"] = 5
    return common.experiment(
        data=data | ({"num_clients": 8, "test_size": 10} if options.quick else {}),
        model={"name": "mlp", "hidden": (64,)},
        algorithm=algorithm,
        client={"batch_size": 8},
        num_rounds=4 if options.quick else 200,
        eval_every=2 if options.quick else 10,
    )
