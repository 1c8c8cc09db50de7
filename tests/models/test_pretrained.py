"""Checkpoints: PyTorch's logits and generations, round trips, other layouts, refusals.

The golden checkpoints are random GPT-2 and Llama models of the Hugging Face library (all weights
and biases drawn, grouped queries in the Llama). They are stored with its logits and its greedy
generations of single prompts; versions are in their ``expected.json``.
"""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_trees_close

from fedjax_mtl import models
from fedjax_mtl.models import decoding
from fedjax_mtl.models.pretrained import (
    from_hugging_face_config,
    load_safetensors,
    save_safetensors,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
BOTH = pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_llama"])


@functools.cache
def load(name):
    config = from_hugging_face_config(GOLDEN / name)
    return config, load_safetensors(GOLDEN / name, config)


def expected(name):
    return json.loads((GOLDEN / name / "expected.json").read_text())


def tensors_of(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def write(directory, tensors, like):
    """Writes a checkpoint of changed tensors."""
    directory.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    shutil.copy(GOLDEN / like / "config.json", directory)
    return directory


def load_changed(tmp_path, name, change):
    tensors = tensors_of(GOLDEN / name)
    change(tensors)
    return load_safetensors(write(tmp_path / "changed", tensors, name), load(name)[0])


@BOTH
def test_logits_are_pytorchs(name):
    config, params = load(name)
    golden = expected(name)
    logits = jax.jit(models.language_model(config).apply)(params, jnp.array(golden["tokens"]), None)
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-5, atol=2e-5)


@BOTH
def test_generations_are_pytorchs(name):
    config, params = load(name)
    golden = expected(name)
    prompts, new = golden["prompts"], golden["max_new_tokens"]
    padded = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    answers = np.full((len(prompts), new), -1)
    for row, (prompt, answer) in enumerate(zip(prompts, golden["answers"], strict=True)):
        padded[row, : len(prompt)] = prompt
        kept = [token for token in answer if token != golden["end_token"]]
        answers[row, : len(kept)] = kept

    @jax.jit
    def decode(params, prompts, lengths):
        model = models.language_model(config)
        return decoding.greedy(
            model, params, prompts, lengths, max_new_tokens=new, end_token=golden["end_token"]
        )

    np.testing.assert_array_equal(
        decode(params, padded, np.array([len(p) for p in prompts])), answers
    )


def test_configurations_are_read():
    assert from_hugging_face_config(GOLDEN / "tiny_gpt2") == dataclasses.replace(
        models.gpt2(),
        vocabulary=64,
        width=16,
        num_layers=2,
        num_heads=4,
        mlp_width=40,
        max_length=32,
    )
    assert models.from_hugging_face_config(GOLDEN / "tiny_llama") == models.llama(
        80, 24, 2, 4, 40, 32, num_key_value_heads=2, norm_epsilon=1e-5, rotary_base=500.0
    )


@BOTH
def test_saving_writes_the_same_checkpoint(name, tmp_path):
    config, params = load(name)
    save_safetensors(tmp_path / "new" / "checkpoint", params, config)
    saved = tensors_of(tmp_path / "new" / "checkpoint")
    original = tensors_of(GOLDEN / name)
    assert saved.keys() == original.keys()
    for key, tensor in original.items():
        np.testing.assert_array_equal(saved[key], tensor)
    assert from_hugging_face_config(tmp_path / "new" / "checkpoint") == config
    described = json.loads((tmp_path / "new" / "checkpoint" / "config.json").read_text())
    theirs = json.loads((GOLDEN / name / "config.json").read_text())
    assert described["architectures"] == theirs["architectures"]


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(
            models.gpt2(dropout=0.1),
            vocabulary=7,
            width=4,
            num_layers=1,
            num_heads=2,
            mlp_width=5,
            max_length=6,
            activation="gelu",
            tied_embeddings=False,
        ),
        dataclasses.replace(models.llama(7, 8, 1, 2, 5, 6, tied_embeddings=True), use_bias=True),
    ],
    ids=["gpt2", "llama"],
)
def test_round_trip_of_variants(config, tmp_path):
    params = jax.tree.map(
        lambda p: p.astype(jnp.bfloat16),
        jax.jit(models.language_model(config).init)(jax.random.key(0)),
    )
    save_safetensors(tmp_path, params, config)
    assert from_hugging_face_config(tmp_path) == dataclasses.replace(config, dropout=0.0)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert ("lm_head.weight" in tensors_of(tmp_path)) != config.tied_embeddings
    loaded = load_safetensors(tmp_path, config, jnp.bfloat16)
    assert_trees_close(loaded, params, rtol=0, atol=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}


