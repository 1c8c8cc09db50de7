"""MIRA on tiny languages: 16 clients in 4 groups, LoRA on a small transformer that runs anywhere.

    python -m experiments.sweep --config=configs/mira_chains.py --workdir=runs/mira \\
        --grid=algorithm.name=mira,fedit,local_adapters

Each client's language is a noisy permutation chain, nearly that of its group; the base model is
trained on other chains and then frozen. A quarter of a minute a method on one CPU core. Other
graphs and results: section ``mira_chains`` of ``configs/README.md``. ``quick`` is a smoke test.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, data_seed=0)
    targets = ("*/attention/query", "*/attention/value", "*/mlp/*")
    return common.experiment(
        data={"name": "chains", "seed": options.data_seed},
        model={
            "name": "transformer",
            "max_length": 40,  # of which prompt tuning takes 20
            "adapters": {"lora": {"targets": targets, "rank": 4, "alpha": 8.0, "deviation": 0.1}},
        },
        pretraining={
            "steps": 20 if options.quick else 400,
            "learning_rate": 0.003,
            "seed": options.data_seed,
        },
        algorithm={"name": "mira", "mira": {"graph": "group", "strength": 0.1}},
        client={"name": "adam", "batch_size": 8, "steps": 5, "learning_rate": 0.005},
        execution={"mode": "vmap"},
        cohort_size=8,
        num_rounds=4 if options.quick else 60,
        eval_every=2 if options.quick else 20,
        seeds=(0,),
    )
