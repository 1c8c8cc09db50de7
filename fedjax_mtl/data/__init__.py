"""Data: partitioners and mixtures for any data set, and the sets themselves."""

from fedjax_mtl.data import instruction_families, instructions, markov_chains
from fedjax_mtl.data.digits import load_digits
from fedjax_mtl.data.mixtures import (
    draw_clients,
    draw_components,
    draw_mixtures,
    hold_out_evenly,
    label_permutations,
    permute_labels,
    rotate_images,
)
from fedjax_mtl.data.partition import (
    dirichlet_labels,
    iid,
    label_shards,
    pachinko,
    split_clients,
)
from fedjax_mtl.data.problem import (
    Generation,
    PopulationSplits,
    Problem,
    ProblemGroup,
    one_group,
)
from fedjax_mtl.data.synthetic import SyntheticMixture, synthetic_mixture
from fedjax_mtl.data.synthetic_tasks import conflicting_tasks, scaled_tasks

__all__ = [
    "Generation",
    "PopulationSplits",
    "Problem",
    "ProblemGroup",
    "SyntheticMixture",
    "conflicting_tasks",
    "dirichlet_labels",
    "draw_clients",
    "draw_components",
    "draw_mixtures",
    "hold_out_evenly",
    "iid",
    "instruction_families",
    "instructions",
    "label_permutations",
    "label_shards",
    "load_digits",
    "markov_chains",
    "one_group",
    "pachinko",
    "permute_labels",
    "rotate_images",
    "scaled_tasks",
    "split_clients",
    "synthetic_mixture",
]
