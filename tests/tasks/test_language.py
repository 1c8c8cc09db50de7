"""Masked token losses and ROUGE-L, against loops written from the definitions."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import VMAP
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_mtl import make_federation, tasks
from fedjax_mtl.evaluation import evaluate_clients
from fedjax_mtl.tasks import rouge
from fedjax_mtl.tasks.language import IGNORED

TASK = tasks.language_modelling()
SETTINGS = settings(deadline=None, max_examples=30)
LENGTH = 6


def make_batch(seed=0, batch=5, vocabulary=4):
    """Random logits and labels; the last example has no counted position."""
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(batch, LENGTH, vocabulary)).astype(np.float32)
    labels = rng.integers(vocabulary, size=(batch, LENGTH)).astype(np.int32)
    labels[rng.random(labels.shape) < 0.4] = IGNORED
    labels[-1] = IGNORED
    return outputs, labels


def by_hand(outputs, labels):
    """The losses and hits of the counted positions, one list for each example."""
    losses, hits = [], []
    for logits, label in zip(outputs.astype(np.float64), labels, strict=True):
        places = [p for p in range(len(label)) if label[p] != IGNORED]
        losses.append([np.log(np.exp(logits[p]).sum()) - logits[p, label[p]] for p in places])
        hits.append([float(logits[p].argmax() == label[p]) for p in places])
    return losses, hits


def test_only_counted_positions_count():
    outputs, labels = make_batch()
    losses, hits = by_hand(outputs, labels)
    means = [np.mean(own) if own else 0 for own in losses]
    np.testing.assert_allclose(TASK.loss(outputs, labels), means, rtol=1e-5)
    shares = [np.mean(own) if own else 0 for own in hits]
    accuracy = TASK.metrics["accuracy"].measure
    np.testing.assert_allclose(accuracy(outputs, labels), shares, rtol=1e-6)
    assert means[-1] == shares[-1] == 0


def test_without_mask_it_is_sequence_classification():
    outputs, labels = make_batch()
    labels = np.maximum(labels, 0)
    other = tasks.sequence_classification()
    np.testing.assert_allclose(TASK.loss(outputs, labels), other.loss(outputs, labels), rtol=1e-6)
    ours, theirs = (task.metrics["accuracy"].measure for task in (TASK, other))
    np.testing.assert_allclose(ours(outputs, labels), theirs(outputs, labels), rtol=1e-6)
    models, weights = np.stack([outputs, -outputs]), jnp.array([0.3, 0.7])
    mixed = jax.nn.softmax(TASK.mix(models, weights))
    np.testing.assert_allclose(
        mixed, 0.3 * jax.nn.softmax(outputs) + 0.7 * jax.nn.softmax(-outputs), rtol=1e-5
    )


def test_ignored_positions_have_no_gradient():
    outputs, labels = make_batch()
    gradients = np.array(jax.grad(lambda logits: TASK.loss(logits, labels).sum())(outputs))
    assert np.isfinite(gradients).all()
    assert not gradients[labels == IGNORED].any()
    assert (np.abs(gradients[labels != IGNORED]).max(axis=-1) > 0).all()


def test_pooled_metrics_weigh_tokens_not_examples():
    outputs, labels = make_batch(batch=7)
    # All that evaluation asks of an algorithm; inputs are numbers of examples here.
    algorithm = SimpleNamespace(
        num_clients=2, predict=lambda state, ids, inputs: jnp.asarray(outputs)[inputs]
    )
    state = SimpleNamespace(clients=())
    examples = {"inputs": np.arange(7), "labels": labels}
    federation = make_federation(examples, [np.arange(4), np.arange(4, 7)])
    values = evaluate_clients(algorithm, TASK, VMAP, batch_size=3)(state, federation)
    losses, _ = by_hand(outputs, labels)
    for client, own in enumerate((losses[:4], losses[4:])):
        pooled = np.mean(np.concatenate(own))
        np.testing.assert_allclose(values["token_loss"][client], pooled, rtol=1e-5)
        np.testing.assert_allclose(values["perplexity"][client], np.exp(pooled), rtol=1e-5)


def common_length(first, second):
    """Length of the longest common subsequence, by the textbook table."""
    table = np.zeros((len(first) + 1, len(second) + 1), int)
    for i, a in enumerate(first, start=1):
        for j, b in enumerate(second, start=1):
            table[i, j] = (
                table[i - 1, j - 1] + 1 if a == b else max(table[i - 1, j], table[i, j - 1])
            )
    return table[-1, -1]


def f1(first, second):
    common = common_length(first, second)
    if not common:
        return 0.0
    precision, recall = common / len(first), common / len(second)
    return 100 * 2 * precision * recall / (precision + recall)


def padded(sequences, width):
    return jnp.array([[*own, *[-1] * (width - len(own))] for own in sequences], jnp.int32)


WIDTH = 7
SCORE = jax.jit(rouge.rouge_l_tokens)
TOKENS = st.lists(st.lists(st.integers(0, 3), max_size=WIDTH), min_size=3, max_size=3)


@SETTINGS
@given(TOKENS, TOKENS)
def test_rouge_of_tokens_equals_the_dynamic_program(hypotheses, references):
    scores = np.array(SCORE(padded(hypotheses, WIDTH), padded(references, WIDTH)))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, list(map(f1, hypotheses, references)), rtol=1e-5)
    # Symmetric, within bounds, and 100 exactly for equal sequences.
    np.testing.assert_array_equal(
        scores, SCORE(padded(references, WIDTH), padded(hypotheses, WIDTH))
    )
    assert (scores >= 0).all() and (scores <= 100).all()
    for hypothesis, reference, score in zip(hypotheses, references, scores, strict=True):
        assert (score == 100) == (hypothesis == reference and bool(hypothesis))


def test_rouge_of_tokens_ignores_padding_and_maps():
    rng = np.random.default_rng(0)
    first, second = rng.integers(4, size=(2, 3, 5)).tolist()
    plain = rouge.rouge_l_tokens(padded(first, 5), padded(second, 5))
    wide = rouge.rouge_l_tokens(padded(first, 9), padded(second, WIDTH))
    np.testing.assert_array_equal(plain, wide)
    stacked = jnp.stack([padded(first, 5), padded(second, 5)])
    mapped = jax.vmap(rouge.rouge_l_tokens)(stacked, stacked[::-1])
    np.testing.assert_array_equal(mapped, np.stack([plain, plain]))
    assert rouge.rouge_l_tokens(jnp.zeros((2, 0), jnp.int32), padded(first, 5)[:2]).tolist() == [
        0,
        0,
    ]
    assert rouge.rouge_l_tokens(padded(first, 5)[:2], jnp.zeros((2, 0), jnp.int32)).tolist() == [
        0,
        0,
    ]


@SETTINGS
@given(*[st.lists(st.sampled_from(["the", "Cat", "sat", "on", "mat"]), max_size=8)] * 2)
def test_rouge_of_texts_is_that_of_their_words(hypothesis, reference):
    score = rouge.rouge_l([" ".join(hypothesis) + " \n"], [", ".join(reference).upper()])
    assert score.shape == (1,)
    np.testing.assert_allclose(score, f1(hypothesis, reference), rtol=1e-9)


def test_rouge_of_texts():
    hypotheses = ["the cat", "", "  ", "A dog!", "no"]
    references = ["The cat sat", "something", "else", "a dog", ""]
    np.testing.assert_allclose(rouge.rouge_l(hypotheses, references), [80, 0, 0, 100, 0])
    assert rouge.rouge_l([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 hypotheses but 1 references"):
        rouge.rouge_l(["a", "b"], ["a"])
