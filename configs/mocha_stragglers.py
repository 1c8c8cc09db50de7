"""MOCHA under stragglers and failures, against CoCoA and mini-batch methods.

    python -m experiments.sweep --config=configs/mocha_stragglers.py --workdir=runs/stragglers \\
        --grid=algorithm.name=mocha,cocoa,minibatch_sdca,minibatch_sgd
    python -m experiments.figures.round_times runs/stragglers/*

It is the W step on synthetic tasks whose sizes differ by two orders of magnitude. The second
command turns the rounds of each run into estimated time over WiFi, LTE and 3G (section 5 of the
paper) and plots primal sub-optimality over it. Half a minute a method on one CPU core. Other
settings of ``systems`` and results: section ``mocha_stragglers`` of ``configs/README.md``.
``quick`` is a smoke test.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, data_seed=0)
    data = {
        "name": "related_tasks",
        "smallest": 8,
        "largest": 800,
        "seed": options.data_seed,
        "preparation": {"seed": options.data_seed, "one_class": "keep"},
    }
    related = {"penalty": 0.01, "relationship": "mean(coupling=0.02, ridge=0.01)"}
    return common.experiment(
        data=data | ({"num_tasks": 8, "largest": 100} if options.quick else {}),
        model={"name": "linear"},
        algorithm={
            "name": "mocha",
            "mocha": related | {"measure_inexactness": True},
            "cocoa": related,
            "minibatch_sdca": related,
            "minibatch_sgd": related,
            "local_models": {"penalty": 0.01},
            "global_model": {"penalty": 0.01},
        },
        execution={"mode": "vmap", "precision": "double"},
        systems={"low": 0.1},
        num_rounds=20 if options.quick else 500,
        eval_every=5,
        seeds=(0,),
    )
