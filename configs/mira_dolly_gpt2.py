"""MIRA on databricks-dolly-15k with GPT-2: 80 clients, ten a category, 8 a round, LoRA on the attention and projection matrices.

    python -m experiments.run --config=configs/mira_dolly_gpt2.py --workdir=runs/dolly --config.model.directory=gpt2-large \\
        --config.data.path=databricks-dolly-15k.jsonl --config.data.tokenizer=gpt2-large

``gpt2-large`` is the folder of the checkpoint (config.json, model.safetensors, tokenizer.json); neither it nor the data are distributed or downloaded. The settings are those of MIRA's released code for GPT-2 large (arXiv 2410.15524; the letter says rank 16, batch 8 and 60 rounds), but for shorter sequences (512 tokens where the code has 1024, of which answers take 128): rank 8, alpha 8, Adam 3e-5 with weight decay 0.01 and gradients cut to length 5, 5 local epochs of batch 4, strength ``3e-5 x 5 x 0.8``. That pull is very weak; ``--config.algorithm.mira.strength=0.1`` with
``graph=group`` is what helped in the small experiments. Meant for an accelerator; not run here at this size. ``quick`` is for a small checkpoint and few clients.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, data_seed=0)
    data = {
        "name": "instruction_files",
        "source": "dolly",  # or natural_instructions, with clients_per_category=1
        "path": "",
        "tokenizer": "",
        "clients_per_category": 1 if options.quick else 10,
        "max_length": 48 if options.quick else 512,
        "max_new_tokens": 8 if options.quick else 128,
        "longest_prompt": 40 if options.quick else 384,
        "seed": options.data_seed,
    }
    algorithm = common.adapter_algorithms(
        "mira",
        learning_rate=3e-5,
        prompt_learning_rate=1e-4,
        graph="random",
        strength=3e-5 * 5 * 0.8,
        targets=("*/query_key_value", "*/output", "*/down"),
        rank=8,
        alpha=8.0,
        dropout=0.05,
    )
    return common.experiment(
        data=data,
        model={"name": "checkpoint", "directory": ""},
        algorithm=algorithm,
        client={
            "name": "adam",
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
