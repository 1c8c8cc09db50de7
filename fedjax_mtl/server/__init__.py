"""Server transformations: optax transformations over pseudo-gradients with a leading client axis."""

from fedjax_mtl.server.averaging import average_clients, clip_clients, step_from
from fedjax_mtl.server.compression import compress_clients, stochastic_levels, top_entries
from fedjax_mtl.server.decoupling import decouple_updates
from fedjax_mtl.server.fairness import agnostic_average, q_fair_average
from fedjax_mtl.server.privacy import private_average
from fedjax_mtl.server.projection import conflict_averse, gp_aggregation, project_conflicts
from fedjax_mtl.server.robust import coordinate_median, trimmed_mean
from fedjax_mtl.server.weighting import normalize_gradients
from fedjax_mtl.server.wireless import over_the_air_gradnorm

__all__ = [
    "agnostic_average",
    "average_clients",
    "clip_clients",
    "compress_clients",
    "conflict_averse",
    "coordinate_median",
    "decouple_updates",
    "gp_aggregation",
    "normalize_gradients",
    "over_the_air_gradnorm",
    "private_average",
    "project_conflicts",
    "q_fair_average",
    "step_from",
    "stochastic_levels",
    "top_entries",
    "trimmed_mean",
]
