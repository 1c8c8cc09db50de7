"""What all parameter-efficient models share: trained ``adapters`` beside a frozen ``base``.

Both stand at the top of the parameters.
"""

from typing import Any

import jax.numpy as jnp

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError

PyTree = Any

trained = trees.under("adapters")
"""Selects what clients train and send."""

base = trees.under("base")
"""Selects the frozen weights, which the server and all clients hold once.

Train with ``frozen=adapters.base``.
"""


def load_base(params: PyTree, weights: PyTree) -> PyTree:
    """Returns the parameters with other frozen weights, e.g. of a checkpoint.

    Args:
        params: of a model with ``adapters`` and ``base``; leading axes, such as seeds, may stand
            before those of the weights, which are then repeated.
        weights: of the base model; they take the place of the frozen ones.

    Raises:
        InputError: parameters without a base, or weights of another structure or shape; the message
            names the first leaf that differs.
    """
    if not isinstance(params, dict) or "base" not in params:
        raise InputError(
            "this algorithm's model has no frozen base; give base weights to one with adapters only"
        )
    old, new = trees.leaves_by_path(params["base"]), trees.leaves_by_path(weights)
    odd = sorted(set(old) ^ set(new))
    if odd:
        where = "missing from" if odd[0] in old else "not in the model but in"
        raise InputError(f"{'/'.join(odd[0])} is {where} the weights; they are of another model")
    for path, leaf in old.items():
        lead = leaf.ndim - new[path].ndim
        if lead < 0 or leaf.shape[lead:] != new[path].shape:
            raise InputError(
                f"{'/'.join(path)} has shape {new[path].shape} in the weights but {leaf.shape} in "
                "the model; check its configuration"
            )
    filled = {
        path: jnp.broadcast_to(new[path], leaf.shape).astype(leaf.dtype)
        for path, leaf in old.items()
    }
    return {**params, "base": trees.from_paths(filled)}
