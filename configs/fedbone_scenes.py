"""FedBone on rendered scenes: eight single-task clients in two domains, a ViT trunk on the server.

    python -m experiments.sweep --config=configs/fedbone_scenes.py --workdir=runs/fedbone \\
        --grid=algorithm.name=local,fedavg,fedprox,fedrep,fedbone
    python -m experiments.report runs/fedbone/*/ --output=runs/fedbone --reference=local

The scenes are rendered on first use into ``data.data_dir`` (default as in TFDS). A run takes about
ten minutes on one core, three of them to compile. Ablation and results: section ``fedbone_scenes``
of ``configs/README.md``.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False)
    data, model = {"name": "scenes"}, {"name": "cut"}
    if options.quick:
        data |= {"profile": "tiny", "tasks_a": ("depth",), "tasks_b": ("semseg",)}
        model |= {"width": 16, "depth": 1, "heads": 2, "adaptation_width": 8, "head_width": 8}
    # Every task counts alike, and each client keeps the part from features to outputs.
    averaged = {"weighting": "uniform", "personal": "head"}
    return common.experiment(
        data=data,
        model=model,
        algorithm={
            "name": "fedbone",
            "fedadam": averaged,
            "fedavg": averaged,
            "fedbone": {
                "server": "gp_aggregation, adam(learning_rate=0.001)",
                "drift_learning_rate": 0.001,
            },
            "feddea": averaged,
            "fedper": {"weighting": "uniform"},
            "fedprox": averaged | {"proximal_strength": 0.05},
            "fedrep": {"weighting": "uniform", "head_plan": "plan(steps=5)"},
        },
        client={
            "batch_size": 4 if options.quick else 8,
            "steps": 2 if options.quick else 10,
            "name": "adam",
            "learning_rate": 0.001,
        },
        num_rounds=1 if options.quick else 20,
        eval_every=1 if options.quick else 10,
        evaluation_batch_size=20 if options.quick else 100,
        seeds=(0,) if options.quick else (0, 1, 2, 3, 4),
    )
