"""HOTA-FedGradNorm: three clusters of four clients that transmit at once over a fading channel; the tasks of ``fedgradnorm_tasks``.

    python -m experiments.sweep --config=configs/hota_fedgradnorm.py --workdir=runs/hota --grid=algorithm.name=hota_equal_weights,hota_fedgradnorm --grid=data.seed=0,1,2,3,4
    python -m experiments.report runs/hota/*/ --output=runs/hota --target=normalised_error_mean=0.35

``:bad_cluster`` gives the first cluster a channel of spread 0.15. Each run takes about half a minute on one core. Over five draws: rounds to 0.35, 57 with equal weights and
49 with dynamic ones (bad cluster: 62 and 54); worst task after 150 rounds 0.366 and 0.331 (0.388 and 0.345).
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, bad_cluster=False, noise=0.001)
    data = {
        "name": "scaled_tasks",
        "scales": (0.3, 1.0, 2.0, 4.0),
        "num_clusters": 3,
        "num_train": 600,
        "last_train": 0,
        "num_test": 500,
        "seed": 0,
    }
    if options.quick:
        data |= {"num_train": 100, "num_test": 50}
    noise = 0.003 if options.bad_cluster else options.noise
    fading = (0.15, 1.0, 1.0) if options.bad_cluster else (1.0, 1.0, 1.0)
    return common.experiment(
        data=data,
        model={"name": "body_and_head", "hidden": (64, 32)},
        algorithm=common.hota_algorithms(noise, fading),
        client={"batch_size": 64, "epochs": 0, "steps": 2},
        num_rounds=4 if options.quick else 150,
        eval_every=2,
        seeds=(0,),
    )
