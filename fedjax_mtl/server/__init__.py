"""Server transformations: optax transformations over pseudo-gradients with a client axis."""

from fedjax_mtl.server.aggregation import gp_aggregation
from fedjax_mtl.server.averaging import average_clients, averages_first, clip_clients, step_from
from fedjax_mtl.server.clusters import average_in_clusters
from fedjax_mtl.server.compression import compress_clients, stochastic_levels, top_entries
from fedjax_mtl.server.decoupling import decouple_updates
from fedjax_mtl.server.fairness import agnostic_average, q_fair_average
from fedjax_mtl.server.gossip import gossip_mixing
from fedjax_mtl.server.hyper import HyperOptimizer, hyper_attention, hyper_conflict_averse
from fedjax_mtl.server.mixing import (
    attention_mixing,
    cluster_mixing,
    laplacian_mixing,
    mean_of_others,
    mix_models,
    only,
)
from fedjax_mtl.server.privacy import private_average
from fedjax_mtl.server.projection import conflict_averse, project_conflicts
from fedjax_mtl.server.reports import Report, reported
from fedjax_mtl.server.robust import coordinate_median, trimmed_mean
from fedjax_mtl.server.sheaf import sheaf_mixing, sheaf_traffic
from fedjax_mtl.server.weighting import normalize_gradients
from fedjax_mtl.server.wireless import over_the_air_gradnorm

__all__ = [
    "HyperOptimizer",
    "Report",
    "agnostic_average",
    "attention_mixing",
    "average_clients",
    "average_in_clusters",
    "averages_first",
    "clip_clients",
    "cluster_mixing",
    "compress_clients",
    "conflict_averse",
    "coordinate_median",
    "decouple_updates",
    "gossip_mixing",
    "gp_aggregation",
    "hyper_attention",
    "hyper_conflict_averse",
    "laplacian_mixing",
    "mean_of_others",
    "mix_models",
    "normalize_gradients",
    "only",
    "over_the_air_gradnorm",
    "private_average",
    "project_conflicts",
    "q_fair_average",
    "reported",
    "sheaf_mixing",
    "sheaf_traffic",
    "step_from",
    "stochastic_levels",
    "top_entries",
    "trimmed_mean",
]
