"""MOCHA on the Landmine data: 29 fields, 9 radar features, SVMs with a learned relation, as the released code runs it.

    python -m experiments.sweep --config=configs/mocha_landmine.py --workdir=runs/landmine --grid=algorithm.name=mocha,local_models,global_model

with ``--config.data.path=LandmineData.mat`` (not distributed here; a .npz with X, y and task_sizes works too). No intercept, no standardisation, rows in the table's order, as the released code. 6 % of the examples are mines, and a constant
would make 6 % errors; ``--config.data.preparation.intercept=1`` appends an intercept. Over ten shuffles, with the penalty by cross-validation, 21.2 % errors with a learned relation and 21.3 % with one model a task; trained as the released code does, until the primal stands still
(``--config.num_rounds=1 --config.algorithm.local_models.fidelity=released``, the global model likewise), 24.5 % with one model a task and 26.1 % with one for all; see the README. ``quick`` makes few rounds.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False, data_seed=0)
    data = {
        "name": "task_table",
        "path": "",
        "preparation": common.preparation("hinge", seed=options.data_seed, keep_order=True),
    }
    algorithm = common.dual_algorithms("mocha", penalty=0.0001, relation="learned", every=100)
    algorithm["mocha"]["passes"] = 0.5
    for name in ("local_models", "global_model"):
        algorithm[name]["penalty"] = 0.0001
    return common.experiment(
        data=data,
        model={"name": "linear"},
        algorithm=algorithm,
        execution={"mode": "vmap", "precision": "double"},
        num_rounds=20 if options.quick else 1000,
        eval_every=10 if options.quick else 100,
        seeds=(0,),
    )
