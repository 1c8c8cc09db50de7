"""MOCHA on synthetic linear tasks in three clusters, with a learned relation, in double precision.

    python -m experiments.sweep --config=configs/mocha_synthetic.py --workdir=runs/mocha \\
        --grid=algorithm.name=mocha,local_models,global_model

It is compared with one model a task and one for all. Ten seconds a method on one CPU core. Other
relations and results: section ``mocha_synthetic`` of ``configs/README.md``. ``quick`` is a smoke
test.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, data_seed=0)
    data = {
        "name": "related_tasks",
        "seed": options.data_seed,
        "preparation": {"seed": options.data_seed},
    }
    related = {"penalty": 0.1, "relationship": "learned(ridge=3.0)"}
    return common.experiment(
        data=data | ({"num_tasks": 8} if options.quick else {}),
        model={"name": "linear"},
        algorithm={
            "name": "mocha",
            "mocha": related | {"relationship_every": 20, "measure_inexactness": True},
            "cocoa": related | {"relationship_every": 20},
            "minibatch_sdca": related,
            "minibatch_sgd": related,
            "local_models": {"penalty": 0.1},
            "global_model": {"penalty": 0.1},
        },
        execution={"mode": "vmap", "precision": "double"},
        num_rounds=20 if options.quick else 300,
        eval_every=10 if options.quick else 20,
        seeds=(0,),
    )
