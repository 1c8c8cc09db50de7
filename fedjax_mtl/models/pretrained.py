"""Checkpoints in Hugging Face's layout, of GPT-2 and Llama models: read and written back."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.models.transformer import LanguageModel, TransformerConfig, language_model, llama

PyTree = Any
Path = str | pathlib.Path

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class _Layout(NamedTuple):
    """Where a family of checkpoints keeps our parameters.

    Attributes:
        prefix: of all names but the unembedding's; the family's bare models are saved without it.
        block: name of block ``{}``.
        modules: name of each of our modules, those of a block relative to it.
        transposed: dense kernels are stored ``[out, in]``; the unembedding's always is.
    """

    prefix: str
    block: str
    modules: dict[str, str]
    transposed: bool


_GPT2 = _Layout(
    prefix="transformer.",
    block="h.{}.",
    modules={
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "attention_norm": "ln_1",
        "attention/query_key_value": "attn.c_attn",
        "attention/output": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp/up": "mlp.c_fc",
        "mlp/down": "mlp.c_proj",
        "final_norm": "ln_f",
    },
    transposed=False,
)
_LLAMA = _Layout(
    prefix="model.",
    block="layers.{}.",
    modules={
        "token_embedding": "embed_tokens",
        "attention_norm": "input_layernorm",
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp/gate": "mlp.gate_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/down": "mlp.down_proj",
        "final_norm": "norm",
    },
    transposed=True,
)
_UNEMBEDDING = "lm_head.weight"
# Causal masks and rotary frequencies that some versions store; we compute them.
_BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")


def _layout(config: TransformerConfig) -> _Layout:
    c = config
    if c.normalisation == "rms" and c.positions == "rotary" and c.activation == "swiglu":
        if not c.fused_attention:
            return _LLAMA
    elif c.normalisation == "layer" and c.positions == "learned" and c.activation != "swiglu":
        if c.fused_attention and c.use_bias and c.key_value_heads == c.num_heads:
            return _GPT2
    raise InputError(
        "only models of GPT-2's shape (layer normalisation, learned positions, GELU, biases, "
        "fused attention, no grouped queries) and of Llama's (RMS normalisation, rotary "
        f"positions, SwiGLU, attention not fused) have a Hugging Face layout, got {config}"
    )


class _Entry(NamedTuple):
    """One of our parameters in a checkpoint.

    Attributes:
        name: of the tensor that is stored.
        shape: ours, ``[in, out]`` of a kernel.
        transposed: whether it is stored the other way round.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape


def _entries(config: TransformerConfig) -> dict[str, _Entry]:
    """Returns where every parameter is stored, by its path."""
    layout = _layout(config)
    shapes = flatten_dict(jax.eval_shape(language_model(config).init, jax.random.key(0)), sep="/")
    return {path: _entry(layout, path, leaf.shape) for path, leaf in shapes.items()}


def _entry(layout: _Layout, path: str, shape: tuple[int, ...]) -> _Entry:
    if path == "unembedding/kernel":
        return _Entry(_UNEMBEDDING, shape, True)
    module, leaf = path.rsplit("/", 1)
    block = re.match(r"blocks_(\d+)/", module)
    inside = module[block.end() :] if block else module
    where = layout.prefix + (layout.block.format(block[1]) if block else "")
    suffix = "bias" if leaf == "bias" else "weight"
    return _Entry(
        f"{where}{layout.modules[inside]}.{suffix}", shape, layout.transposed and leaf == "kernel"
    )


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that hold a checkpoint's tensors."""
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    if not (directory / _INDEX).is_file():
        raise FileNotFoundError(
            f"{directory} holds neither {_WEIGHTS} nor {_INDEX}; point to the directory of a "
            "checkpoint in the safetensors format, and convert one in another format "
            "(pytorch_model.bin) with save_pretrained(..., safe_serialization=True)"
        )
    shards = sorted(set(json.loads((directory / _INDEX).read_text())["weight_map"].values()))
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{_INDEX} of {directory} names {absent}, which are not there; download them"
        )
    return [directory / shard for shard in shards]


def _stored(directory: pathlib.Path) -> dict[str, Callable[[], np.ndarray]]:
    """Returns a reader for every tensor of a checkpoint; nothing is read yet."""
    import safetensors

    readers: dict[str, Callable[[], np.ndarray]] = {}
    for file in _files(directory):
        try:
            handle = safetensors.safe_open(file, framework="numpy")
        except safetensors.SafetensorError as error:
            raise InputError(
                f"{file} is not a safetensors file ({error}); a half download or a Git LFS "
                "pointer? Download it again"
            ) from error
        for name in handle.keys():
            readers[name] = functools.partial(handle.get_tensor, name)
    return readers


