"""FedGradNorm on four related regressions whose labels differ in scale (0.3, 1, 2, 4), after GradNorm's toy problem.

    python -m experiments.sweep --config=configs/fedgradnorm_tasks.py --workdir=runs/fedgradnorm --grid=algorithm.name=equal_weights,fedgradnorm --grid=data.seed=0,1,2,3,4
    python -m experiments.report runs/fedgradnorm/*/ --output=runs/fedgradnorm --target=normalised_error_mean=0.3

Each run takes about half a minute on one core. Over five draws: rounds to a mean normalised error of 0.30, 112 with equal weights and 77 with FedGradNorm; worst task after 300 rounds 0.355 and 0.277.
With ``"--config.data.scales=(1.0,1.0,1.0,1.0)"``, the negative control, 51 and 51.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False)
    data = {
        "name": "scaled_tasks",
        "scales": (0.3, 1.0, 2.0, 4.0),
        "num_clusters": 1,
        "num_train": 800,
        "last_train": 0,  # examples of the last task; 0: as many as the others
        "num_test": 500,
        "seed": 0,
    }
    if options.quick:
        data |= {"num_train": 100, "num_test": 50}
    return common.experiment(
        data=data,
        model={"name": "body_and_head", "hidden": (64, 32)},
        algorithm=common.gradnorm_algorithms(),
        client={"batch_size": 64, "epochs": 0, "steps": 2},
        num_rounds=4 if options.quick else 300,
        eval_every=2,
        seeds=(0,),
    )
