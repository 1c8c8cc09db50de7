"""Greedy decoding against the loop that computes the whole sequence again for every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_mtl import models
from fedjax_mtl.models import decoding

CONFIG = models.llama(13, 16, 2, 4, 24, 24, num_key_value_heads=2)
MODEL = models.language_model(CONFIG)
LENGTHS = np.array([5, 1, 3, 6], np.int32)
PROMPTS = np.random.default_rng(0).integers(0, 13, (4, 6)).astype(np.int32)
END = 3
NEW = 8


def make_params(seed):
    """Parameters with large weights, so that answers vary."""
    return jax.tree.map(lambda p: 3 * p, jax.jit(MODEL.init)(jax.random.key(seed)))


PARAMS = [make_params(seed) for seed in range(3)]
APPLY = jax.jit(MODEL.apply)


def naive(params, end_token=END):
    """Decodes one prompt at a time, with no padding before it and no cache."""
    answers = np.full((len(LENGTHS), NEW), -1)
    for row, length in enumerate(LENGTHS):
        tokens = np.zeros((1, CONFIG.max_length), np.int32)
        tokens[0, :length] = PROMPTS[row, :length]
        for count in range(NEW):
            token = int(jnp.argmax(APPLY(params, tokens, None)[0, length + count - 1]))
            if token == end_token:
                break
            tokens[0, length + count] = answers[row, count] = token
    return answers


@functools.partial(jax.jit, static_argnames="max_new_tokens")
def greedy(params, prompts=PROMPTS, lengths=LENGTHS, end_token=END, max_new_tokens=NEW):
    return decoding.greedy(
        MODEL, params, prompts, lengths, max_new_tokens=max_new_tokens, end_token=end_token
    )


def test_equals_the_naive_loop():
    ended = []
    for params in PARAMS:
        expected = naive(params)
        np.testing.assert_array_equal(greedy(params), expected)
        ended.extend(np.any(expected == -1, axis=1))
    # Some answers end early, some do not, so both are covered.
    assert any(ended) and not all(ended)


def test_several_models_at_once():
    stacked = jax.tree.map(lambda *p: jnp.stack(p), *PARAMS)
    answers = jax.vmap(greedy)(stacked)
    np.testing.assert_array_equal(answers, np.stack([naive(params) for params in PARAMS]))


def test_without_an_end_token_all_places_are_filled():
    answers = greedy(PARAMS[0], end_token=-1)
    np.testing.assert_array_equal(answers, naive(PARAMS[0], end_token=-1))
    assert answers.dtype == jnp.int32 and jnp.all(answers >= 0)


@pytest.mark.parametrize("padding", [-1, 12, 999])
def test_padding_does_not_matter(padding):
    padded = jnp.where(jnp.arange(6) < LENGTHS[:, None], PROMPTS, padding)
    np.testing.assert_array_equal(greedy(PARAMS[0], padded), greedy(PARAMS[0]))
    wider = jnp.pad(padded, ((0, 0), (0, 3)), constant_values=padding)
    np.testing.assert_array_equal(greedy(PARAMS[0], wider), greedy(PARAMS[0]))


def test_stops_when_all_have_ended():
    steps = []

    def step(params, tokens, cache, start):
        jax.debug.callback(lambda: steps.append(tokens.shape[1]))
        return MODEL.step(params, tokens, cache, start)

    model = MODEL._replace(step=step)
    end = int(greedy(PARAMS[0], PROMPTS[:1], LENGTHS[:1], end_token=-1)[0, 0])
    decode = functools.partial(decoding.greedy, model, max_new_tokens=NEW, end_token=end)
    answers = jax.jit(decode)(PARAMS[0], PROMPTS[:1], LENGTHS[:1])
    jax.effects_barrier()
    assert np.all(answers == -1)
    # The prompt, and one token.
    assert sorted(steps) == [1, 6]


def test_narrow_parameters_have_a_narrow_cache():
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS[0])
    assert decoding._cache_dtype(narrow) == jnp.bfloat16
    assert decoding._cache_dtype({"adapter": jnp.zeros(2), "base": narrow}) == jnp.float32
    assert decoding._cache_dtype({}) == jnp.float32
    assert greedy(narrow).shape == (4, NEW)


def test_refusals():
    with pytest.raises(ValueError, match="25 tokens exceed the model's max_length of 24"):
        greedy(PARAMS[0], max_new_tokens=19)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        greedy(PARAMS[0], max_new_tokens=0)
    with pytest.raises(ValueError, match=r"got shapes \(4, 6\) and \(3,\)"):
        greedy(PARAMS[0], lengths=LENGTHS[:3])
