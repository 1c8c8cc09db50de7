"""LoRA: low-rank adapters beside frozen weights (Hu et al., arXiv 2106.09685).

They go around any model whose dense layers are flax's. Nothing in the model is rewritten: its dense
layers are found by path and intercepted where they are called, and the product of the adapters is
never formed. Under ``vmap`` over clients with adapters of their own, the frozen weights stay one
array, multiplied with all clients' activations at once.
"""

import fnmatch
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.models.dense_layer import Dense

PyTree = Any
_DENSE = (nn.Dense, Dense)


class DenseShape(NamedTuple):
    """The shape of a dense layer.

    Attributes:
        inputs: how many values go in.
        outputs: how many values come out.
    """

    inputs: int
    outputs: int


def dense_layers(model: Any) -> dict[trees.Path, DenseShape]:
    """Returns the dense layers that a model calls, by path. No array is made."""
    found: dict[trees.Path, DenseShape] = {}

    def record(call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        outputs = call(*args, **kwargs)
        if isinstance(context.module, _DENSE) and context.method_name == "__call__":
            found[tuple(context.module.path)] = DenseShape(args[0].shape[-1], outputs.shape[-1])
        return outputs

    with nn.intercept_methods(record):
        # A function of its own: a trace of model.init that is cached would call nothing.
        jax.eval_shape(lambda key: model.init(key), jax.random.key(0))
    return found


def matching_layers(model: Any, targets: Sequence[str]) -> dict[trees.Path, DenseShape]:
    """Returns the dense layers whose path matches one of the patterns.

    Args:
        model: the model.
        targets: patterns of paths joined by ``/``, e.g. ``*/attention/query`` or ``blocks_0/*``.

    Raises:
        InputError: a pattern that matches no layer (the message lists the layers there are), or no
            pattern.
    """
    layers = dense_layers(model)
    names = {"/".join(path): path for path in layers}
    chosen: dict[trees.Path, DenseShape] = {}
    for pattern in targets:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise InputError(
                f"the adapter pattern {pattern!r} matches no dense layer of the model; it has "
                f"{', '.join(sorted(names)) or 'none'}"
            )
        chosen |= {names[name]: layers[names[name]] for name in matched}
    if not chosen:
        raise InputError(
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
    """Adds low-rank adapters to every targeted dense layer of a model.

    Such a layer computes ``y = x W + b + (alpha / rank) drop(x) A B``. The parameters become
    ``{"adapters": {layer: {"a": [inputs, rank], "b": [rank, outputs]}}, "base": the model's}``
    (A and B of the papers transposed, as kernels are in flax). Train with ``frozen=adapters.base``:
    only adapters then get gradients, optimiser state and traffic. B starts at 0, so the first
    outputs are the base model's.

    Args:
        model: a :class:`~fedjax_mtl.models.Model`, or any NamedTuple with ``init`` whose functions
            take parameters first (``apply``, a language model's ``step``).
        targets: patterns of layers, see :func:`matching_layers`.
        rank: of the adapters.
        alpha: the adapters are scaled by ``alpha / rank``. The default is ``rank``, for a scale of
            1: MIRA's formula has none, implementations do.
        dropout: rate on the adapters' inputs, in training (``apply`` with a key).
        deviation: standard deviation of A; default ``1 / sqrt(inputs)``.

    Raises:
        InputError: no layer matches, or a rank or rate that makes no sense.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise InputError(f"LoRA takes rank >= 1 and 0 <= dropout < 1, got {rank} and {dropout}")
    layers = matching_layers(model, targets)
    scale = 1.0 if alpha is None else alpha / rank

    def init(key: jax.Array) -> PyTree:
        base_key, own_key = jax.random.split(key)
        return {"adapters": new_adapters(own_key), "base": model.init(base_key)}

    def new_adapters(key: jax.Array) -> PyTree:
        leaves = {}
        for index, (path, shape) in enumerate(sorted(layers.items())):
            size = deviation or shape.inputs**-0.5
            normal = jax.random.normal(jax.random.fold_in(key, index), (shape.inputs, rank))
            leaves[(*path, "a")] = size * normal
            leaves[(*path, "b")] = jnp.zeros((rank, shape.outputs))
        return trees.from_paths(leaves)

    def apply(params: PyTree, inputs: PyTree, key: jax.Array | None = None) -> PyTree:
        with _adapted(params["adapters"], layers, scale, dropout, key):
            return model.apply(params["base"], inputs, key)

    def adapted(fn: Callable[..., Any]) -> Callable[..., Any]:
        def with_adapters(params: PyTree, *arguments: PyTree) -> PyTree:
            with _adapted(params["adapters"], layers, scale, 0.0, None):
                return fn(params["base"], *arguments)

        return with_adapters

    changed = {"init": init, "apply": apply}
    if hasattr(model, "step"):
        changed["step"] = adapted(model.step)
    return model._replace(**changed)


def _adapted(
    tree: PyTree,
    layers: dict[trees.Path, DenseShape],
    scale: float,
    dropout: float,
    key: jax.Array | None,
) -> Any:
    """Returns a context in which the model's dense layers add their adapters."""

    def add(call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
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
    """Adds the adapters' product to the base model's kernels, e.g. to export one client's model.

    Args:
        params: of a model made by :func:`lora`.
        rank: as given to :func:`lora`.
        alpha: as given to :func:`lora`.

    Returns:
        The parameters of the base model.
    """
    scale = 1.0 if alpha is None else alpha / rank
    leaves = trees.leaves_by_path(params["base"])
    low = trees.leaves_by_path(params["adapters"])
    for path in dict.fromkeys(path[:-1] for path in low):
        product = jnp.matmul(
            low[(*path, "a")], low[(*path, "b")], precision=jax.lax.Precision.HIGHEST
        )
        kernel = leaves[(*path, "kernel")]
        leaves[(*path, "kernel")] = kernel + (scale * product).astype(kernel.dtype)
    return trees.from_paths(leaves)


def num_adapter_parameters(model: Any, targets: Sequence[str], rank: int) -> int:
    """Returns how many parameters one client trains and sends.

    It is ``sum rank (inputs + outputs)`` over the targeted layers.
    """
    return sum(
        rank * (shape.inputs + shape.outputs) for shape in matching_layers(model, targets).values()
    )
