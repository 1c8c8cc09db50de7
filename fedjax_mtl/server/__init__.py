"""Server transformations: optax transformations over pseudo-gradients with a leading client axis."""

from fedjax_mtl.server.averaging import average_clients, clip_clients, step_from
from fedjax_mtl.server.fairness import agnostic_average, q_fair_average

__all__ = ["agnostic_average", "average_clients", "clip_clients", "q_fair_average", "step_from"]
