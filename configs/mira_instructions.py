"""MIRA on instructions in bytes: eight families of template instructions, two clients each, answered by greedy decoding.

    python -m experiments.sweep --config=configs/mira_instructions.py --workdir=runs/instructions --grid=algorithm.name=mira,fedit,local_adapters,fedptuning

Families: copy, reverse, upper case, add two digits, count letters, sort letters, first or last word, remove vowels. The base model (width 64, two blocks) is trained on questions with answers that belong to others, then
frozen. At the end every client's model answers its test prompts (``answers.jsonl``, ROUGE-L). One seed, after 60 rounds: token accuracy 46.8 % (MIRA), 45.6 % (local), 46.0 % (FedIT), ROUGE-L 14 (an answer is one word: right or wrong). Three to five minutes a method on one CPU core.
``quick`` is a smoke test.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, data_seed=0)
    data = {
        "name": "families",
        "clients_per_family": 2,
        "train_examples": 8 if options.quick else 32,
        "test_examples": 4 if options.quick else 16,
        "max_length": 32,
        "max_new_tokens": 8,
        "seed": options.data_seed,
    }
    model = {
        "name": "transformer",
        "width": 16 if options.quick else 64,
        "num_layers": 1 if options.quick else 2,
        "num_heads": 4,
        "mlp_width": 32 if options.quick else 256,
        "max_length": 64,
        "pretraining_steps": 5 if options.quick else 1000,
        "pretraining_learning_rate": 0.001,
    }
    algorithm = common.adapter_algorithms(
        "mira",
        learning_rate=0.005,
        prompt_learning_rate=0.005,
        graph="group",
        strength=0.1,
        targets=("*/attention/*", "*/mlp/*"),
        rank=8,
        alpha=16.0,
    )
    return common.experiment(
        data=data,
        model=model,
        algorithm=algorithm,
        client={"name": "adam", "batch_size": 8, "epochs": 5},
        execution={"mode": "vmap"},
        cohort_size=8,
        num_rounds=2 if options.quick else 60,
        eval_every=1 if options.quick else 20,
        seeds=(0,),
    )
