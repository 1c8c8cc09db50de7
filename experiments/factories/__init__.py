"""From ``config.algorithm.<name>`` to algorithms, one file a family."""

from collections.abc import Callable

from experiments.factories import baselines, dual, gradnorm, language, relations
from fedjax_mtl import Algorithm

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    **baselines.ALGORITHMS,
    **gradnorm.ALGORITHMS,
    **relations.ALGORITHMS,
    **dual.ALGORITHMS,
    **language.ALGORITHMS,
}