def _find_names(entries: dict[str, _Entry], prefix: str, stored: set[str]) -> dict[str, str]:
    """Returns the stored name of every path; bare models lack the prefix."""
    bare = not any(name.startswith(prefix) for name in stored)
    return {
        path: entry.name.removeprefix(prefix) if bare else entry.name
        for path, entry in entries.items()
    }


def _check_names(
    directory: pathlib.Path, names: dict[str, str], stored: set[str], config: TransformerConfig
) -> None:
    for path, name in names.items():
        if name not in stored:
            hint = "; are its embeddings tied?" if name == _UNEMBEDDING else ""
            raise InputError(
                f"the checkpoint in {directory} has no tensor {name!r}, which {path} needs{hint}; "
                "read its own configuration with from_hugging_face_config"
            )
    ignored = {name for name in stored if _BUFFERS.search(name)}
    if config.tied_embeddings:
        ignored.add(_UNEMBEDDING)
    left = sorted(stored - set(names.values()) - ignored)
    if left:
        raise InputError(
            f"the checkpoint in {directory} has {len(left)} tensors that the configuration does "
            f"not use, e.g. {left[:3]}; read its own configuration with from_hugging_face_config"
        )


def load_safetensors(
    directory: Path, config: TransformerConfig, dtype: Any = jnp.float32
) -> PyTree:
    """Reads a checkpoint of GPT-2's or Llama's layout, in one file or in shards.

    Args:
        directory: with ``model.safetensors`` or ``model.safetensors.index.json``.
        config: see :func:`from_hugging_face_config`.
        dtype: of the parameters, whatever that of the stored tensors is.

    Returns:
        The parameters of ``language_model(config)``.

    Raises:
        FileNotFoundError: no weights, or not all shards.
        InputError: a configuration without such a layout, a broken file, or a tensor that is
            missing, superfluous or of another shape.
    """
    directory = pathlib.Path(directory)
    entries, prefix = _entries(config), _layout(config).prefix
    readers = _stored(directory)
    names = _find_names(entries, prefix, set(readers))
    _check_names(directory, names, set(readers), config)
    params = {}
    for path, entry in entries.items():
        tensor = readers[names[path]]()
        if tensor.shape != entry.stored_shape:
            raise InputError(
                f"tensor {names[path]!r} of {directory} has shape {tensor.shape}, but {path} needs "
                f"{entry.stored_shape}; read the checkpoint's own configuration with "
                "from_hugging_face_config"
            )
        params[path] = jnp.asarray(tensor.T if entry.transposed else tensor, dtype)
    return unflatten_dict(params, sep="/")


