"""MOCHA on the School data: exam scores of 139 schools, squared loss and mean regularisation.

    python -m experiments.run --config=configs/mocha_school.py --workdir=runs/school \\
        --config.data.path=school.mat

The file is not distributed here: give MALSAR's ``school.mat``, or a .npz with X, y and task_sizes.
Results: section ``mocha_school`` of ``configs/README.md``. ``quick`` makes few rounds.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, data_seed=0)
    related = {"penalty": 1.0, "relationship": "mean(coupling=2.0, ridge=0.001)"}
    # The tightest safe bound: coupling is strong here.
    bound = {"sigma_prime": "eigenvalue", "measure_inexactness": True}
    return common.experiment(
        data={
            "name": "task_table",
            "preparation": {
                "loss": "squared",
                "seed": options.data_seed,
                "standardise": "pooled",
            },
        },
        model={"name": "linear"},
        algorithm={
            "name": "mocha",
            "mocha": related | bound,
            "cocoa": related,
            "minibatch_sdca": related,
            "minibatch_sgd": related,
            "local_models": {"penalty": 0.1},
            "global_model": {"penalty": 0.001},
        },
        execution={"mode": "vmap", "precision": "double"},
        num_rounds=10 if options.quick else 500,
        eval_every=10 if options.quick else 50,
        seeds=(0,),
    )
