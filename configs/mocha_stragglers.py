"""MOCHA under stragglers and failures, against CoCoA and mini-batch methods: the W step on synthetic tasks whose sizes differ by two orders of magnitude.

    python -m experiments.sweep --config=configs/mocha_stragglers.py --workdir=runs/stragglers --grid=algorithm.name=mocha,cocoa,minibatch_sdca,minibatch_sgd
    python -m experiments.figures.round_times runs/stragglers/*

The second command turns the rounds of each run into estimated time over WiFi, LTE and 3G (section 5 of the paper) and plots primal sub-optimality over it. Every node manages 10 to 100 % of a pass in a round
(high variability; ``--config.systems.low=0.9`` is low variability); ``--config.systems.drop_probability=0.5`` lets nodes fail. Estimated time to a primal sub-optimality of 0.1 is in the README. Half a minute a method on one CPU core.
``quick`` is a smoke test.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, data_seed=0)
    data = {
        "name": "related_tasks",
        "num_tasks": 8 if options.quick else 30,
        "features": 20,
        "num_clusters": 3,
        "spread": 0.5,
        "smallest": 8,
        "largest": 100 if options.quick else 800,
        "noise": 0.1,
        "seed": options.data_seed,
        "preparation": common.preparation("hinge", seed=options.data_seed, one_class="keep"),
    }
    return common.experiment(
        data=data,
        model={"name": "linear"},
        algorithm=common.dual_algorithms(
            "mocha", penalty=0.01, relation="mean", coupling=0.02, ridge=0.01
        ),
        execution={"mode": "vmap", "precision": "double"},
        systems={"low": 0.1, "high": 1.0},
        num_rounds=20 if options.quick else 500,
        eval_every=5,
        seeds=(0,),
    )
