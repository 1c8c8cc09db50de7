"""Systems that relate personal models, side by side with FedEM on its digits: three label permutations, 75 clients of 30 training images.

    python -m experiments.sweep --config=configs/relational_digits.py --workdir=runs/relational --grid=algorithm.name=fedem,fedu,fedamp,matfl,fedhca2,ditto,fedmtl,sheaf_fmtl,fedavg,local

The data are those of ``fedem_digits.py``: clients mix three meanings of the labels, so that a client is related to all others, and more to some. The README has the table. Half a minute to three minutes a method on one CPU core.
``quick`` is a smoke test.
"""

from configs import common, fedem_digits


def get_config(variant: str | None = None):
    config = fedem_digits.get_config(variant)
    config.algorithm.update(common.relational_algorithms(learning_rate=0.3))
    config.algorithm.name = "fedu"
    return config
