"""Greedy decoding of language models with a key/value cache."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.models.transformer import LanguageModel

PyTree = Any

# In the place of a token: nothing was generated here.
NOTHING = -1


def _cache_dtype(params: PyTree) -> jnp.dtype:
    """Returns the type that the parameters' products have.

    It is float32 unless all of them are of one narrower type.
    """
    dtypes = [
        leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return jnp.result_type(*dtypes) if dtypes else jnp.dtype(jnp.float32)


def _check(prompts: jax.Array, lengths: jax.Array, max_new_tokens: int) -> None:
    if prompts.ndim != 2 or lengths.shape != prompts.shape[:1]:
        raise InputError(
            "prompts must be [batch, prompt_capacity] and lengths [batch], "
            f"got shapes {prompts.shape} and {lengths.shape}"
        )
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def greedy(
    model: LanguageModel,
    params: PyTree,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    max_new_tokens: int,
    end_token: int,
) -> jax.Array:
    """Takes the likeliest next token, again and again, for each prompt until it ends.

    It stops early when all have ended.

    Args:
        model: its ``empty_cache`` and ``step`` are used.
        params: the model's parameters.
        prompts: int ``[batch, prompt_capacity]``, padded on the right; what the padding holds does
            not matter.
        lengths: int ``[batch]``, tokens of each prompt, at least 1.
        max_new_tokens: the most tokens that are generated (static).
        end_token: the token that ends an answer; -1 for none.

    Returns:
        The answers, int32 ``[batch, max_new_tokens]``, -1 from the end token on.

    Raises:
        InputError: (at trace) shapes that do not belong together, ``max_new_tokens`` below 1, or
            prompt capacity and new tokens together beyond what the model can hold.
    """
    _check(prompts, lengths, max_new_tokens)
    # What stands for a virtual token does not matter.
    prompts, lengths = jnp.pad(prompts, ((0, 0), (model.prefix, 0))), lengths + model.prefix
    batch, capacity = prompts.shape
    cache = model.empty_cache(batch, capacity + max_new_tokens, _cache_dtype(params))
    # Padding is not attended to, but a token that has no embedding would be NaN, which times 0 is
    # NaN.
    prompts = jnp.where(jnp.arange(capacity) < lengths[:, None], prompts, 0)
    # Only the cache is kept: compiled, the logits of the whole prompt are never computed. The loop
    # starts with the prompt's last token again.
    _, cache = model.step(params, prompts, cache, jnp.zeros_like(lengths))
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0].astype(jnp.int32)

    def unfinished(state: tuple[PyTree, ...]) -> jax.Array:
        count, _, ended, _, _ = state
        return (count < max_new_tokens) & ~jnp.all(ended)

    def advance(state: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        count, token, ended, answers, cache = state
        logits, cache = model.step(params, token[:, None], cache, lengths - 1 + count)
        token = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        ended = ended | (token == end_token)
        answers = answers.at[:, count].set(jnp.where(ended, NOTHING, token))
        return count + 1, token, ended, answers, cache

    answers = jnp.full((batch, max_new_tokens), NOTHING, jnp.int32)
    state = (jnp.int32(0), last, jnp.zeros(batch, bool), answers, cache)
    return jax.lax.while_loop(unfinished, advance, state)[3]
