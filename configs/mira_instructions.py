"""MIRA on instructions in bytes: eight families of template instructions, two clients each.

    python -m experiments.sweep --config=configs/mira_instructions.py --workdir=runs/instructions \\
        --grid=algorithm.name=mira,fedit,local_adapters,fedptuning

The base model is trained on questions with answers that belong to others, then frozen. At the end
every client's model answers its test prompts by greedy decoding (``answers.jsonl``, ROUGE-L). Three
to five minutes a method on one CPU core. Results: section ``mira_instructions`` of
``configs/README.md``. ``quick`` is a smoke test.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, data_seed=0)
    data = {"name": "families", "seed": options.data_seed}
    sizes = {"width": 64, "num_layers": 2, "num_heads": 4, "mlp_width": 256}
    if options.quick:
        data |= {"train_examples": 8, "test_examples": 4}
        sizes |= {"width": 16, "num_layers": 1, "mlp_width": 32}
    lora = {"targets": ("*/attention/*", "*/mlp/*"), "rank": 8, "alpha": 16.0}
    return common.experiment(
        data=data,
        model={"name": "transformer", **sizes, "adapters": {"lora": lora}},
        pretraining={"steps": 5 if options.quick else 1000, "seed": options.data_seed},
        algorithm={"name": "mira", "mira": {"graph": "group", "strength": 0.1}},
        client={"name": "adam", "batch_size": 8, "epochs": 5, "learning_rate": 0.005},
        execution={"mode": "vmap"},
        cohort_size=8,
        num_rounds=2 if options.quick else 60,
        eval_every=1 if options.quick else 20,
        seeds=(0,),
    )
