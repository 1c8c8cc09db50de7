"""LoRA: low-rank adapters beside frozen weights, around any model whose dense layers are flax's (Hu et al., arXiv 2106.09685).

Nothing in the model is rewritten: its dense layers are found by path and intercepted where they are called, and the product of the adapters is never formed. Under ``vmap`` over
clients with adapters of their own, the frozen weights stay one array, multiplied with all clients' activations at once.
"""

import fnmatch
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_mtl.core import trees
from fedjax_mtl.models.dense import Dense

PyTree = Any
_DENSE = (nn.Dense, Dense)


class DenseShape(NamedTuple):
    """Inputs and outputs of a dense layer."""

    inputs: int
    outputs: int


def dense_layers(model: Any) -> dict[trees.Path, DenseShape]:
    """The dense layers that a model calls, by path. No array is made."""
    found: dict[trees.Path, DenseShape] = {}

    def record(call, args, kwargs, context):
        outputs = call(*args, **kwargs)
        if isinstance(context.module, _DENSE) and context.method_name == "__call__":
            found[tuple(context.module.path)] = DenseShape(args[0].shape[-1], outputs.shape[-1])
        return outputs

    with nn.intercept_methods(record):
        # A function of its own: a trace of model.init that is cached would call nothing.
        jax.eval_shape(lambda key: model.init(key), jax.random.key(0))
    return found


def matching_layers(model: Any, targets: Sequence[str]) -> dict[trees.Path, DenseShape]:
    """The dense layers whose path, joined by ``/``, matches one of the patterns, e.g. ``*/attention/query`` or ``blocks_0/*``.

    Raises:
        ValueError: a pattern that matches no layer, with the layers there are.
    """
    layers = dense_layers(model)
    names = {"/".join(path): path for path in layers}
    chosen = {}
    for pattern in targets:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ValueError(
                f"the adapter pattern {pattern!r} matches no dense layer of the model; it has {', '.join(sorted(names)) or 'none'}"
            )
        chosen |= {names[name]: layers[names[name]] for name in matched}
    if not chosen:
        raise ValueError(
            "LoRA needs at least one target, a pattern of dense layers such as '*/attention/*'"
        )
    return chosen


def lora(
    model: Any,
    *,
    targets: Sequence[str],
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    deviation: float | None = None,
) -> Any:
    """The model with low-rank adapters: ``y = x W + b + (alpha / rank) drop(x) A B`` at every targeted dense layer.

    Parameters become ``{"adapters": {layer: {"a": [inputs, rank], "b": [rank, outputs]}}, "base": the model's}`` (A and B of the papers transposed, as kernels are in flax). Train with
    ``frozen=adapters.base``: only adapters then get gradients, optimiser state and traffic. B starts at 0, so the first outputs are the base model's.

    Args:
        model: a :class:`~fedjax_mtl.models.Model`, or any NamedTuple with ``init`` whose functions take parameters first (``apply``, a language model's ``step``).
        targets: patterns of layers, see :func:`matching_layers`. rank: of the adapters.
        alpha: scale is ``alpha / rank``; default ``rank`` (scale 1: MIRA's formula has none, implementations do).
        dropout: rate on the adapters' inputs, in training (``apply`` with a key).
        deviation: standard deviation of A; default ``1 / sqrt(inputs)``.

    Raises:
        ValueError: no layer matches, or a rank or rate that makes no sense.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise ValueError(f"LoRA takes rank >= 1 and 0 <= dropout < 1, got {rank} and {dropout}")
    layers = matching_layers(model, targets)
    scale = 1.0 if alpha is None else alpha / rank

    def init(key):
        base_key, own_key = jax.random.split(key)
        return {"adapters": new_adapters(own_key), "base": model.init(base_key)}

    def new_adapters(key):
        leaves = {}
        for index, (path, shape) in enumerate(sorted(layers.items())):
            size = deviation or shape.inputs**-0.5
            normal = jax.random.normal(jax.random.fold_in(key, index), (shape.inputs, rank))
            leaves[(*path, "a")] = size * normal
            leaves[(*path, "b")] = jnp.zeros((rank, shape.outputs))
        return trees.from_paths(leaves)

    def apply(params, inputs, key=None):
        with _adapted(params["adapters"], layers, scale, dropout, key):
            return model.apply(params["base"], inputs, key)

    def adapted(fn):
        def with_adapters(params, *arguments):
            with _adapted(params["adapters"], layers, scale, 0.0, None):
                return fn(params["base"], *arguments)

        return with_adapters

    changed = {"init": init, "apply": apply}
    if hasattr(model, "step"):
        changed["step"] = adapted(model.step)
    return model._replace(**changed)


def _adapted(
    tree: PyTree, layers: dict, scale: float, dropout: float, key: jax.Array | None
) -> Any:
    """A context in which the model's dense layers add their adapters."""

    def add(call, args, kwargs, context):
        outputs = call(*args, **kwargs)
        path = tuple(context.module.path)
        if context.method_name != "__call__" or path not in layers:
            return outputs
        own = tree
        for name in path:
            own = own[name]
        x = args[0]
        if dropout and key is not None:
            # One mask a layer, whatever the order in which layers are called.
            layer_key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
            kept = jax.random.bernoulli(layer_key, 1 - dropout, x.shape)
            x = jnp.where(kept, x / (1 - dropout), 0)
        low = x.astype(own["a"].dtype) @ own["a"]
        return outputs + (scale * (low @ own["b"])).astype(outputs.dtype)

    return nn.intercept_methods(add)


def merge(params: PyTree, *, rank: int, alpha: float | None = None) -> PyTree:
    """The base model's parameters with the adapters' product added to its kernels, e.g. to export one client's model."""
    scale = 1.0 if alpha is None else alpha / rank
    leaves = trees.leaves_by_path(params["base"])
    low = trees.leaves_by_path(params["adapters"])
    for path in dict.fromkeys(path[:-1] for path in low):
        product = low[(*path, "a")] @ low[(*path, "b")]
        kernel = leaves[(*path, "kernel")]
        leaves[(*path, "kernel")] = kernel + (scale * product).astype(kernel.dtype)
    return trees.from_paths(leaves)


def num_adapter_parameters(model: Any, targets: Sequence[str], rank: int) -> int:
    """``sum rank (inputs + outputs)`` over the targeted layers: what one client trains and sends."""
    return sum(
        rank * (shape.inputs + shape.outputs) for shape in matching_layers(model, targets).values()
    )
