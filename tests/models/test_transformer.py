"""Transformers: shapes of the papers, causality, the cache, adapters from outside, refusals."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fedjax_mtl import models
from fedjax_mtl.models.transformer import rotate

KEY = jax.random.key(0)
TINY = models.tiny_transformer(11, 8, 2, 2, 12, max_length=16)
CONFIGS = {
    "tiny": TINY,
    "gpt2": dataclasses.replace(
        models.gpt2(),
        vocabulary=11,
        width=8,
        num_layers=2,
        num_heads=2,
        mlp_width=12,
        max_length=16,
    ),
    "llama": models.llama(11, 16, 2, 4, 12, 16, num_key_value_heads=2),
    "rotary, layer": dataclasses.replace(TINY, num_layers=1, positions="rotary"),
    "learned, rms, swiglu": dataclasses.replace(
        TINY, num_layers=1, normalisation="rms", activation="swiglu"
    ),
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def disturbed(params):
    """Adds noise to parameters.

    Without it biases are 0 and scales are 1 at the start, and a tiny network hardly mixes.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    moved = [p + 0.3 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


@functools.cache
def build(config):
    """Returns the compiled model, its parameters, and three sequences of nine tokens."""
    model = models.language_model(config)
    compiled = model._replace(apply=jax.jit(model.apply), step=jax.jit(model.step))
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, config.vocabulary)
    return compiled, disturbed(jax.jit(model.init)(KEY)), tokens


def size(config):
    params = jax.eval_shape(models.language_model(config).init, KEY)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (models.gpt2("small"), 124_439_808),
        (models.gpt2("large"), 774_030_080),
        # 2 * 32000 * 2048 + 24 * (4 * 2048**2 + 3 * 2048 * 5504 + 2 * 2048) + 2048
        (models.data_juicer(), 1_345_423_360),
        # 12 * 32 + 12 * 32 + 13 * 32 + 4 * 32**2 + 2 * 32 * 64 + 3 * 32
        (models.tiny_transformer(12, max_length=13), 9472),
    ],
)
def test_parameter_counts(config, count):
    assert size(config) == count


def kernels(config):
    params = flatten_dict(jax.eval_shape(models.language_model(config).init, KEY), sep="/")
    return {path.removesuffix("/kernel") for path in params if path.endswith("/kernel")}


def test_names_that_adapters_use():
    attention = {
        f"blocks_{i}/attention/{name}"
        for i in range(2)
        for name in ("query", "key", "value", "output")
    }
    mlp = {f"blocks_{i}/mlp/{name}" for i in range(2) for name in ("up", "down")}
    gates = {f"blocks_{i}/mlp/gate" for i in range(2)}
    assert kernels(CONFIGS["tiny"]) == attention | mlp | {"unembedding"}
    assert kernels(CONFIGS["llama"]) == attention | mlp | gates | {"unembedding"}
    fused = {
        f"blocks_{i}/attention/{name}" for i in range(2) for name in ("query_key_value", "output")
    }
    assert kernels(CONFIGS["gpt2"]) == fused | mlp
    others = set(jax.eval_shape(models.language_model(CONFIGS["gpt2"]).init, KEY)) - {
        "blocks_0",
        "blocks_1",
    }
    assert others == {"token_embedding", "position_embedding", "final_norm"}


