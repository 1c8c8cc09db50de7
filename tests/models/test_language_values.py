"""Transformers and adapters by value.

Outputs against plain numpy, dropout and its scale, and what weights start from.
"""

import collections
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from numpy_layers import dense, draw, gelu, layer_norm, random_params, relu, softmax

from fedjax_mtl import models
from fedjax_mtl.models.low_rank import dense_layers, num_adapter_parameters

KEY = jax.random.key(0)
CONFIG = models.tiny_transformer(7, 8, 2, 2, 10, max_length=9)
MODEL = models.language_model(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 7, (2, 5))


def assert_equals(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


# --- The small transformer.


def causal_attention(p, x, heads):
    batch, length, width = x.shape

    def split(name):
        own = dense(p[name], x).reshape(batch, length, heads, width // heads)
        return own.transpose(0, 2, 1, 3)

    query, key, value = split("query"), split("key"), split("value")
    scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(width // heads)
    visible = np.tril(np.ones((length, length), bool))
    mixed = softmax(np.where(visible, scores, -np.inf)) @ value
    return dense(p["output"], mixed.transpose(0, 2, 1, 3).reshape(x.shape))


def transformer(p, x):
    """Logits of embedded tokens ``[batch, length, width]``.

    Blocks are pre-norm with the exact GELU, and nothing has a bias.
    """
    x = x + p["position_embedding"]["embedding"][: x.shape[1]]
    for index in range(2):
        own = p[f"blocks_{index}"]
        x = x + causal_attention(own["attention"], layer_norm(own["attention_norm"], x, 1e-5), 2)
        hidden = gelu(dense(own["mlp"]["up"], layer_norm(own["mlp_norm"], x, 1e-5)))
        x = x + dense(own["mlp"]["down"], hidden)
    return dense(p["unembedding"], layer_norm(p["final_norm"], x, 1e-5))


def test_tiny_transformer():
    params = random_params(MODEL.init)
    embedded = params["token_embedding"]["embedding"][TOKENS]
    ours = jax.jit(MODEL.apply)(params, TOKENS)
    assert_equals(ours, transformer(params, embedded))


def test_prompt_tuning():
    """The encoder's outputs stand in for the embeddings of the first tokens.

    The encoder is an MLP with two hidden layers.
    """
    model = models.prompt_tuning(MODEL, num_tokens=3, hidden=6)
    params = random_params(model.init)
    own = params["adapters"]
    hidden = relu(dense(own["Dense_0"], own["embedding"]))
    prompt = dense(own["Dense_2"], relu(dense(own["Dense_1"], hidden)))
    assert prompt.shape == (3, 8)
    embedded = params["base"]["token_embedding"]["embedding"][TOKENS]
    behind = np.concatenate([np.broadcast_to(prompt, (2, 3, 8)), embedded], axis=1)
    ours = jax.jit(model.apply)(params, TOKENS)
    assert_equals(ours, transformer(params["base"], behind)[:, 3:])
    wide = models.prompt_tuning(MODEL, num_tokens=200, hidden=6)
    start = jax.jit(lambda key: wide.init(key)["adapters"]["embedding"])(KEY)
    np.testing.assert_allclose(start.std(), 1, rtol=0.06)


def test_weights_of_transformers_start_at_their_scales():
    """Embeddings are N(0, 0.02^2), and dense layers have variance 1 / inputs.

    The last dense layer of a branch has 1 / (2 layers) of that.
    """
    config = models.tiny_transformer(200, 64, 2, 2, 96, max_length=100)
    params = jax.jit(models.language_model(config).init)(KEY)
    block = params["blocks_1"]

    def assert_deviation(leaf, expected):
        np.testing.assert_allclose(np.asarray(leaf).std(), expected, rtol=0.06)

    for layer, parameters in params.items():
        if "embedding" in layer:
            assert_deviation(next(iter(parameters.values())), 0.02)
    for layer in set(block["attention"]) - {"output"}:
        assert_deviation(block["attention"][layer]["kernel"], 1 / 8)
    for layer in set(block["mlp"]) - {"down"}:
        assert_deviation(block["mlp"][layer]["kernel"], 1 / 8)
    assert_deviation(block["attention"]["output"]["kernel"], 1 / 16)
    assert_deviation(block["mlp"]["down"]["kernel"], 1 / np.sqrt(96) / 2)


def test_defaults_of_transformers():
    """The constructors have these defaults, field by field."""
    shape = models.TransformerConfig(7, 8, 2, 2, 10, 9)
    assert dataclasses.astuple(shape)[6:] == (
        *(None, "layer", 1e-5, "learned", 10_000.0, "gelu"),
        *(True, False, False, 0.0),
    )
    assert CONFIG == dataclasses.replace(shape, use_bias=False)
    default = models.tiny_transformer(7, max_length=9)
    assert dataclasses.astuple(default)[:6] == (7, 32, 1, 2, 64, 9)
    llama = models.llama(7, 8, 2, 2, 10)
    assert llama == dataclasses.replace(
        shape,
        max_length=2048,
        normalisation="rms",
        norm_epsilon=1e-6,
        positions="rotary",
        activation="swiglu",
        use_bias=False,
    )
    for size, expected in {
        "small": (768, 12, 12, 3072),
        "medium": (1024, 24, 16, 4096),
        "large": (1280, 36, 20, 5120),
        "xl": (1600, 48, 25, 6400),
    }.items():
        assert dataclasses.astuple(models.gpt2(size))[1:5] == expected
    gpt2 = models.gpt2(dropout=0.2)
    assert gpt2 == dataclasses.replace(
        shape,
        vocabulary=50_257,
        width=768,
        num_layers=12,
        num_heads=12,
        mlp_width=3072,
        max_length=1024,
        activation="gelu_tanh",
        fused_attention=True,
        tied_embeddings=True,
        dropout=0.2,
    )


def dropouts(config, key):
    """How often the network draws a dropout mask, by the name of the module around it."""
    model = models.language_model(config)
    seen = collections.Counter()

    def record(call, args, kwargs, context):
        module = context.module
        quiet = kwargs.get("deterministic", getattr(module, "deterministic", None))
        if isinstance(module, nn.Dropout) and not quiet:
            assert module.rate == config.dropout
            seen["/".join(module.path[:-1])] += 1
        return call(*args, **kwargs)

    params = jax.eval_shape(model.init, KEY)
    with nn.intercept_methods(record):
        jax.eval_shape(lambda p: model.apply(p, TOKENS, key), params)
    return seen


def test_where_transformers_drop():
    """Dropout acts on the embeddings, every layer's attention weights, and both branches.

    Nothing is dropped in evaluation.
    """
    config = dataclasses.replace(CONFIG, dropout=0.3)
    assert dropouts(config, KEY) == {
        "": 1,
        "blocks_0": 2,
        "blocks_0/attention": 1,
        "blocks_1": 2,
        "blocks_1/attention": 1,
    }
    assert not dropouts(config, None)


# --- LoRA.


def adapted_linear(inputs, **settings):
    """LoRA around one dense layer, with parameters that are not those of the start."""
    model = models.lora(models.linear((inputs,), 2), targets=["decoder"], rank=3, **settings)
    return model, random_params(model.init)


def lora_outputs(params, x, scale):
    base, pair = params["base"]["decoder"], params["adapters"]["decoder"]
    return dense(base, x) + scale * x @ pair["a"] @ pair["b"]


def test_scale_of_adapters():
    """The scale is ``alpha / rank``, and 1 without alpha."""
    x = draw(4, 5)
    for alpha, scale in ((6.0, 2.0), (1.5, 0.5), (None, 1.0)):
        model, params = adapted_linear(5, alpha=alpha)
        assert_equals(model.apply(params, x), lora_outputs(params, x, scale))


def test_dropout_of_adapters_keeps_the_mean():
    """With one input an output has one of two values.

    It is the base's output alone, or has the adapters' part divided by the share that is kept.
    """
    model, params = adapted_linear(1, alpha=6.0, dropout=0.25)
    x = np.ones((1, 1), np.float32)
    keys = jax.random.split(KEY, 4000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: model.apply(params, x, key)))(keys))[:, 0]
    quiet, base = lora_outputs(params, x, 2.0)[0], lora_outputs(params, x, 0.0)[0]
    kept = np.abs(drawn - base).max(axis=1) > 1e-6
    np.testing.assert_allclose(kept.mean(), 0.75, atol=0.03)
    np.testing.assert_allclose(
        drawn[kept], np.tile(base + (quiet - base) / 0.75, (kept.sum(), 1)), rtol=1e-4
    )
    np.testing.assert_allclose(drawn.mean(axis=0), quiet, atol=0.05 * np.abs(quiet - base).max())
    assert_equals(model.apply(params, x, None)[0], quiet)


def test_every_layer_drops_by_a_mask_of_its_own():
    """Two layers with the same inputs and adapters have different masks.

    The mask of a layer depends on the key alone, whichever other layers have adapters.
    """

    class Twins(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return jnp.stack([nn.Dense(1, name=name)(x) for name in ("first", "second")])

    base = models.from_flax(Twins(), (40,))
    ones = {"kernel": jnp.zeros((40, 1)), "bias": jnp.zeros(1)}
    own = {"a": jnp.ones((40, 1)), "b": jnp.ones((1, 1))}
    x = jnp.asarray(draw(1, 40))

    def outputs(targets):
        model = models.lora(base, targets=targets, rank=1, dropout=0.5)
        adapters = dict.fromkeys(targets, own)
        params = {"adapters": adapters, "base": {"first": ones, "second": ones}}
        return model.apply(params, x, KEY)

    both = outputs(["first", "second"])
    assert abs(float(both[0, 0, 0] - both[1, 0, 0])) > 0.1
    np.testing.assert_allclose(outputs(["second"])[1], both[1], rtol=1e-6)


def test_adapters_start_at_their_scales():
    """A is N(0, 1 / inputs), or of the deviation asked for, and B is 0.

    Every layer draws another A.
    """
    base = models.mlp((8,), 3, (8, 10))
    start = jax.jit(models.lora(base, targets=["*"], rank=400).init)(KEY)["adapters"]
    first, second = start["encoder"]["Dense_0"], start["encoder"]["Dense_1"]
    np.testing.assert_allclose(np.std(first["a"]), 1 / np.sqrt(8), rtol=0.06)
    np.testing.assert_allclose(np.std(start["decoder"]["a"]), 1 / np.sqrt(10), rtol=0.06)
    assert not np.allclose(first["a"], second["a"])
    assert not second["b"].any() and second["b"].shape == (400, 10)
    given = models.lora(base, targets=["decoder"], rank=400, deviation=0.3)
    own = jax.jit(lambda key: given.init(key)["adapters"])(KEY)
    np.testing.assert_allclose(np.std(own["decoder"]["a"]), 0.3, rtol=0.06)


def test_shapes_and_counts_of_adapters():
    """Every layer that matches a pattern has ``rank (inputs + outputs)`` parameters.

    Each layer counts once.
    """
    shapes = dense_layers(models.mlp((6,), 3, (5,)))
    assert shapes == {("encoder", "Dense_0"): (6, 5), ("decoder",): (5, 3)}
    mlp = models.mlp((6,), 3, (5,))
    assert num_adapter_parameters(mlp, ["encoder/*"], 2) == 2 * (6 + 5)
    assert num_adapter_parameters(mlp, ["*", "decoder"], 2) == 2 * (6 + 5) + 2 * (5 + 3)


def test_adapters_in_cached_steps_have_no_dropout():
    """A cached step is evaluation, so it equals ``apply`` without a key."""
    model = models.lora(MODEL, targets=["*/query", "*/up"], rank=2, alpha=3.0, dropout=0.5)
    params = random_params(model.init)
    step = jax.jit(model.step)
    logits, _ = step(params, TOKENS, model.empty_cache(2, 5), jnp.zeros(2, jnp.int32))
    assert_equals(logits, jax.jit(lambda p: model.apply(p, TOKENS))(params))
