"""Pytrees with a client axis and predicates on paths, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.core import trees

RNG = np.random.default_rng(0)
TREE = {
    "encoder": {"w": RNG.normal(size=(4, 2, 3)).astype(np.float32)},
    "decoders": {"depth": {"b": RNG.normal(size=(4,)).astype(np.float32)}},
}
FLAT = np.concatenate(
    [TREE["decoders"]["depth"]["b"][:, None], TREE["encoder"]["w"].reshape(4, 6)], 1
)
ROWS = np.array([3, 1, 0])


def assert_equals(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def mapped(fn, *others):
    return jax.tree.map(fn, TREE, *others)


def selected(predicate):
    return [path for path in trees.leaves_by_path(TREE) if predicate(path)]


def test_predicates():
    encoder, decoder = ("encoder", "w"), ("decoders", "depth", "b")
    assert selected(trees.everything) == [decoder, encoder]
    assert selected(trees.nothing) == []
    assert selected(trees.under("encoder")) == [encoder]
    assert selected(trees.under("encoder", "decoders")) == [decoder, encoder]
    # Only what stands at the top counts.
    assert selected(trees.under("depth")) == []
    assert selected(trees.negate(trees.under("encoder"))) == [decoder]
    assert not trees.under("encoder")(())


def test_partition_and_its_inverse():
    inside, outside = trees.partition(TREE, trees.under("encoder"))
    assert inside == {"encoder": TREE["encoder"], "decoders": {"depth": {"b": None}}}
    assert outside["encoder"] == {"w": None}
    assert_equals(trees.combine(inside, outside), TREE)
    assert_equals(trees.combine(outside, inside), TREE)


def test_paths():
    leaves = trees.leaves_by_path(TREE)
    assert_equals(trees.from_paths(leaves), TREE)
    named = trees.map_with_path(lambda path, leaf: "/".join(path), TREE)
    assert named == {
        "encoder": {"w": "encoder/w"},
        "decoders": {"depth": {"b": "decoders/depth/b"}},
    }
    assert set(trees.leaves_by_path([np.zeros(1), {"a": np.zeros(1)}])) == {("0",), ("1", "a")}


def test_rows_of_clients():
    one = mapped(lambda x: x[0])
    copies = trees.broadcast_clients(one, 5)
    assert_equals(copies, jax.tree.map(lambda x: np.stack([x] * 5), one))
    assert_equals(trees.take_clients(TREE, ROWS), mapped(lambda x: x[ROWS]))
    new = mapped(lambda x: -x[:3])
    present = np.array([True, False, True])

    def put(leaf, own):
        leaf = leaf.copy()
        leaf[[3, 0]] = own[[0, 2]]
        return leaf

    ours = trees.put_clients(jax.tree.map(jnp.asarray, TREE), ROWS, new, present)
    assert_equals(ours, mapped(put, new))


def test_masks_and_scales():
    present = np.array([True, False, False, True])
    poisoned = mapped(
        lambda x: np.where(np.arange(4).reshape(-1, *[1] * (x.ndim - 1)) == 1, np.nan, x)
    )

    def masked(x):
        return x * present.reshape(-1, *[1] * (x.ndim - 1))

    assert_equals(trees.mask_clients(poisoned, present), mapped(masked))
    assert trees.mask_clients(TREE, None) is TREE
    factors = np.arange(4.0, dtype=np.float32)
    scaled = trees.scale_clients(factors, TREE)
    assert_equals(scaled, mapped(lambda x: factors.reshape(-1, *[1] * (x.ndim - 1)) * x))
    other = mapped(np.negative)
    mixed = trees.where_clients(present, TREE, other)
    assert_equals(
        mixed, mapped(lambda x: np.where(present.reshape(-1, *[1] * (x.ndim - 1)), x, -x))
    )
    assert_equals(trees.where(jnp.bool_(False), TREE, other), other)
    assert_equals(trees.where(jnp.bool_(True), TREE, other), TREE)


def test_combinations_of_clients():
    coefficients = RNG.normal(size=(3, 4)).astype(np.float32)
    mixed = trees.mix_clients(coefficients, TREE)
    assert_equals(mixed, mapped(lambda x: np.tensordot(coefficients, x, 1)))
    total = trees.weighted_sum(coefficients[0], TREE)
    assert_equals(total, mapped(lambda x: np.tensordot(coefficients[0], x, 1)))


def test_inner_products():
    """Inner products are over all leaves, and narrow types are summed in float32."""
    few = mapped(lambda x: x[:2])
    np.testing.assert_allclose(trees.inner_products(TREE, few), FLAT @ FLAT[:2].T, rtol=1e-5)
    narrow = {"w": jnp.full((1, 4097), 1.0, jnp.bfloat16), "b": jnp.ones((1, 1), jnp.bfloat16)}
    product = trees.inner_products(narrow, narrow)
    assert product.dtype == jnp.float32 and product[0, 0] == 4098


def test_flat_rows_and_their_inverse():
    flat = trees.flat_clients(TREE)
    np.testing.assert_array_equal(flat, FLAT)
    assert_equals(trees.unflatten_clients(2 * flat, TREE), mapped(lambda x: 2 * x))
    narrow = mapped(lambda x: x.astype(np.float16))
    assert trees.unflatten_clients(flat, narrow)["encoder"]["w"].dtype == np.float16
