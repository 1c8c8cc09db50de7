"""Client-level differential privacy (DP-FedAvg, McMahan et al., arXiv 1710.06963)."""

import jax
import jax.numpy as jnp
import optax

from fedjax_mtl.core import trees
from fedjax_mtl.core.checks import InputError


def private_average(
    max_norm: float | jax.Array,
    noise_multiplier: float | jax.Array,
    *,
    expected_clients: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips every client's update and adds Gaussian noise to their sum.

        (sum_c clip(update_c, max_norm) + N(0, (noise_multiplier * max_norm)^2)) / expected_clients

    ``[clients, ...] -> [...]``. All clients weigh the same: weights by data size would need a
    sensitivity of their own. Clipping is optax's. The privacy spent is not accounted here; with
    cohorts sampled at random use an accountant for the sampled Gaussian mechanism.

    Args:
        max_norm: the largest l2 norm of a client's update, over all leaves.
        noise_multiplier: standard deviation of the noise, relative to ``max_norm``.
        expected_clients: a fixed denominator, so that who came is not revealed; default the number
            of the cohort's slots.

    Extra arguments used: ``key`` (required), ``present``.
    """

    def update(updates, state, params=None, *, key=None, present=None, **extra_args):
        del params, extra_args
        if key is None:
            raise InputError("private_average draws noise and needs the extra argument key")
        leaves, structure = jax.tree.flatten(trees.mask_clients(updates, present))
        # Optax sums the clients' rows by a matrix product of the default precision.
        with jax.default_matmul_precision("highest"):
            total, _ = optax.per_example_global_norm_clip(leaves, max_norm)
        noise = optax.tree.random_like(key, total, sampler=jax.random.normal)
        number = leaves[0].shape[0] if expected_clients is None else expected_clients
        noisy = jax.tree.map(
            lambda t, z: (t + noise_multiplier * max_norm * z) / jnp.asarray(number, t.dtype),
            total,
            noise,
        )
        return jax.tree.unflatten(structure, noisy), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
