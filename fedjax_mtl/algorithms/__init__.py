"""Published systems and their baselines, one file a system or family."""

from fedjax_mtl.algorithms.apfl import apfl
from fedjax_mtl.algorithms.clustered import clustered
from fedjax_mtl.algorithms.fairness import agnostic, q_ffl
from fedjax_mtl.algorithms.fedavg import fedavg, fedavg_tuned, fedprox, local
from fedjax_mtl.algorithms.fedem import decentralized_fedem, fedem, fedem_client
from fedjax_mtl.algorithms.l2sgd import l2sgd
from fedjax_mtl.algorithms.pfedme import pfedme

__all__ = [
    "agnostic",
    "apfl",
    "clustered",
    "decentralized_fedem",
    "fedavg",
    "fedavg_tuned",
    "fedem",
    "fedem_client",
    "fedprox",
    "l2sgd",
    "local",
    "pfedme",
    "q_ffl",
]
