"""Decoder-only transformers (GPT-2, Llama and small ones), with a key/value cache for decoding.

They are pairs of pure functions. Every matrix product with trained weights, except the embedding
lookups and a tied unembedding, is a ``flax.linen.Dense``, so that adapters can be put around them
by path. These paths are:

* ``blocks_0/attention/{query,key,value,output}``, for GPT-2 ``blocks_0/attention/query_key_value``
  and ``output``;
* ``blocks_0/mlp/{up,down}``, for SwiGLU also ``gate``;
* ``unembedding`` when it is not tied.

The other parameters are ``token_embedding``, ``position_embedding`` when positions are learned,
``blocks_0/{attention_norm,mlp_norm}`` and ``final_norm``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_mtl.core.checks import InputError

PyTree = Any

_CHOICES = {
    "normalisation": ("layer", "rms"),
    "positions": ("learned", "rotary"),
    "activation": ("gelu", "gelu_tanh", "swiglu"),
}
_SIZES = (
    "vocabulary",
    "width",
    "num_layers",
    "num_heads",
    "num_key_value_heads",
    "mlp_width",
    "max_length",
)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape of a decoder-only transformer with pre-norm blocks.

    Attributes:
        vocabulary: how many different tokens there are.
        width: channels of the residual stream.
        num_layers: how many blocks.
        num_heads: heads of the queries; a head has ``width / num_heads`` channels.
        mlp_width: hidden units of a block's MLP.
        max_length: tokens of the longest sequence.
        num_key_value_heads: heads of keys and values, each shared by
            ``num_heads / num_key_value_heads`` queries; None, and kept as None, for ``num_heads``.
        normalisation: ``"layer"`` or ``"rms"``.
        norm_epsilon: added to the variance.
        positions: ``"learned"`` embeddings or ``"rotary"`` (half-split rotation of queries and
            keys).
        rotary_base: base of the rotary wavelengths.
        activation: of the MLP; ``"gelu"`` is the exact one, ``"gelu_tanh"`` its approximation,
            ``"swiglu"`` adds a gate.
        use_bias: of the dense layers and of layer normalisation; the unembedding has none.
        fused_attention: one matrix for query, key and value, in this order.
        tied_embeddings: logits are inner products with the token embeddings.
        dropout: rate on the embeddings, on the attention weights and on what a block adds to the
            residual stream.

    Raises:
        InputError: a size that is not positive, an unknown name, heads that do not divide, or a
            rate outside [0, 1).
    """

    vocabulary: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    max_length: int
    num_key_value_heads: int | None = None
    normalisation: Literal["layer", "rms"] = "layer"
    norm_epsilon: float = 1e-5
    positions: Literal["learned", "rotary"] = "learned"
    rotary_base: float = 10_000.0
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    use_bias: bool = True
    fused_attention: bool = False
    tied_embeddings: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        # One way of saying it, which also stays true when num_heads is replaced.
        if self.num_key_value_heads == self.num_heads:
            object.__setattr__(self, "num_key_value_heads", None)
        self._check_values()
        self._check_heads()

    def _check_values(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("norm_epsilon", "rotary_base"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {self.dropout}")

    def _check_heads(self) -> None:
        if self.width % self.num_heads:
            raise InputError(f"width {self.width} is not divisible by num_heads {self.num_heads}")
        if self.num_heads % self.key_value_heads:
            raise InputError(
                f"num_heads {self.num_heads} is not divisible by num_key_value_heads "
                f"{self.key_value_heads}"
            )
        if self.positions == "rotary" and self.head_width % 2:
            raise InputError(
                "rotary positions need heads of even width, "
                f"got {self.width} / {self.num_heads} = {self.head_width}"
            )

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.width // self.num_heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_heads


def tiny_transformer(
    vocabulary: int,
    width: int = 32,
    num_layers: int = 1,
    num_heads: int = 2,
    mlp_width: int = 64,
    *,
    max_length: int,
) -> TransformerConfig:
    """Returns a small transformer for synthetic sequences.

    It has layer normalisation, exact GELU, learned positions, no biases and no tied embeddings.

    Args:
        vocabulary: how many different tokens there are.
        width: channels of the residual stream.
        num_layers: how many blocks.
        num_heads: heads of the attention.
        mlp_width: hidden units of a block's MLP.
        max_length: tokens of the longest sequence.
    """
    return TransformerConfig(
        vocabulary, width, num_layers, num_heads, mlp_width, max_length, use_bias=False
    )


_GPT2_SIZES = {
    "small": (768, 12, 12),
    "medium": (1024, 24, 16),
    "large": (1280, 36, 20),
    "xl": (1600, 48, 25),
}


def gpt2(
    size: Literal["small", "medium", "large", "xl"] = "small", dropout: float = 0.0
) -> TransformerConfig:
    """Returns GPT-2 (124, 355, 774 or 1558 million parameters).

    Args:
        size: ``small``, ``medium``, ``large`` or ``xl``.
        dropout: the rate; its authors trained with 0.1.

    Raises:
        InputError: unknown size.
    """
    if size not in _GPT2_SIZES:
        raise InputError(f"GPT-2 comes in the sizes {tuple(_GPT2_SIZES)}, got {size!r}")
    width, num_layers, num_heads = _GPT2_SIZES[size]
    return TransformerConfig(
        vocabulary=50_257,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_width=4 * width,
        max_length=1024,
        activation="gelu_tanh",
        fused_attention=True,
        tied_embeddings=True,
        dropout=dropout,
    )


def llama(
    vocabulary: int,
    width: int,
    num_layers: int,
    num_heads: int,
    mlp_width: int,
    max_length: int = 2048,
    *,
    num_key_value_heads: int | None = None,
    norm_epsilon: float = 1e-6,
    rotary_base: float = 10_000.0,
    tied_embeddings: bool = False,
) -> TransformerConfig:
    """Returns a transformer of the Llama family.

    It has RMS normalisation, rotary positions, SwiGLU and no biases. The arguments are those of
    :class:`TransformerConfig`.
    """
    return TransformerConfig(
        vocabulary,
        width,
        num_layers,
        num_heads,
        mlp_width,
        max_length,
        num_key_value_heads=num_key_value_heads,
        normalisation="rms",
        norm_epsilon=norm_epsilon,
        positions="rotary",
        rotary_base=rotary_base,
        activation="swiglu",
        use_bias=False,
        tied_embeddings=tied_embeddings,
    )


def data_juicer() -> TransformerConfig:
    """Returns the shape of the 1.3-billion Llama trained on Data-Juicer's refined data.

    It has 1,345,423,360 parameters. Width 2048 and 24 layers are given; 16 heads, MLP 5504,
    vocabulary 32000, 2048 tokens and epsilon 1e-6 are choices, those of Llama models of this size.
    For a downloaded checkpoint read its own configuration.
    """
    return llama(32_000, 2048, 24, 16, 5504)


class KeyValues(NamedTuple):
    """What one block remembers of the tokens seen so far, by position.

    Attributes:
        keys: ``[batch, length, key_value_heads, head_width]``.
        values: ``[batch, length, key_value_heads, head_width]``.
    """

    keys: jax.Array
    values: jax.Array


def _write(cache: KeyValues, positions: jax.Array, keys: jax.Array, values: jax.Array) -> KeyValues:
    """Puts ``[batch, positions, heads, head_width]`` at ``positions`` ``[batch, positions]``.

    Those outside of the cache are dropped.
    """
    rows = jnp.arange(keys.shape[0])[:, None]

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows, positions].set(new.astype(old.dtype), mode="drop")

    return KeyValues(put(cache.keys, keys), put(cache.values, values))


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Applies rotary positions (Su et al., arXiv 2104.09864).

    Channel ``i`` is paired with ``i + head_width / 2``.

    Args:
        x: ``[batch, length, heads, head_width]``.
        positions: int ``[batch or 1, length]``.
        base: of the wavelengths.

    Returns:
        The rotated values, ``[batch, length, heads, head_width]``.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    low, high = x[..., :half], x[..., half:]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(
        x.dtype
    )


def _dense(config: TransformerConfig, features: int, name: str, scale: float = 1.0) -> nn.Dense:
    """Returns a dense layer whose weights have variance ``scale / inputs``."""
    init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
    return nn.Dense(features, use_bias=config.use_bias, kernel_init=init, name=name)


def _residual_dense(config: TransformerConfig, name: str) -> nn.Dense:
    """Returns the last layer of a branch.

    It is so scaled that the residual stream's variance does not grow with depth (GPT-2).
    """
    return _dense(config, config.width, name, 1 / (2 * config.num_layers))


def _norm(config: TransformerConfig, name: str) -> nn.Module:
    if config.normalisation == "rms":
        return nn.RMSNorm(config.norm_epsilon, name=name)
    # Trained residual streams have channels far from zero, where the fast variance cancels.
    return nn.LayerNorm(
        config.norm_epsilon, use_bias=config.use_bias, use_fast_variance=False, name=name
    )


class Attention(nn.Module):
    """Causal self-attention, grouped-query when there are fewer heads of keys than of queries.

    Attributes:
        config: of the transformer.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: KeyValues | None, train: bool
    ) -> tuple[jax.Array, KeyValues | None]:
        """Attends causally, ``[batch, length, width]`` in and out.

        Without a cache tokens attend among themselves; with one, to everything in it at their own
        or an earlier position.

        Args:
            x: ``[batch, length, width]``.
            positions: int ``[batch or 1, length]``.
            cache: keys and values of the tokens so far, or None.
            train: whether dropout is on.

        Returns:
            The branch's output, and the cache with these tokens in it.
        """
        query, keys, values = self.project(x)
        if self.config.positions == "rotary":
            query = rotate(query, positions, self.config.rotary_base)
            keys = rotate(keys, positions, self.config.rotary_base)
        if cache is not None:
            cache = _write(cache, positions, keys, values)
            keys, values = cache.keys.astype(query.dtype), cache.values.astype(query.dtype)
        visible = jnp.arange(keys.shape[1]) <= positions[..., None]
        mixed = self.mix(query, keys, values, visible, train)
        return _residual_dense(self.config, "output")(mixed), cache

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries, keys and values of the tokens.

        Queries are ``[batch, length, num_heads, head_width]``, keys and values
        ``[batch, length, key_value_heads, head_width]``.
        """
        config = self.config
        heads = (config.num_heads, config.key_value_heads, config.key_value_heads)
        widths = [number * config.head_width for number in heads]
        if config.fused_attention:
            fused = _dense(config, sum(widths), "query_key_value")(x)
            parts = jnp.split(fused, [widths[0], widths[0] + widths[1]], axis=-1)
        else:
            names = ("query", "key", "value")
            parts = [
                _dense(config, width, name)(x) for width, name in zip(widths, names, strict=True)
            ]
        query, key, value = (
            part.reshape(*x.shape[:2], number, config.head_width)
            for part, number in zip(parts, heads, strict=True)
        )
        return query, key, value

    def mix(
        self, query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array, train: bool
    ) -> jax.Array:
        """Returns the weighted means of the values, ``[batch, length, width]``.

        ``visible`` is bool ``[batch or 1, length, keys]``: which tokens see which keys.
        """
        config = self.config
        batch, length = query.shape[:2]
        query = query.reshape(batch, length, config.key_value_heads, -1, config.head_width)
        scores = jnp.einsum("blhgc,bkhc->bhglk", query, keys, preferred_element_type=jnp.float32)
        scores = scores / config.head_width**0.5
        scores = jnp.where(visible[:, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        weights = nn.Dropout(config.dropout)(weights, deterministic=not train)
        return jnp.einsum("bhglk,bkhc->blhgc", weights, values).reshape(batch, length, config.width)


class TransformerMLP(nn.Module):
    """The block's second half, ``[batch, length, width]`` in and out.

    Attributes:
        config: of the transformer.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        hidden = _dense(config, config.mlp_width, "up")(x)
        if config.activation == "swiglu":
            hidden = nn.silu(_dense(config, config.mlp_width, "gate")(x)) * hidden
        else:
            hidden = nn.gelu(hidden, approximate=config.activation == "gelu_tanh")
        return _residual_dense(config, "down")(hidden)


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP; arguments and results are those of :class:`Attention`.

    Attributes:
        config: of the transformer.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: KeyValues | None, train: bool
    ) -> tuple[jax.Array, KeyValues | None]:
        drop = nn.Dropout(self.config.dropout, deterministic=not train)
        normed = _norm(self.config, "attention_norm")(x)
        branch, cache = Attention(self.config, name="attention")(normed, positions, cache, train)
        x = x + drop(branch)
        normed = _norm(self.config, "mlp_norm")(x)
        return x + drop(TransformerMLP(self.config, name="mlp")(normed)), cache


class Transformer(nn.Module):
    """The whole network, layers unrolled.

    Attributes:
        config: of the transformer.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: tuple[KeyValues, ...] | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, tuple[KeyValues, ...] | None]:
        """Returns logits ``[batch, length, vocabulary]`` and the new cache.

        Args:
            tokens: int ``[batch, length]``.
            positions: int ``[batch or 1, length]``.
            cache: one entry a block, or None.
            train: whether dropout is on.
        """
        config = self.config
        initial = nn.initializers.normal(0.02)
        embedding = nn.Embed(
            config.vocabulary, config.width, embedding_init=initial, name="token_embedding"
        )
        x = embedding(tokens)
        if config.positions == "learned":
            table = nn.Embed(
                config.max_length, config.width, embedding_init=initial, name="position_embedding"
            )
            x = x + table(positions)
        x = nn.Dropout(config.dropout)(x, deterministic=not train)
        remembered: list[Any] = []
        for index in range(config.num_layers):
            block = TransformerBlock(config, name=f"blocks_{index}")
            x, layer = block(x, positions, None if cache is None else cache[index], train)
            remembered.append(layer)
        x = _norm(config, "final_norm")(x)
        if config.tied_embeddings:
            logits = embedding.attend(x)
        else:
            unembedding = nn.Dense(
                config.vocabulary, use_bias=False, kernel_init=initial, name="unembedding"
            )
            logits = unembedding(x)
        return logits, None if cache is None else tuple(remembered)


class LanguageModel(NamedTuple):
    """A model of token sequences.

    ``init`` and ``apply`` are those of a :class:`~fedjax_mtl.core.model.Model`.

    Attributes:
        init: ``key -> params``, a plain pytree.
        apply: ``(params, tokens int [batch, length], key) -> logits [batch, length, vocabulary]``;
            a key means training (dropout), None evaluation.
        empty_cache: ``(batch, length, dtype=float32) -> cache``, room for sequences of ``length``
            tokens, prompt included.
        step: ``(params, tokens int [batch, positions], cache, start int [batch]) -> (logits [batch,
            positions, vocabulary], cache)``. It gives what ``apply`` gives for ``tokens`` that
            stand at ``start, start + 1, ...`` of their own sequence, after the tokens whose keys
            and values are in the cache at earlier positions. Later entries are not read, so a
            prompt may be padded on the right and its padding overwritten.
        prefix: virtual tokens that stand before every sequence: ``step`` counts positions from the
            first of them, ``apply`` adds them itself.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, PyTree, jax.Array | None], jax.Array]
    empty_cache: Callable[..., PyTree]
    step: Callable[[PyTree, jax.Array, PyTree, jax.Array], tuple[jax.Array, PyTree]]
    prefix: int = 0


def language_model(config: TransformerConfig) -> LanguageModel:
    """Returns the transformer of a configuration.

    Weights start as GPT-2's do (embeddings N(0, 0.02), branches scaled down with depth), with
    variance 1 / inputs for the dense layers.

    Raises:
        InputError: (at trace) ``apply`` or ``empty_cache`` with more than ``max_length`` tokens, or
            ``step`` with more than the cache holds.
    """
    module = Transformer(config)

    def check(length: int) -> None:
        if length > config.max_length:
            raise InputError(
                f"{length} tokens exceed the model's max_length of {config.max_length}"
            )

    def init(key: jax.Array) -> PyTree:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return module.init({"params": key}, tokens, tokens)["params"]

    def apply(params: PyTree, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
        check(tokens.shape[1])
        positions = jnp.arange(tokens.shape[1])[None]
        rngs = None if key is None else {"dropout": key}
        return module.apply(
            {"params": params}, tokens, positions, train=key is not None, rngs=rngs
        )[0]

    def empty_cache(batch: int, length: int, dtype: Any = jnp.float32) -> tuple[KeyValues, ...]:
        check(length)
        shape = (batch, length, config.key_value_heads, config.head_width)
        return tuple(
            KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
            for _ in range(config.num_layers)
        )

    def step(
        params: PyTree, tokens: jax.Array, cache: PyTree, start: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        room = cache[0].keys.shape[1]
        if tokens.shape[1] > room:
            raise InputError(f"{tokens.shape[1]} tokens do not fit into a cache of length {room}")
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        return module.apply({"params": params}, tokens, positions, cache)

    return LanguageModel(init, apply, empty_cache, step)


def small_language_model(
    vocabulary: int,
    *,
    width: int = 32,
    num_layers: int = 1,
    num_heads: int = 2,
    mlp_width: int = 64,
    max_length: int = 64,
) -> LanguageModel:
    """Returns the model of a :func:`tiny_transformer`.

    Args:
        vocabulary: how many different tokens there are.
        width: channels of the residual stream.
        num_layers: how many blocks.
        num_heads: heads of the attention.
        mlp_width: hidden units of a block's MLP.
        max_length: tokens of the longest sequence.
    """
    return language_model(
        tiny_transformer(vocabulary, width, num_layers, num_heads, mlp_width, max_length=max_length)
    )