@BOTH
def test_shards_half_precision_buffers_and_missing_prefixes(name, tmp_path):
    config, params = load(name)
    prefix = {"tiny_gpt2": "transformer.", "tiny_llama": "model."}[name]
    tensors = {key.removeprefix(prefix): value for key, value in tensors_of(GOLDEN / name).items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    tensors["layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    keys = sorted(tensors)
    shards = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for (file, names), dtype in zip(shards.items(), (ml_dtypes.bfloat16, np.float16), strict=True):
        part = {key: tensors[key].astype(dtype) for key in names}
        safetensors.numpy.save_file(part, tmp_path / file)
    index = {key: file for file, names in shards.items() for key in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    loaded = load_safetensors(tmp_path, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float32)}
    assert_trees_close(loaded, params, rtol=2**-8, atol=1e-6)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"names \['b.safetensors'\], which are not there; download"
    ):
        load_safetensors(tmp_path, config)


def test_a_stored_tied_head_is_ignored(tmp_path):
    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()

    assert_trees_close(
        load_changed(tmp_path, "tiny_gpt2", add_head), load("tiny_gpt2")[1], rtol=0, atol=0
    )


def test_refused_checkpoints(tmp_path):
    config, _ = load("tiny_llama")
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor .*convert"):
        load_safetensors(tmp_path, config)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="not a safetensors file .*Download it again"):
        load_safetensors(tmp_path, config)
    with pytest.raises(
        ValueError, match="no tensor 'model.norm.weight', which final_norm/scale needs;"
    ):
        load_changed(tmp_path, "tiny_llama", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match="no tensor 'lm_head.weight', .*are its embeddings tied"):
        load_changed(tmp_path, "tiny_llama", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(
        ValueError, match=r"1 tensors that the configuration does not use, e.g. \['extra'\]"
    ):
        load_changed(tmp_path, "tiny_llama", lambda tensors: tensors.update(extra=np.ones(2)))
    with pytest.raises(
        ValueError,
        match=r"'model.layers.0.self_attn.k_proj.weight' .* has shape \(12, 24\), "
        r"but blocks_0/attention/key/kernel needs \(24, 24\)",
    ):
        load_safetensors(GOLDEN / "tiny_llama", dataclasses.replace(config, num_key_value_heads=4))
    with pytest.raises(ValueError, match="tensors that the configuration does not use"):
        load_safetensors(GOLDEN / "tiny_llama", dataclasses.replace(config, num_layers=1))


def test_refused_parameters(tmp_path):
    tiny = models.tiny_transformer(5, max_length=4)
    with pytest.raises(
        ValueError, match="only models of GPT-2's shape .* have a Hugging Face layout"
    ):
        save_safetensors(tmp_path, {}, tiny)
    config, params = load("tiny_llama")
    with pytest.raises(ValueError, match=r"not those of the configuration: \['final_norm/scale'\]"):
        save_safetensors(tmp_path, {k: v for k, v in params.items() if k != "final_norm"}, config)
    with pytest.raises(ValueError, match=r"has shape \(2, .*client axes removed"):
        save_safetensors(tmp_path, jax.tree.map(lambda p: jnp.stack([p, p]), params), config)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "tiny_gpt2",
            {"model_type": "bert"},
            "model_type 'bert'; only .'gpt2', 'llama'. can be read",
        ),
        (
            "tiny_gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "inverse_layer_idx = True is not supported",
        ),
        (
            "tiny_gpt2",
            {"activation_function": "relu"},
            "activation_function = 'relu' is not supported",
        ),
        ("tiny_gpt2", {"n_head": 3}, "config.json: width 16 is not divisible by num_heads 3"),
        ("tiny_gpt2", {"n_embd": None}, "does not say 'n_embd'"),
        ("tiny_llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
        ("tiny_llama", {"head_dim": 8}, "head_dim = 8 is not supported"),
        ("tiny_llama", {"mlp_bias": True}, "must both have biases"),
        ("tiny_llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling = .* is not supported"),
        (
            "tiny_llama",
            {"rope_parameters": {"rope_type": "llama3"}},
            "rope_type = 'llama3' is not supported",
        ),
    ],
)
def test_refused_configurations(name, changes, message, tmp_path):
    values = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=message):
        from_hugging_face_config(tmp_path)


def test_no_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        from_hugging_face_config(tmp_path)


def test_older_llama_configurations(tmp_path):
    values = json.loads((GOLDEN / "tiny_llama" / "config.json").read_text())
    values |= {
        "rope_theta": values.pop("rope_parameters")["rope_theta"],
        "rope_scaling": None,
        "head_dim": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert from_hugging_face_config(tmp_path) == load("tiny_llama")[0]
