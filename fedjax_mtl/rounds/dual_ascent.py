"""The data-local subproblem of MOCHA, for ONE node, and its solver: coordinate ascent in the dual.

Nothing in here has a task axis.

With ``u(d) = X^T d / n``, a node that holds the examples X (n rows), the dual variables alpha and
its model w minimises over the change d

    G(d) = mean_i conj(-(alpha_i + d_i)) + w . u(d) + curvature / 2 ||u(d)||^2
    curvature = sigma' Sigma_tt / penalty

(Smith et al., arXiv 1705.10467, section 3.2; sigma' makes the sum of the nodes' subproblems an
upper bound of the coupled problem).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_mtl.tasks.dual import DualLoss

# Dual variables and models belong together to the last digit, but some devices round the factors of
# a matrix product unless told not to.
full_precision = jax.default_matmul_precision("highest")


class Subproblem(NamedTuple):
    """One node's problem of one round.

    Attributes:
        inputs: ``[capacity, features]``; rows at and beyond ``size`` are padding.
        labels: ``[capacity]``.
        size: int32 ``[]``, how many of the rows are examples.
        alpha: ``[capacity]``, the dual variables.
        weights: ``[features]``, the node's model at the start of the round.
        curvature: ``[]``, sigma' Sigma_tt / penalty.
    """

    inputs: jax.Array
    labels: jax.Array
    size: jax.Array
    alpha: jax.Array
    weights: jax.Array
    curvature: jax.Array

    def mean(self, values: jax.Array) -> jax.Array:
        """The mean of ``[capacity]`` values over the real examples."""
        real = jnp.arange(values.shape[0]) < self.size
        return jnp.sum(jnp.where(real, values, 0)) / jnp.maximum(self.size, 1)

    @full_precision
    def combine(self, change: jax.Array) -> jax.Array:
        """``u = X^T d / n`` ``[features]`` of a change d ``[capacity]``; padding does not count."""
        real = jnp.arange(change.shape[0]) < self.size
        return jnp.where(real, change, 0) @ self.inputs / jnp.maximum(self.size, 1)


class Change(NamedTuple):
    """What local work leaves.

    Attributes:
        alpha: ``[capacity]``, the change d of the dual variables.
        combined: ``[features]``, ``X^T d / n``.
        num_steps: int32 ``[]``, coordinate steps done.
    """

    alpha: jax.Array
    combined: jax.Array
    num_steps: jax.Array


def no_change(problem: Subproblem) -> Change:
    """The change of a node that does nothing."""
    return Change(
        jnp.zeros_like(problem.alpha), jnp.zeros_like(problem.weights), jnp.zeros((), jnp.int32)
    )


def coordinate_ascent(
    loss: DualLoss,
    problem: Subproblem,
    order: jax.Array,
    num_steps: jax.Array,
    max_steps: int,
    *,
    start: Change | None = None,
    feedback: bool = True,
) -> Change:
    """SDCA: coordinate by coordinate, the exact maximiser of the dual.

    Shalev-Shwartz and Zhang, JMLR 2013. Pass by pass: within a pass no coordinate is visited twice,
    so that the dual variables are only read, and written once at its end. (Written step by step,
    XLA may copy all of them every time.)

    Args:
        loss: the examples' loss.
        problem: the node's.
        order: int32 ``[capacity]``, a permutation of the real positions first; walked from its
            start, cyclically.
        num_steps: int32 ``[]``, coordinate steps of this node; 0 for one that was dropped.
        max_steps: the most any node makes.
        start: continue from this change; default none.
        feedback: False leaves the scores as at the start of the round (mini-batch SDCA), while each
            alpha still moves.
    """
    start = no_change(problem) if start is None else start
    size = jnp.maximum(problem.size, 1)
    num_steps = jnp.where(problem.size > 0, jnp.minimum(num_steps, max_steps), 0)
    rows = order[:max_steps]
    slots = jnp.arange(rows.shape[0])
    scores = problem.inputs @ problem.weights
    squared_norms = jnp.sum(jnp.square(problem.inputs), axis=1)

    def one_pass(carry):
        done, alpha, combined = carry

        def step(combined, slot):
            i = rows[slot]
            x, squared_norm, old = problem.inputs[i], squared_norms[i], alpha[i]
            score = scores[i] + (problem.curvature * (x @ combined) if feedback else 0)
            moves = (slot < size) & (done + slot < num_steps) & (squared_norm > 0)
            curvature = jnp.where(moves, problem.curvature * squared_norm / size, 1)
            best = loss.ascend(old, problem.labels[i], score, curvature)
            change = jnp.where(moves, best - old, 0)
            return combined + change / size * x, change

        combined, changes = jax.lax.scan(step, combined, slots)
        return done + size, alpha.at[rows].add(changes), combined

    carry = (jnp.zeros_like(size), problem.alpha + start.alpha, start.combined)
    _, alpha, combined = jax.lax.while_loop(lambda carry: carry[0] < num_steps, one_pass, carry)
    return Change(alpha - problem.alpha, combined, start.num_steps + num_steps)


def local_objective(loss: DualLoss, problem: Subproblem, change: jax.Array) -> jax.Array:
    """``G(d)`` of a change d ``[capacity]``, ``[]``; what the node minimises."""
    combined = problem.combine(change)
    conjugates = problem.mean(loss.conjugate(problem.alpha + change, problem.labels))
    return (
        conjugates
        + problem.weights @ combined
        + problem.curvature / 2 * jnp.sum(jnp.square(combined))
    )


def local_gap(loss: DualLoss, problem: Subproblem, change: jax.Array) -> jax.Array:
    """An upper bound of ``G(d) - min G``, ``[]``: the subproblem's own duality gap.

    It is taken at the model ``z = w + curvature u(d)`` that the node would have. By Fenchel duality
    ``min G >= -mean_i loss(x_i . z) - ||z - w||^2 / (2 curvature) - z . u(alpha)`` for every z; it
    is zero at the exact solution.
    """
    combined = problem.combine(change)
    z = problem.weights + problem.curvature * combined
    losses = problem.mean(loss.loss(problem.inputs @ z, problem.labels))
    lower = (
        -losses
        - problem.curvature / 2 * jnp.sum(jnp.square(combined))
        - z @ problem.combine(problem.alpha)
    )
    return jnp.maximum(local_objective(loss, problem, change) - lower, 0)


def inexactness_bound(loss: DualLoss, problem: Subproblem, change: jax.Array) -> jax.Array:
    """An upper bound of theta, ``[]`` in [0, 1]; no further solve is needed.

        theta = (G(d) - min G) / (G(0) - min G):   0 solved exactly, 1 no progress

    (arXiv 1705.10467, definition of the per-node, per-round approximation.) A subproblem whose
    start is already optimal counts as solved.
    """
    gap = local_gap(loss, problem, change)
    progress = local_objective(loss, problem, jnp.zeros_like(change)) - local_objective(
        loss, problem, change
    )
    total = gap + jnp.maximum(progress, 0)
    solved = total <= 0  # false for a node whose data are no numbers: its theta is none either
    return jnp.where(solved, 0, gap / jnp.where(solved, 1, total))


def ascend_until(
    loss: DualLoss, problem: Subproblem, order: jax.Array, inexactness: float, max_passes: int
) -> Change:
    """Passes over the node's data until its theta is certainly low: CoCoA's common theta.

    Args:
        loss: the examples' loss.
        problem: the node's.
        order: int32 ``[capacity]``, in which each pass goes through the data.
        inexactness: the passes end when :func:`inexactness_bound` is at most this.
        max_passes: or after as many.
    """

    def measure(change):
        return inexactness_bound(loss, problem, change.alpha)

    def far(bound, before):
        del before
        return bound > inexactness

    return _passes_while(far, measure, loss, problem, order, max_passes)


def ascend_until_still(
    loss: DualLoss, problem: Subproblem, order: jax.Array, tolerance: float, max_passes: int
) -> Change:
    """Passes over the node's data until its own primal stands still.

    The stopping test of MOCHA's released code for its local and global models. The primal need not
    fall from pass to pass, so a node may stop far from its optimum.

    Args:
        loss: the examples' loss.
        problem: the node's.
        order: int32 ``[capacity]``, in which each pass goes through the data.
        tolerance: the passes end when :func:`own_primal` changes by less from one to the next.
        max_passes: or after as many.
    """

    def measure(change):
        return own_primal(loss, problem, change.combined)

    def moving(primal, before):
        return jnp.abs(primal - before) >= tolerance

    return _passes_while(moving, measure, loss, problem, order, max_passes)


def own_primal(loss: DualLoss, problem: Subproblem, combined: jax.Array) -> jax.Array:
    """A lone task's primal, ``mean_i loss(x_i . z) + ||z||^2 / (2 curvature)``, ``[]``.

    It is taken at the node's model after its own work, ``z = w + curvature u(d)``.
    """
    z = problem.weights + problem.curvature * combined
    losses = problem.mean(loss.loss(problem.inputs @ z, problem.labels))
    return losses + jnp.sum(jnp.square(z)) / (2 * problem.curvature)


def _passes_while(
    unfinished: Callable[[jax.Array, jax.Array], jax.Array],
    measure: Callable[[Change], jax.Array],
    loss: DualLoss,
    problem: Subproblem,
    order: jax.Array,
    max_passes: int,
) -> Change:
    """Whole passes while ``unfinished(measure(change), measure(change one pass before))``.

    At the start the latter is infinite.
    """
    capacity = problem.alpha.shape[0]

    def more(carry):
        passes, _, value, before = carry
        # A node whose data are no numbers makes one pass, whose change shows it.
        broken = (passes == 0) & ~jnp.isfinite(value)
        goes_on = unfinished(value, before) | broken
        return (passes < max_passes) & goes_on & (problem.size > 0)

    def one_pass(carry):
        passes, change, value, _ = carry
        change = coordinate_ascent(loss, problem, order, problem.size, capacity, start=change)
        return passes + 1, change, measure(change), value

    start = no_change(problem)
    never = jnp.asarray(jnp.inf, problem.weights.dtype)
    first = (jnp.zeros((), jnp.int32), start, measure(start), never)
    return jax.lax.while_loop(more, one_pass, first)[1]
