"""LoRA and prompt tuning: what they compute, what they leave alone, and what they cost."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close

from fedjax_mtl import Solver, models, tasks
from fedjax_mtl.clients.central import train_centrally
from fedjax_mtl.clients.training import loss_gradient
from fedjax_mtl.core import batching, trees
from fedjax_mtl.models import adapters
from fedjax_mtl.models.decoding import greedy
from fedjax_mtl.models.low_rank import dense_layers, merge, num_adapter_parameters
from fedjax_mtl.tasks import example_losses

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "mira.json").read_text())
TARGETS = ("*/attention/query", "*/attention/value", "*/mlp/*")
BASE = models.language_model(models.tiny_transformer(12, max_length=24))
LORA = models.lora(BASE, targets=TARGETS, rank=4, alpha=8)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 12, (3, 10)))


def perturbed(params, seed=0):
    """Adapters that are not zero."""
    leaves, structure = jax.tree.flatten(params["adapters"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return {**params, "adapters": jax.tree.unflatten(structure, moved)}


@pytest.mark.parametrize(
    ("alpha", "name"), [(8, "lora_forward_scaled"), (None, "lora_forward_unscaled_paper_eq7")]
)
def test_forward_golden(alpha, name):
    given = GOLDEN["inputs"]
    dense = models.linear((3,), 4)
    model = models.lora(dense, targets=["decoder"], rank=given["rank"], alpha=alpha)
    for client, expected in zip(given["lora_after_local"], GOLDEN["outputs"][name], strict=True):
        pair = {"a": jnp.array(client["A"]).T, "b": jnp.array(client["B"]).T}
        base = {"decoder": {"kernel": jnp.array(given["W0"]).T, "bias": jnp.zeros(4)}}
        params = {"adapters": {"decoder": pair}, "base": base}
        outputs = model.apply(params, jnp.array(given["x"])[None], None)[0]
        np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_starts_as_the_base_model():
    params = LORA.init(jax.random.key(0))
    np.testing.assert_array_equal(LORA.apply(params, TOKENS), BASE.apply(params["base"], TOKENS))


def test_equals_merged_weights():
    params = perturbed(LORA.init(jax.random.key(0)))
    merged = merge(params, rank=4, alpha=8)
    np.testing.assert_allclose(LORA.apply(params, TOKENS), BASE.apply(merged, TOKENS), atol=2e-5)
    assert (
        float(jnp.abs(LORA.apply(params, TOKENS) - BASE.apply(params["base"], TOKENS)).max()) > 0.05
    )


def test_any_model_of_dense_layers():
    """The library's own dense layer takes adapters too, here in an MLP.

    Small batches take another path through that layer than large ones.
    """
    mlp = models.mlp((6,), 3, (5, 4))
    model = models.lora(mlp, targets=["encoder/*"], rank=2)
    params = perturbed(model.init(jax.random.key(1)))
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32)
    merged = merge(params, rank=2)
    np.testing.assert_allclose(
        model.apply(params, inputs, None), mlp.apply(merged, inputs, None), atol=1e-5
    )
    assert set(dense_layers(mlp)) == {("decoder",), ("encoder", "Dense_0"), ("encoder", "Dense_1")}


def test_gradient_is_of_adapters_alone():
    """The gradient equals the chain rule through the merged kernel.

    That is dA = scale dW B^T and dB = scale A^T dW.
    """
    params = perturbed(LORA.init(jax.random.key(2)))
    labels = jnp.roll(TOKENS, -1, axis=1)
    task = tasks.language_modelling()

    def loss(own):
        return jnp.mean(task.loss(LORA.apply({**params, "adapters": own}, TOKENS), labels))

    def merged_loss(base):
        return jnp.mean(task.loss(BASE.apply(base, TOKENS), labels))

    ours = jax.grad(loss)(params["adapters"])["blocks_0"]["mlp"]["up"]
    kernel = jax.grad(merged_loss)(merge(params, rank=4, alpha=8))["blocks_0"]["mlp"]["up"][
        "kernel"
    ]
    pair = params["adapters"]["blocks_0"]["mlp"]["up"]
    np.testing.assert_allclose(ours["a"], 2 * kernel @ pair["b"].T, atol=1e-5)
    np.testing.assert_allclose(ours["b"], 2 * pair["a"].T @ kernel, atol=1e-5)


def test_dropout_only_in_training():
    model = models.lora(BASE, targets=TARGETS, rank=4, dropout=0.5)
    params = perturbed(model.init(jax.random.key(0)))
    quiet = model.apply(params, TOKENS, None)
    np.testing.assert_array_equal(
        quiet, models.lora(BASE, targets=TARGETS, rank=4).apply(params, TOKENS, None)
    )
    noisy = [model.apply(params, TOKENS, jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert float(jnp.abs(noisy[0] - noisy[2]).max()) > 1e-3
    mean = np.mean([model.apply(params, TOKENS, jax.random.key(s)) for s in range(200)], axis=0)
    assert np.abs(mean - quiet).mean() < np.abs(noisy[0] - quiet).mean()


def test_vmapped_clients_share_one_base():
    """The compiled program has no array of clients x base weights."""
    wide = models.language_model(
        models.tiny_transformer(12, width=64, mlp_width=256, max_length=16)
    )
    model = models.lora(wide, targets=TARGETS, rank=2)
    params = model.init(jax.random.key(0))
    clients = 16
    stacked = trees.broadcast_clients(params["adapters"], clients)
    tokens = jnp.zeros((clients, 2, 8), jnp.int32)

    def losses(stacked, base, tokens):
        def one(own, x):
            return jnp.mean(jnp.square(model.apply({"adapters": own, "base": base}, x, None)))

        return jax.vmap(jax.grad(one), in_axes=(0, 0))(stacked, tokens)

    text = jax.jit(losses).lower(stacked, params["base"], tokens).as_text()
    assert f"{clients}x64x256xf32" not in text and f"{clients}x256x64xf32" not in text
    assert "64x256xf32" in text


def test_parameter_counts_of_the_letter():
    gpt2 = models.language_model(models.gpt2("large"))
    assert num_adapter_parameters(gpt2, ["*/query_key_value", "*/output", "*/down"], 8) == 4_055_040
    llama = models.language_model(models.data_juicer())
    assert num_adapter_parameters(llama, ["*/query"], 16) == 1_572_864
    for model, expected in ((llama, 583_936), (gpt2, 371_200)):
        tuned = models.prompt_tuning(model)
        shapes = jax.eval_shape(tuned.init, jax.random.key(0))["adapters"]
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


@pytest.mark.parametrize("pattern", ["*/attention/key_proj", "token_embedding"])
def test_pattern_without_a_layer(pattern):
    with pytest.raises(
        ValueError, match="matches no dense layer of the model; it has blocks_0/attention/key"
    ):
        models.lora(BASE, targets=[pattern], rank=2)


def test_bad_settings():
    for changes in ({"rank": 0}, {"dropout": 1.0}, {"targets": []}):
        with pytest.raises(ValueError):
            models.lora(BASE, **{"targets": TARGETS, "rank": 2, **changes})
    with pytest.raises(ValueError):
        models.prompt_tuning(BASE, num_tokens=0)


def test_base_weights_from_elsewhere():
    params = LORA.init(jax.random.key(0))
    other = BASE.init(jax.random.key(9))
    assert_trees_close(adapters.load_base(params, other)["base"], other)
    seeds = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    loaded = adapters.load_base(seeds, other)["base"]
    assert_trees_close(jax.tree.map(lambda x: x[1], loaded), other)
    wrong = models.language_model(models.tiny_transformer(13, max_length=24)).init(
        jax.random.key(0)
    )
    with pytest.raises(
        ValueError, match=r"token_embedding/embedding has shape \(13, 32\) in the weights"
    ):
        adapters.load_base(params, wrong)
    with pytest.raises(ValueError, match="missing from the weights"):
        adapters.load_base(params, {k: v for k, v in other.items() if k != "final_norm"})


# --- Prompt tuning.


def prompted():
    model = models.prompt_tuning(BASE, num_tokens=5, hidden=16)
    return model, model.init(jax.random.key(4))


def test_prompt_changes_outputs_and_gets_gradients():
    model, params = prompted()
    outputs = model.apply(params, TOKENS)
    assert outputs.shape == (3, 10, 12)
    assert float(jnp.abs(outputs - BASE.apply(params["base"], TOKENS)).max()) > 1e-3
    grads = jax.grad(lambda own: jnp.sum(model.apply({**params, "adapters": own}, TOKENS)[0] ** 2))(
        params["adapters"]
    )
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "make", [prompted, lambda: (LORA, perturbed(LORA.init(jax.random.key(0))))]
)
def test_cached_decoding_equals_recomputing(make):
    model, params = make()
    lengths = jnp.array([4, 7, 2])
    prompts = jnp.where(jnp.arange(8) < lengths[:, None], TOKENS[:, :8], 0)
    answers = jax.jit(lambda p: greedy(model, p, prompts, lengths, max_new_tokens=6, end_token=-1))(
        params
    )
    whole = jax.jit(model.apply)
    for row in range(3):
        tokens = np.zeros((1, 13), int)
        count = int(lengths[row])
        tokens[0, :count] = prompts[row, :count]
        for position in range(count, count + 6):
            tokens[0, position] = jnp.argmax(whole(params, tokens)[0, position - 1])
        np.testing.assert_array_equal(answers[row], tokens[0, count : count + 6])


# --- Base models.


def test_central_training_is_plain_training():
    examples = {"inputs": np.asarray(TOKENS), "labels": np.asarray(jnp.roll(TOKENS, -1, axis=1))}
    task = tasks.language_modelling()
    trained = train_centrally(
        BASE,
        task,
        examples,
        solver=Solver(optax.sgd(0.5), batching.steps(3, None)),
        key=jax.random.key(0),
    )
    params = BASE.init(jax.random.split(jax.random.key(0))[0])
    gradient = loss_gradient(example_losses(BASE, task))
    batch = batching.Batch(jax.tree.map(jnp.asarray, examples), jnp.ones(3, bool), jnp.ones(3))
    for _ in range(3):
        _, grads = gradient(params, batch, None)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    assert_trees_close(trained.params, params, rtol=1e-4, atol=1e-5)
