"""Published systems and their baselines, one file a system or family."""

from fedjax_mtl.algorithms.apfl import apfl
from fedjax_mtl.algorithms.clustered import clustered
from fedjax_mtl.algorithms.fairness import agnostic, q_ffl
from fedjax_mtl.algorithms.fedavg import fedavg, fedavg_tuned, fedprox, local
from fedjax_mtl.algorithms.fedbone import SplitGroup, fedbone
from fedjax_mtl.algorithms.fedem import decentralized_fedem, fedem, fedem_client
from fedjax_mtl.algorithms.fedgradnorm import fedgradnorm, hota_fedgradnorm
from fedjax_mtl.algorithms.l2sgd import l2sgd
from fedjax_mtl.algorithms.partial import fedbn, fedper, fedrep, lg_fedavg
from fedjax_mtl.algorithms.pfedme import pfedme

__all__ = [
    "SplitGroup",
    "agnostic",
    "apfl",
    "clustered",
    "decentralized_fedem",
    "fedavg",
    "fedavg_tuned",
    "fedbn",
    "fedbone",
    "fedem",
    "fedem_client",
    "fedgradnorm",
    "fedper",
    "fedprox",
    "fedrep",
    "hota_fedgradnorm",
    "l2sgd",
    "lg_fedavg",
    "local",
    "pfedme",
    "q_ffl",
]
