"""Which entries of a model's parameters are its head, and other parts that systems ask for."""

from collections.abc import Mapping, Sequence

import jax

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.model import Model

HEADS = ("decoder", "decoders", "heads", "task_embedding", "uppers")
"""The top-level entries that are a client's own where a system shares all but the head."""


def in_head(path: trees.Path) -> bool:
    """Selects the leaves of the head, in every model of this library."""
    return trees.under(*HEADS)(path)


def in_body(path: trees.Path) -> bool:
    """Selects the leaves that are not of the head."""
    return not in_head(path)


def entries(model: Model | Mapping[str, Model]) -> list[str]:
    """The top-level entries of a model's parameters, or of those of all groups' models."""
    models = model.values() if isinstance(model, Mapping) else [model]
    key = jax.random.key(0)
    return sorted({name for one in models for name in jax.eval_shape(one.init, key)})


def under_entries(
    model: Model | Mapping[str, Model], names: str | Sequence[str]
) -> trees.PathPredicate:
    """Selects the leaves below some top-level entries of a model.

    Args:
        model: one that has them, or models by group of which one has.
        names: the entries, or the one.

    Raises:
        InputError: the model has no such entry.
    """
    wanted, known = (names,) if isinstance(names, str) else tuple(names), entries(model)
    for name in wanted:
        if name not in known:
            raise InputError(
                f"the model's parameters have no entry {name!r}; expected some of "
                f"{', '.join(known)}"
            )
    return trees.under(*wanted)


def last_body_kernel(model: Model) -> trees.PathPredicate:
    """Selects the kernel of the last layer of the body, where GradNorm measures.

    Args:
        model: :func:`fedjax_mtl.models.body_and_head`, whose body is ``encoder/dense_<i>``.

    Raises:
        InputError: a model without encoder and decoder.
    """
    params = jax.eval_shape(model.init, jax.random.key(0))
    if "encoder" not in params or "decoder" not in params:
        raise InputError(
            "the norms are measured in the last layer of a body, and this model has none; use "
            "--config.model.name=body_and_head"
        )
    last = f"dense_{len(params['encoder']) - 1}"
    return lambda path: last in path and path[-1] == "kernel"
