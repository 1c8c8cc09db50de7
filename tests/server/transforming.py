"""Server transformations run as one program: that compiles faster than operation by operation."""

import jax


def first_update(rule, updates, params=None, population=None, **facts):
    """The first update of a transformation and its state after it, as numpy.

    It starts from the ``population``'s parameters, by default from ``params``, and without those
    from one client's part of the updates.
    """

    @jax.jit
    def run(updates, params, population, facts):
        start = params if population is None else population
        start = jax.tree.map(lambda x: x[0], updates) if start is None else start
        return rule.update(updates, rule.init(start), params, **facts)

    return jax.device_get(run(updates, params, population, facts))


def transformed(rule, updates, **facts):
    """Returns only the first update."""
    return first_update(rule, updates, **facts)[0]
