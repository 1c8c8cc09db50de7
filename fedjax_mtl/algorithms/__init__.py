"""Published systems and their baselines, one file a system or family."""

from fedjax_mtl.algorithms.anchored import ditto, fedamp, fedmtl
from fedjax_mtl.algorithms.apfl import apfl
from fedjax_mtl.algorithms.clustered import clustered
from fedjax_mtl.algorithms.fairness import agnostic, q_ffl
from fedjax_mtl.algorithms.fedavg import fedavg, fedavg_tuned, fedprox, local
from fedjax_mtl.algorithms.fedbone import fedbone
from fedjax_mtl.algorithms.fedem import decentralized_fedem, fedem, fedem_client
from fedjax_mtl.algorithms.fedgradnorm import fedgradnorm, hota_fedgradnorm
from fedjax_mtl.algorithms.l2sgd import l2sgd
from fedjax_mtl.algorithms.mira import fedit, local_adapters, mira
from fedjax_mtl.algorithms.mocha import mocha
from fedjax_mtl.algorithms.mocha_baselines import (
    cocoa,
    global_model,
    local_models,
    minibatch_sdca,
    minibatch_sgd,
)
from fedjax_mtl.algorithms.partial import fedbn, fedper, fedrep, lg_fedavg
from fedjax_mtl.algorithms.pfedme import pfedme
from fedjax_mtl.algorithms.relations import fedhca2, fedu, matfl, mixed_clients, sheaf_fmtl
from fedjax_mtl.lock_step import SplitGroup

__all__ = [
    "SplitGroup",
    "agnostic",
    "apfl",
    "clustered",
    "cocoa",
    "decentralized_fedem",
    "ditto",
    "fedamp",
    "fedavg",
    "fedavg_tuned",
    "fedbn",
    "fedbone",
    "fedem",
    "fedem_client",
    "fedgradnorm",
    "fedhca2",
    "fedit",
    "fedmtl",
    "fedper",
    "fedprox",
    "fedrep",
    "fedu",
    "global_model",
    "hota_fedgradnorm",
    "l2sgd",
    "lg_fedavg",
    "local",
    "local_adapters",
    "local_models",
    "matfl",
    "minibatch_sdca",
    "minibatch_sgd",
    "mira",
    "mixed_clients",
    "mocha",
    "pfedme",
    "q_ffl",
    "sheaf_fmtl",
]
