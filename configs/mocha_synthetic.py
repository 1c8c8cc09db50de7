"""MOCHA on synthetic linear tasks in three clusters, 30 tasks of 20 to 120 examples: learned relation against one model a task and one for all.

    python -m experiments.sweep --config=configs/mocha_synthetic.py --workdir=runs/mocha --grid=algorithm.name=mocha,local_models,global_model

Test error of one draw, mean over tasks: 19.7 % with a learned relation, 20.7 % one model a task, 33.1 % one for all, at these untuned penalties; over ten shuffles with tuned ones see the README. Ten seconds a method on one CPU core.
Other relations: ``--config.algorithm.mocha.relation=mean``, ``clustered``, ``sparse`` or ``independent``. Double precision. ``quick`` is a smoke test.
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
        "smallest": 20,
        "largest": 120,
        "noise": 0.1,
        "seed": options.data_seed,
        "preparation": common.preparation("hinge", seed=options.data_seed),
    }
    algorithm = common.dual_algorithms(
        "mocha", penalty=0.1, relation="learned", every=20, ridge=3.0
    )
    return common.experiment(
        data=data,
        model={"name": "linear"},
        algorithm=algorithm,
        execution={"mode": "vmap", "precision": "double"},
        num_rounds=20 if options.quick else 300,
        eval_every=10 if options.quick else 20,
        seeds=(0,),
    )
