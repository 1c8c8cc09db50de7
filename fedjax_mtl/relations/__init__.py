"""How tasks and clients are related: covariances, graphs, gossip."""

from fedjax_mtl.relations import covariance, gossip, graphs

__all__ = ["covariance", "gossip", "graphs"]
