"""Data: partitioners and mixtures for any data set, and the sets themselves."""

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
from fedjax_mtl.data.synthetic import SyntheticMixture, synthetic_mixture

__all__ = [
    "SyntheticMixture",
    "dirichlet_labels",
    "draw_clients",
    "draw_components",
    "draw_mixtures",
    "hold_out_evenly",
    "iid",
    "label_permutations",
    "label_shards",
    "load_digits",
    "pachinko",
    "permute_labels",
    "rotate_images",
    "split_clients",
    "synthetic_mixture",
]
