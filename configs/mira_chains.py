"""MIRA on tiny languages: 16 clients in 4 groups, LoRA on a one-block transformer that runs anywhere.

    python -m experiments.sweep --config=configs/mira_chains.py --workdir=runs/mira --grid=algorithm.name=mira,fedit,local_adapters

Each client's language is a noisy permutation chain, nearly that of its group; the base model is trained on other chains and then frozen. 8 clients a round, 5 Adam steps. Mean test loss after 60 rounds, five draws: local 1.734, FedIT 2.161, MIRA 1.558 (the README has more). A quarter of a minute a method on one CPU core.
Other graphs: ``--config.algorithm.mira.graph=random`` (the letter's), ``learned``, ``updates``. ``quick`` is a smoke test.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, data_seed=0)
    data = {
        "name": "chains",
        "num_clients": 16,
        "num_groups": 4,
        "train_sequences": 8,
        "test_sequences": 128,
        "follow": 0.75,
        "seed": options.data_seed,
    }
    model = {
        "name": "transformer",
        "width": 32,
        "num_layers": 1,
        "num_heads": 2,
        "mlp_width": 64,
        "max_length": 40,  # of which prompt tuning takes 20
        "pretraining_steps": 20 if options.quick else 400,
        "pretraining_learning_rate": 0.003,
    }
    algorithm = common.adapter_algorithms(
        "mira",
        learning_rate=0.005,
        prompt_learning_rate=0.005,
        graph="group",
        strength=0.1,
        targets=("*/attention/query", "*/attention/value", "*/mlp/*"),
        rank=4,
        alpha=8.0,
        deviation=0.1,
    )
    return common.experiment(
        data=data,
        model=model,
        algorithm=algorithm,
        client={"name": "adam", "batch_size": 8, "epochs": 0, "steps": 5},
        execution={"mode": "vmap"},
        cohort_size=8,
        num_rounds=4 if options.quick else 60,
        eval_every=2 if options.quick else 20,
        seeds=(0,),
    )