def _tensors(params: PyTree, config: TransformerConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and contiguous tensors as they are stored."""
    flat, entries = flatten_dict(params, sep="/"), _entries(config)
    if flat.keys() != entries.keys():
        different = sorted(flat.keys() ^ entries.keys())
        raise InputError(
            f"the parameters are not those of the configuration: {different[:3]} in only one of "
            "the two"
        )
    for path, entry in entries.items():
        value = np.asarray(flat[path])
        if value.shape != entry.shape:
            raise InputError(
                f"{path} has shape {value.shape}, but the configuration's has {entry.shape}; "
                "adapters must be merged and client axes removed before saving"
            )
        yield entry.name, np.ascontiguousarray(value.T if entry.transposed else value)


def save_safetensors(directory: Path, params: PyTree, config: TransformerConfig) -> None:
    """Writes ``config.json`` and ``model.safetensors`` as Hugging Face's models read them.

    The weights are one file, in the parameters' own type. The tokenizer's files and the numbers of
    special tokens are not written; copy them from where the tokenizer comes from.

    Args:
        directory: made if needed; a checkpoint in it is overwritten.
        params: of ``language_model(config)``.
        config: the transformer's.

    Raises:
        InputError: a configuration without such a layout, or parameters that are not those of the
            configuration.
    """
    import safetensors.numpy

    directory = pathlib.Path(directory)
    tensors = dict(_tensors(params, config))
    described = _describe(config) | {"torch_dtype": next(iter(tensors.values())).dtype.name}
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
    (directory / _CONFIG).write_text(json.dumps(described, indent=2) + "\n")


_GPT2_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}


def _describe(config: TransformerConfig) -> dict[str, Any]:
    """Returns the contents of ``config.json``."""
    if _layout(config) is _LLAMA:
        return _describe_llama(config)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocabulary,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_length,
        "activation_function": "gelu" if config.activation == "gelu" else "gelu_new",
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def _describe_llama(config: TransformerConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.key_value_heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_length,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "attention_bias": config.use_bias,
        "mlp_bias": config.use_bias,
        "tie_word_embeddings": config.tied_embeddings,
    }


def from_hugging_face_config(directory: Path) -> TransformerConfig:
    """Reads the ``config.json`` of a GPT-2 or Llama checkpoint.

    Dropout is 0 whatever the file says: set it with ``dataclasses.replace`` to train with it.

    Args:
        directory: of the checkpoint.

    Raises:
        FileNotFoundError: no ``config.json``.
        InputError: another type of model, a missing size, or a variant that
            :class:`~fedjax_mtl.models.transformer.TransformerConfig` does not cover.
    """
    file = pathlib.Path(directory) / _CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"{directory} holds no {_CONFIG}; point to the directory of a checkpoint"
        )
    values = json.loads(file.read_text())
    readers = {"gpt2": _read_gpt2, "llama": _read_llama}
    model_type = values.get("model_type")
    if model_type not in readers:
        raise InputError(
            f"{file} is of model_type {model_type!r}; only {tuple(readers)} can be read"
        )
    try:
        return readers[model_type](values)
    except KeyError as error:
        raise InputError(f"{file} does not say {error}") from error
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error


def _refuse_variants(values: dict[str, Any], expected: dict[str, Any]) -> None:
    """Checks that settings that change what the model computes are absent or as expected."""
    for name, value in expected.items():
        if values.get(name, value) != value:
            raise InputError(f"{name} = {values[name]!r} is not supported, only {value!r}")


def _read_gpt2(values: dict[str, Any]) -> TransformerConfig:
    _refuse_variants(
        values,
        {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    )
    activation = values.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise InputError(
            f"activation_function = {activation!r} is not supported, only "
            f"{tuple(_GPT2_ACTIVATIONS)}"
        )
    return TransformerConfig(
        vocabulary=values["vocab_size"],
        width=values["n_embd"],
        num_layers=values["n_layer"],
        num_heads=values["n_head"],
        mlp_width=values.get("n_inner") or 4 * values["n_embd"],
        max_length=values["n_positions"],
        norm_epsilon=values.get("layer_norm_epsilon", 1e-5),
        activation=_GPT2_ACTIVATIONS[activation],
        fused_attention=True,
        tied_embeddings=values.get("tie_word_embeddings", True),
    )


def _read_llama(values: dict[str, Any]) -> TransformerConfig:
    bias = values.get("attention_bias", False)
    head_width = values["hidden_size"] // values["num_attention_heads"]
    _refuse_variants(values, {"hidden_act": "silu", "rope_scaling": None})
    if values.get("mlp_bias", False) != bias:
        raise InputError("attention and MLP must both have biases or both have none")
    # Versions differ in whether they write the usual head_dim, as null or at all.
    if values.get("head_dim") not in (None, head_width):
        raise InputError(
            f"head_dim = {values['head_dim']} is not supported, only hidden_size / "
            "num_attention_heads"
        )
    # From version 5 on the rotary settings are a group of their own.
    rotary = values.get("rope_parameters") or {}
    _refuse_variants(rotary, {"rope_type": "default", "partial_rotary_factor": 1.0})
    shape = llama(
        values["vocab_size"],
        values["hidden_size"],
        values["num_hidden_layers"],
        values["num_attention_heads"],
        values["intermediate_size"],
        values["max_position_embeddings"],
        num_key_value_heads=values.get("num_key_value_heads"),
        norm_epsilon=values.get("rms_norm_eps", 1e-6),
        rotary_base=rotary.get("rope_theta", values.get("rope_theta", 10_000.0)),
        tied_embeddings=values.get("tie_word_embeddings", False),
    )
    return dataclasses.replace(shape, use_bias=bias)


def checkpoint_model(vocabulary: int, *, directory: str | None = None) -> LanguageModel:
    """Returns the language model of a checkpoint, without its weights.

    Args:
        vocabulary: how many different tokens the data have.
        directory: of the checkpoint, see :func:`from_hugging_face_config`.

    Raises:
        InputError: no directory, or a model that knows fewer tokens.
        FileNotFoundError: no ``config.json`` there.
    """
    if not directory:
        raise InputError(
            "config.model.directory is empty; name the folder of a GPT-2 or Llama checkpoint "
            "(config.json, model.safetensors)"
        )
    shape = from_hugging_face_config(directory)
    if shape.vocabulary < vocabulary:
        raise InputError(
            f"the tokenizer has {vocabulary} tokens but the model in {directory} "
            f"{shape.vocabulary}; use its own tokenizer"
        )
    return language_model(shape)
