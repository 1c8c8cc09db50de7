"""Prompt tuning with a prompt encoder (P-tuning, Liu et al., arXiv 2103.10385).

Virtual tokens stand before every sequence, and the model is frozen.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.models.transformer import LanguageModel, Transformer

PyTree = Any


class PromptEncoder(nn.Module):
    """Embeddings of the virtual tokens, through an MLP of two hidden layers, ``[tokens, width]``.

    Attributes:
        tokens: how many virtual tokens.
        width: of the model's embeddings.
        hidden: width of the MLP's hidden layers.
    """

    tokens: int
    width: int
    hidden: int

    @nn.compact
    def __call__(self) -> jax.Array:
        x = self.param("embedding", nn.initializers.normal(1.0), (self.tokens, self.width))
        x = nn.relu(nn.Dense(self.hidden)(x))
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.width)(x)


def prompt_tuning(
    model: LanguageModel, *, num_tokens: int = 20, hidden: int = 128
) -> LanguageModel:
    """Puts learned virtual tokens before every sequence of a language model.

    The parameters become ``{"adapters": the prompt encoder's, "base": the model's}``; train with
    ``frozen=adapters.base``. MIRA's baseline (arXiv 2410.15524) has 20 tokens and 128 hidden units:
    371,200 parameters for GPT-2 large.

    Args:
        model: the language model.
        num_tokens: how many virtual tokens. A sequence may be so much shorter than the model's
            longest.
        hidden: width of the prompt encoder's hidden layers.

    Raises:
        InputError: no token or no hidden unit.
    """
    if num_tokens < 1 or hidden < 1:
        raise InputError(
            f"prompt_tuning takes at least 1 token and 1 hidden unit, got {num_tokens} and {hidden}"
        )
    width = jax.eval_shape(model.init, jax.random.key(0))["token_embedding"]["embedding"].shape[1]
    encoder = PromptEncoder(num_tokens, width, hidden)

    def init(key: jax.Array) -> PyTree:
        base_key, own_key = jax.random.split(key)
        return {"adapters": encoder.init(own_key)["params"], "base": model.init(base_key)}

    def prompt_of(params: PyTree) -> Any:
        return encoder.apply({"params": params["adapters"]})

    def apply(params: PyTree, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
        padded = jnp.pad(tokens, ((0, 0), (num_tokens, 0)))
        with _virtual_tokens(prompt_of(params)):
            return model.apply(params["base"], padded, key)[:, num_tokens:]

    def step(
        params: PyTree, tokens: jax.Array, cache: PyTree, start: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        with _virtual_tokens(prompt_of(params)):
            return model.step(params["base"], tokens, cache, start)

    return model._replace(init=init, apply=apply, step=step, prefix=num_tokens)


def _virtual_tokens(prompt: jax.Array) -> Any:
    """Returns a context in which the first positions have the prompt's embeddings.

    They have them whatever their tokens are.
    """
    seen: list[jax.Array] = []

    def replace(call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(context.module, Transformer):
            seen[:] = [args[1]]
        outputs = call(*args, **kwargs)
        if context.module.name == "token_embedding":
            positions = seen[0]
            virtual = prompt[jnp.minimum(positions, len(prompt) - 1)].astype(outputs.dtype)
            outputs = jnp.where((positions < len(prompt))[..., None], virtual, outputs)
        return outputs

    return nn.intercept_methods(replace)
