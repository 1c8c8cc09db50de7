"""Mixtures of distributions over clients, as FedEM assumes them, made from any data set.

Every client has weights over a few components, every example it owns is assigned to one of them,
and the component decides what happens to the example: its label is permuted, or its image rotated.
(The third way, label skew, is a partition: ``dirichlet_labels``.)
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from fedjax_mtl.core.checks import InputError


def draw_mixtures(
    num_clients: int, num_components: int, alpha: float, rng: np.random.Generator
) -> np.ndarray:
    """Draws each client's weights from Dirichlet(alpha), float ``[clients, components]``."""
    if num_components < 1:
        raise InputError(f"num_components is {num_components}; a mixture needs at least 1")
    if not alpha > 0:
        raise InputError(f"alpha is {alpha}; a Dirichlet concentration must be positive")
    return rng.dirichlet(np.full(num_components, alpha), size=num_clients)


def hold_out_evenly(mixtures: np.ndarray, num_held: int) -> np.ndarray:
    """Orders clients so that the first ones are spread evenly over easy and hard ones.

    How well a client can be served is bounded by its largest weight. A random choice of few
    held-out clients would differ from the others in that alone.

    Args:
        mixtures: ``[clients, components]``.
        num_held: how many clients, the first ones, are to be spread evenly.

    Returns:
        The same rows in another order, ``[clients, components]``.
    """
    if not num_held:
        return mixtures
    by_ceiling = np.argsort(mixtures.max(axis=1), kind="stable")
    places = (np.arange(num_held) + 0.5) * len(mixtures) / num_held
    held = by_ceiling[places.astype(int)]
    return mixtures[np.concatenate([held, np.setdiff1d(np.arange(len(mixtures)), held)])]


def draw_clients(
    pool: np.ndarray, num_clients: int, size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Draws each client's ``size`` different rows of a pool, independently of the other clients'.

    Clients that are samples of underlying distributions may hold the same image, each with what its
    own component makes of it; give training and test data pools that do not overlap.

    Raises:
        InputError: the pool is smaller than ``size``.
    """
    if not 1 <= size <= len(pool):
        raise InputError(
            f"a client cannot draw {size} different examples from a pool of {len(pool)}"
        )
    return [rng.choice(pool, size, replace=False) for _ in range(num_clients)]


def draw_components(
    rows: Sequence[np.ndarray], mixtures: np.ndarray, num_examples: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws the component of every example by its owner's weights, int ``[num_examples]``.

    It is -1 where nobody owns the example.

    Args:
        rows: the rows of each client.
        mixtures: the weights of each client, ``[clients, components]``.
        num_examples: in the table.
        rng: the source of randomness.

    Raises:
        InputError: two clients own the same example (it could not belong to both), or mixtures and
            rows differ in length.
    """
    if len(rows) != len(mixtures):
        raise InputError(f"{len(rows)} clients but {len(mixtures)} rows of mixture weights")
    components = np.full(num_examples, -1)
    for client, (own, weights) in enumerate(zip(rows, mixtures, strict=True)):
        if (components[own] >= 0).any():
            raise InputError(
                f"client {client} shares examples with another client; mixtures need disjoint "
                "clients"
            )
        components[own] = rng.choice(len(weights), size=len(own), p=weights)
    return components


def label_permutations(
    num_components: int, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws one permutation of the labels for each component, int ``[components, classes]``.

    The first is the identity.
    """
    others = [rng.permutation(num_classes) for _ in range(num_components - 1)]
    return np.stack([np.arange(num_classes), *others])


def permute_labels(
    labels: np.ndarray, components: np.ndarray, permutations: np.ndarray
) -> np.ndarray:
    """Returns ``permutations[component, label]`` of every example.

    Components then share the inputs and differ in p(y | x), as FedEM assumes.
    """
    return permutations[np.maximum(components, 0), labels].astype(labels.dtype)


def rotate_images(
    images: np.ndarray, components: np.ndarray, angles: Sequence[float]
) -> np.ndarray:
    """Turns images by their component's angle: components then differ in p(x).

    That goes beyond FedEM's assumption. Quarter turns of square images are exact; other angles are
    interpolated linearly and padded with zeros.

    Args:
        images: ``[n, h, w, c]``.
        components: int ``[n]``.
        angles: of each component, in degrees.
    """
    result = np.array(images)
    for component, angle in enumerate(angles):
        own = components == component
        turns, rest = divmod(angle, 90)
        if rest == 0 and images.shape[1] == images.shape[2]:
            result[own] = np.rot90(images[own], int(turns), axes=(1, 2))
        elif own.any():
            result[own] = ndimage.rotate(images[own], angle, axes=(2, 1), reshape=False, order=1)
    return result
