"""HOTA-FedGradNorm: three clusters of four clients that transmit at once over a fading channel.

    python -m experiments.sweep --config=configs/hota_fedgradnorm.py --workdir=runs/hota \\
        --grid=algorithm.name=hota_equal_weights,hota_fedgradnorm --grid=data.seed=0,1,2,3,4
    python -m experiments.report runs/hota/*/ --output=runs/hota \\
        --target=normalised_error_mean=0.35

The tasks are those of ``fedgradnorm_tasks``. The variant ``bad_cluster`` gives the first cluster a
bad channel. Each run takes about half a minute on one core. Results: section ``hota_fedgradnorm``
of ``configs/README.md``.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, bad_cluster=False, noise=0.001)
    data = {"name": "scaled_tasks", "num_clusters": 3, "num_train": 600}
    settings = {
        "learning_rate": 0.01,
        "minimum": 0.01,
        "measured": "last_body_kernel",
        "head_plan": "plan(steps=5)",
        "num_clusters": 3,
        "fading": (0.15, 1.0, 1.0) if options.bad_cluster else (1.0, 1.0, 1.0),
        "noise": 0.003 if options.bad_cluster else options.noise,
    }
    return common.experiment(
        data=data | ({"num_train": 100, "num_test": 50} if options.quick else {}),
        model={"name": "body_and_head"},
        algorithm={
            "name": "hota_fedgradnorm",
            "hota_fedgradnorm": settings,
            "hota_equal_weights": settings,
        },
        client={"batch_size": 64, "steps": 2},
        num_rounds=4 if options.quick else 150,
        eval_every=2,
        seeds=(0,),
    )
