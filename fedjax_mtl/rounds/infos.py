"""How the numbers that rounds report are to be read: which of them have a better direction."""

from fedjax_mtl.core.task import Description

_LOWER = Description(higher_is_better=False)
_HIGHER = Description(higher_is_better=True)

INFOS = {
    "loss": _LOWER,
    "personal_loss": _LOWER,
    "primal": _LOWER,
    "dual": _HIGHER,
    "gap": _LOWER,
    "inexactness": _LOWER,
    "worst_inexactness": _LOWER,
    "diverged": _LOWER,
}
"""By name. The dual is a lower bound of the primal, which methods in the dual raise.

Numbers that say what was done and not how well, such as ``num_steps``, ``num_clusters`` or
``sigma_prime``, are left out: they have no best.
"""


def describe_info(name: str) -> Description | None:
    """How the number that a round reports under a name is to be read; None where it has no best.

    The numbers of one group of clients are called ``<name>/<group>``.
    """
    return INFOS.get(name.partition("/")[0])
