"""MIRA on databricks-dolly-15k with GPT-2: 80 clients, ten a category, 8 a round.

    python -m experiments.run --config=configs/mira_dolly_gpt2.py --workdir=runs/dolly \\
        --config.model.directory=gpt2-large --config.data.tokenizer=gpt2-large \\
        --config.data.path=databricks-dolly-15k.jsonl

``gpt2-large`` is the folder of the checkpoint (config.json, model.safetensors, tokenizer.json);
neither it nor the data are distributed or downloaded. Meant for an accelerator; not run by us at
this size. The settings, and how they differ from MIRA's: section ``mira_dolly_gpt2`` of
``configs/README.md``. ``quick`` is for a small checkpoint and few clients.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, data_seed=0)
    data = {"name": "instruction_files", "seed": options.data_seed}
    if options.quick:
        data |= {
            "clients_per_category": 1,
            "max_length": 48,
            "max_new_tokens": 8,
            "longest_prompt": 40,
        }
    targets = ("*/query_key_value", "*/output", "*/down")
    lora = {"targets": targets, "rank": 8, "alpha": 8.0, "dropout": 0.05}
    return common.experiment(
        data=data,
        model={"name": "checkpoint", "adapters": {"lora": lora}},
        algorithm={
            "name": "mira",
            "mira": {"graph": "random", "strength": 3e-5 * 5 * 0.8},
            "fedptuning": {"learning_rate": 1e-4},
        },
        client={
            "name": "adam",
            "learning_rate": 3e-5,
            "weight_decay": 0.01,
            "max_norm": 5.0,
            "batch_size": 4,
            "epochs": 1 if options.quick else 5,
        },
        cohort_size=2 if options.quick else 8,
        num_rounds=2 if options.quick else 40,
        eval_every=1 if options.quick else 10,
        seeds=(0,),
    )
