"""MOCHA on the Landmine data: 29 fields, 9 radar features, SVMs with a learned relation.

    python -m experiments.sweep --config=configs/mocha_landmine.py --workdir=runs/landmine \\
        --grid=algorithm.name=mocha,local_models,global_model \\
        --config.data.path=LandmineData.mat

The file is not distributed here; a .npz with X, y and task_sizes works too. As in the released code
there is no intercept and no standardisation, and rows stay in the table's order. What that does to
the results: section ``mocha_landmine`` of ``configs/README.md``. ``quick`` makes few rounds.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, data_seed=0)
    related = {"penalty": 0.0001, "relationship": "learned"}
    return common.experiment(
        data={
            "name": "task_table",
            "preparation": {"seed": options.data_seed, "keep_order": True},
        },
        model={"name": "linear"},
        algorithm={
            "name": "mocha",
            "mocha": related
            | {"relationship_every": 100, "passes": 0.5, "measure_inexactness": True},
            "cocoa": related | {"relationship_every": 100},
            "minibatch_sdca": related,
            "minibatch_sgd": related,
            "local_models": {"penalty": 0.0001},
            "global_model": {"penalty": 0.0001},
        },
        execution={"mode": "vmap", "precision": "double"},
        num_rounds=20 if options.quick else 1000,
        eval_every=10 if options.quick else 100,
        seeds=(0,),
    )