@EVERY
def test_every_kernel_is_applied_by_a_dense_layer(config):
    model = models.language_model(config)
    params = jax.eval_shape(model.init, KEY)
    seen = []

    def record(next_function, args, kwargs, context):
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            assert len(args) == 1 and not kwargs
            seen.append("/".join(context.module.path))
        return next_function(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(model.apply, params, jnp.zeros((3, 9), jnp.int32), None)
    assert sorted(seen) == sorted(kernels(config))


@EVERY
def test_later_tokens_do_not_matter_and_earlier_do(config):
    model, params, tokens = build(config)
    outputs = model.apply(params, tokens, None)
    assert outputs.shape == (3, 9, config.vocabulary)
    changed = model.apply(params, tokens.at[:, 5].set((tokens[:, 5] + 1) % config.vocabulary), None)
    np.testing.assert_array_equal(changed[:, :5], outputs[:, :5])
    assert jnp.all(jnp.max(jnp.abs(changed - outputs), axis=(0, 2))[5:] > 1e-3)


@EVERY
def test_order_matters(config):
    model, params, tokens = build(config)
    swapped = tokens.at[:, 0].set(tokens[:, 1]).at[:, 1].set(tokens[:, 0])
    difference = (
        model.apply(params, swapped, None)[:, 2:] - model.apply(params, tokens, None)[:, 2:]
    )
    assert jnp.max(jnp.abs(difference)) > 1e-3


@EVERY
def test_steps_equal_the_whole_sequence(config):
    model, params, tokens = build(config)
    expected = model.apply(params, tokens, None)
    # Samples of different lengths: the prompts' padding is overwritten by what follows.
    lengths = jnp.array([4, 1, 3])
    prompts = jnp.where(jnp.arange(4) < lengths[:, None], tokens[:, :4], 7)

    @jax.jit
    def run(params):
        first, cache = model.step(params, prompts, model.empty_cache(3, 9), jnp.zeros(3, jnp.int32))

        def advance(cache, count):
            places = lengths + count
            token = jnp.take_along_axis(tokens, places[:, None], axis=1)
            logits, cache = model.step(params, token, cache, places)
            return cache, logits[:, 0]

        return first, jax.lax.scan(advance, cache, jnp.arange(5))[1]

    first, rest = run(params)
    for sample, length in enumerate([4, 1, 3]):
        ours = jnp.concatenate([first[sample, :length], rest[:, sample]])
        np.testing.assert_allclose(ours, expected[sample, : length + 5], rtol=1e-4, atol=1e-5)


def test_steps_of_several_models_at_once():
    model, params, tokens = build(CONFIGS["llama"])
    several = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p, -p]), params)
    cache = jax.vmap(lambda _: model.empty_cache(3, 9))(jnp.arange(3))
    step = jax.jit(jax.vmap(model.step, in_axes=(0, None, 0, None)))
    _, cache = step(several, tokens[:, :6], cache, jnp.zeros(3, jnp.int32))
    logits, _ = step(several, tokens[:, 6:], cache, jnp.full(3, 6))
    expected = jnp.stack(
        [
            model.apply(jax.tree.map(lambda p, i=i: p[i], several), tokens, None)[:, 6:]
            for i in range(3)
        ]
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_rotation_depends_on_distances_only():
    query, key = jax.random.normal(KEY, (2, 1, 1, 1, 6))

    def score(at, distance):
        turned = (
            rotate(query, jnp.array([[at + distance]]), 100.0),
            rotate(key, jnp.array([[at]]), 100.0),
        )
        return jnp.sum(turned[0] * turned[1])

    np.testing.assert_allclose(score(0, 3), score(11, 3), rtol=1e-4)
    assert abs(score(0, 3) - score(0, 4)) > 1e-2
    np.testing.assert_array_equal(rotate(query, jnp.array([[0]]), 100.0), query)
    # Channel 0 turns with channel 3, by one radian a position.
    np.testing.assert_allclose(
        rotate(jnp.eye(6)[0].reshape(1, 1, 1, 6), jnp.array([[2]]), 100.0)[0, 0, 0],
        [np.cos(2), 0, 0, np.sin(2), 0, 0],
        rtol=1e-5,
    )


def test_grouped_queries_equal_repeated_keys_and_values():
    model, params, tokens = build(CONFIGS["llama"])
    full = models.language_model(dataclasses.replace(CONFIGS["llama"], num_key_value_heads=4))

    def repeat(path, p):
        grouped = any(f"'{name}'" in jax.tree_util.keystr(path) for name in ("key", "value"))
        return jnp.repeat(p.reshape(16, 2, 4), 2, axis=1).reshape(16, 16) if grouped else p

    repeated = jax.tree_util.tree_map_with_path(repeat, params)
    np.testing.assert_allclose(
        model.apply(params, tokens, None),
        jax.jit(full.apply)(repeated, tokens, None),
        rtol=1e-4,
        atol=1e-5,
    )


def test_dropout_only_with_a_key():
    model, params, tokens = build(dataclasses.replace(CONFIGS["gpt2"], dropout=0.3))
    plain, _, _ = build(CONFIGS["gpt2"])
    np.testing.assert_array_equal(model.apply(params, tokens), plain.apply(params, tokens))
    first, again, other = (model.apply(params, tokens, jax.random.key(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert jnp.max(jnp.abs(first - other)) > 1e-2
    np.testing.assert_array_equal(plain.apply(params, tokens, KEY), plain.apply(params, tokens))


def test_bfloat16_parameters_give_bfloat16():
    model, params, tokens = build(CONFIGS["llama"])
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    logits = model.apply(narrow, tokens)
    assert logits.dtype == jnp.bfloat16
    expected = model.apply(params, tokens)
    assert jnp.max(jnp.abs(logits - expected)) < 0.1 * jnp.max(jnp.abs(expected))
    cache = model.empty_cache(3, 9, jnp.bfloat16)
    stepped, cache = model.step(narrow, tokens, cache, jnp.zeros(3, jnp.int32))
    assert stepped.dtype == cache[0].keys.dtype == jnp.bfloat16


def test_training_lowers_the_loss():
    config = models.tiny_transformer(5, max_length=8)
    model = models.language_model(config)
    tokens = jnp.stack([jnp.arange(8) % 5, (jnp.arange(8) + 2) % 5])

    def loss(params):
        logits = model.apply(params, tokens[:, :-1], None)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -jnp.mean(picked)

    @jax.jit
    def train(params):
        def descend(p, _):
            return jax.tree.map(lambda w, g: w - 0.3 * g, p, jax.grad(loss)(p)), loss(p)

        return jax.lax.scan(descend, params, None, 60)[1]

    losses = train(jax.jit(model.init)(KEY))
    np.testing.assert_allclose(losses[0], np.log(5), rtol=0.1)
    assert losses[-1] < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "width 8 is not divisible by num_heads 3"),
        (
            {"num_heads": 4, "num_key_value_heads": 3},
            "num_heads 4 is not divisible by num_key_value_heads 3",
        ),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        (
            {"normalisation": "batch"},
            r"normalisation must be one of \('layer', 'rms'\), got 'batch'",
        ),
        ({"positions": "none"}, "positions must be one of"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be positive"),
        ({"positions": "rotary", "num_heads": 8}, "even width, got 8 / 8 = 1"),
    ],
)
def test_refused_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_as_many_heads_of_keys_as_of_queries():
    assert dataclasses.replace(TINY, num_key_value_heads=2) == TINY
    assert dataclasses.replace(TINY, num_heads=4).key_value_heads == 4


def test_refusals():
    with pytest.raises(ValueError, match="comes in the sizes .* got 'huge'"):
        models.gpt2("huge")
    model = models.language_model(TINY)
    params = jax.eval_shape(model.init, KEY)
    with pytest.raises(ValueError, match="17 tokens exceed the model's max_length of 16"):
        jax.eval_shape(model.apply, params, jnp.zeros((1, 17), jnp.int32), None)
    with pytest.raises(ValueError, match="17 tokens exceed"):
        model.empty_cache(1, 17)
    with pytest.raises(ValueError, match="5 tokens do not fit into a cache of length 4"):
        model.step(
            params, jnp.zeros((1, 5), jnp.int32), model.empty_cache(1, 4), jnp.zeros(1, jnp.int32)
        )
