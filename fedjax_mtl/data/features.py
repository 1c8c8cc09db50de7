"""Features for linear models: standardisation, an intercept, random Fourier features, an encoder.

Each function maps Splits to Splits over a new table of inputs. Nothing but training examples
decides what it does.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import Federation, Splits


def _with(splits: Splits, name: str, values: Any) -> Splits:
    def change(federation: Any) -> Any:
        if federation is None:
            return None
        return federation._replace(examples={**federation.examples, name: jnp.asarray(values)})

    return Splits(*map(change, splits))


def _own_rows(federation: Federation | None) -> list[np.ndarray]:
    if federation is None:
        return []
    indices, sizes = np.asarray(federation.indices), np.asarray(federation.sizes)
    return [own[:size] for own, size in zip(indices, sizes, strict=True)]


def standardise(splits: Splits, *, per_client: bool = False) -> Splits:
    """Brings columns to mean 0 and population standard deviation 1 of the training examples.

    Constant columns stay as they are.

    Args:
        splits: with ``inputs`` ``[num_examples, features]``.
        per_client: use each client's own training statistics (held-out clients theirs) instead of
            the pooled ones.
    """
    stored = np.asarray(splits.train.examples["inputs"])
    inputs = stored.astype(np.float64)

    def scaled(rows: np.ndarray, statistics: np.ndarray) -> np.ndarray:
        constant = statistics.max(axis=0) == statistics.min(axis=0)
        mean, std = statistics.mean(axis=0), statistics.std(axis=0)
        return (inputs[rows] - np.where(constant, 0, mean)) / np.where(constant, 1, std)

    result = stored.copy()
    pairs = [(splits.train, splits.test), (splits.unseen_train, splits.unseen_test)]
    pooled = inputs[np.concatenate(_own_rows(splits.train))]
    for train, test in pairs:
        for own, held in zip(_own_rows(train), _own_rows(test), strict=True):
            rows = np.concatenate([own, held])
            result[rows] = scaled(rows, inputs[own] if per_client else pooled)
    return _with(splits, "inputs", result)


def centre_labels(splits: Splits) -> Splits:
    """Subtracts the mean of all clients' training labels from real labels."""
    labels = np.asarray(splits.train.examples["labels"])
    mean = labels[np.concatenate(_own_rows(splits.train))].mean(dtype=np.float64)
    return _with(splits, "labels", labels - mean.astype(labels.dtype))


def append_intercept(splits: Splits, value: float = 1.0) -> Splits:
    """Appends a column of ``value``.

    A large value (MOCHA's second code: 10) leaves the intercept nearly unpenalised.
    """
    inputs = np.asarray(splits.train.examples["inputs"])
    return _with(
        splits,
        "inputs",
        np.concatenate([inputs, np.full((len(inputs), 1), value, inputs.dtype)], axis=1),
    )


def random_fourier(
    splits: Splits, *, num_features: int, bandwidth: float, key: jax.Array
) -> Splits:
    """Maps inputs to random features of a Gaussian kernel, the same for all clients.

    They are ``sqrt(2 / D) cos(x W / bandwidth + b)`` (Rahimi and Recht, NeurIPS 2007). A convex
    method for linear models, MOCHA, then learns non-linear ones, without any client showing its
    examples.

    Args:
        splits: with ``inputs`` ``[num_examples, features]``.
        num_features: D.
        bandwidth: of the kernel.
        key: of the random W and b.

    Raises:
        InputError: no features, or a bandwidth that is not positive.
    """
    if num_features < 1 or bandwidth <= 0:
        raise InputError(
            f"random_fourier takes num_features >= 1 and bandwidth > 0, got {num_features} and "
            f"{bandwidth}"
        )
    inputs = splits.train.examples["inputs"]
    weight_key, shift_key = jax.random.split(key)
    weights = (
        jax.random.normal(weight_key, (inputs.shape[1], num_features), inputs.dtype) / bandwidth
    )
    shift = jax.random.uniform(shift_key, (num_features,), inputs.dtype, 0, 2 * jnp.pi)
    return _with(splits, "inputs", jnp.sqrt(2 / num_features) * jnp.cos(inputs @ weights + shift))


def encode_inputs(
    splits: Splits, encoder: Callable[[jax.Array], jax.Array], batch_size: int = 1024
) -> Splits:
    """Replaces the inputs by the outputs of a frozen shared encoder.

    Args:
        splits: with ``inputs`` ``[num_examples, ...]``.
        encoder: ``inputs [batch, ...] -> [batch, features]``.
        batch_size: examples encoded at a time.
    """
    inputs = splits.train.examples["inputs"]
    run = jax.jit(encoder)
    parts = [run(inputs[start : start + batch_size]) for start in range(0, len(inputs), batch_size)]
    return _with(splits, "inputs", jnp.concatenate(parts))
