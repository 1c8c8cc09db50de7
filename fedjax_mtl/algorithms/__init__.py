"""Published systems and their baselines, one file a system or family."""

from fedjax_mtl.algorithms._apfl import apfl
from fedjax_mtl.algorithms._clustered import clustered
from fedjax_mtl.algorithms._cocoa import cocoa
from fedjax_mtl.algorithms._ditto import ditto
from fedjax_mtl.algorithms._fairness import agnostic, q_ffl
from fedjax_mtl.algorithms._fedadam import fedadam
from fedjax_mtl.algorithms._fedamp import fedamp
from fedjax_mtl.algorithms._fedavg import fedavg, fedavg_tuned, fedprox, local
from fedjax_mtl.algorithms._fedbone import fedbone
from fedjax_mtl.algorithms._feddea import feddea
from fedjax_mtl.algorithms._fedem import decentralized_fedem, fedem, fedem_client
from fedjax_mtl.algorithms._fedgradnorm import fedgradnorm
from fedjax_mtl.algorithms._fedhca2 import fedhca2
from fedjax_mtl.algorithms._fedmtl import fedmtl
from fedjax_mtl.algorithms._fedu import fedu
from fedjax_mtl.algorithms._hota_fedgradnorm import hota_fedgradnorm
from fedjax_mtl.algorithms._l2sgd import l2sgd
from fedjax_mtl.algorithms._linear_models import global_model, local_models
from fedjax_mtl.algorithms._matfl import matfl
from fedjax_mtl.algorithms._minibatch_sdca import minibatch_sdca
from fedjax_mtl.algorithms._minibatch_sgd import minibatch_sgd
from fedjax_mtl.algorithms._mira import fedit, local_adapters, mira
from fedjax_mtl.algorithms._mocha import mocha
from fedjax_mtl.algorithms._partial import fedbn, fedper, fedrep, lg_fedavg
from fedjax_mtl.algorithms._pfedme import pfedme
from fedjax_mtl.algorithms._related import mixed_clients
from fedjax_mtl.algorithms._sheaf_fmtl import sheaf_fmtl

__all__ = [
    "agnostic",
    "apfl",
    "clustered",
    "cocoa",
    "decentralized_fedem",
    "ditto",
    "fedadam",
    "fedamp",
    "fedavg",
    "fedavg_tuned",
    "fedbn",
    "fedbone",
    "feddea",
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
