"""FedGradNorm on four related regressions of different scale, after GradNorm's toy problem.

    python -m experiments.sweep --config=configs/fedgradnorm_tasks.py --workdir=runs/fedgradnorm \\
        --grid=algorithm.name=equal_weights,fedgradnorm --grid=data.seed=0,1,2,3,4
    python -m experiments.report runs/fedgradnorm/*/ --output=runs/fedgradnorm \\
        --target=normalised_error_mean=0.3

Each run takes about half a minute on one core. Negative control and results: section
``fedgradnorm_tasks`` of ``configs/README.md``.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False)
    small = {"num_train": 100, "num_test": 50}
    gradnorm = {"learning_rate": 0.01, "minimum": 0.01, "measured": "last_body_kernel"}
    return common.experiment(
        data={"name": "scaled_tasks"} | (small if options.quick else {}),
        model={"name": "body_and_head"},
        algorithm={
            "name": "fedgradnorm",
            "fedgradnorm": gradnorm | {"head_plan": "plan(steps=5)"},
            "equal_weights": gradnorm | {"head_plan": "plan(steps=5)"},
            "fedrep": {"head_plan": "plan(steps=5)"},
        },
        client={"batch_size": 64, "steps": 2, "learning_rate": 0.02},
        num_rounds=4 if options.quick else 300,
        eval_every=2,
        seeds=(0,),
    )
