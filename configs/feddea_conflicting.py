"""FedDEA (a reconstruction) on eight tasks that partly conflict, for one model with a head a task.

    python -m experiments.sweep --config=configs/feddea_conflicting.py --workdir=runs/feddea \\
        --grid=algorithm.name=local,fedavg,feddea,fedprox,fedadam --grid=data.seed=0,1,2,3,4
    python -m experiments.report runs/feddea/*/ --output=runs/feddea --reference=local \\
        --rounds 10 20 30

Each run of five seeds takes about fifteen seconds on one core. Controls and results: section
``feddea_conflicting`` of ``configs/README.md``.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False)
    small = {"num_train": 60, "num_test": 50}
    uniform = {"weighting": "uniform"}  # every task counts alike
    return common.experiment(
        data={"name": "conflicting_tasks"} | (small if options.quick else {}),
        model={"name": "many_heads"},
        algorithm={
            "name": "feddea",
            "fedadam": uniform,
            "fedavg": uniform,
            "feddea": uniform,
            "fedper": uniform,
            "fedprox": uniform | {"proximal_strength": 0.05},
            "fedrep": uniform | {"head_plan": "plan(steps=5)"},
        },
        client={"batch_size": 32, "steps": 20, "momentum": 0.9, "learning_rate": 0.02},
        num_rounds=2 if options.quick else 30,
        eval_every=1 if options.quick else 10,
        seeds=(0, 1, 2, 3, 4),
    )
