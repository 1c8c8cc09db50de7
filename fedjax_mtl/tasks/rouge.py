"""ROUGE-L, the F1 of the longest common subsequence.

See Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3. With a
hypothesis of a words or tokens, a reference of b and a longest common subsequence of l, precision
is l / a, recall l / b, and their harmonic mean 2 l / (a + b).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.task import Description

DESCRIPTIONS = {"rouge_l": Description(higher_is_better=True, unit="%")}
"""How a run's ``rouge_l`` is to be read. It is not primary: it is scored once, at a run's end."""


def rouge_l(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """ROUGE-L F1 in percent of each pair of texts, float64 ``[pairs]``, on the host.

    Words are runs of the letters a-z and digits, of the lower-cased text and without stemming, as
    the ``rouge-score`` package cuts them: a text without any, empty or in another script, scores 0.

    Args:
        hypotheses: the texts that are judged.
        references: the right text for each of them.

    Raises:
        InputError: not one reference a hypothesis.
    """
    from rouge_score import rouge_scorer

    if len(hypotheses) != len(references):
        raise InputError(
            f"{len(hypotheses)} hypotheses but {len(references)} references; "
            "give one reference a hypothesis"
        )
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    scores = [
        scorer.score(reference.strip().lower(), hypothesis.strip().lower())["rougeL"].fmeasure
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
    return 100 * np.array(scores, np.float64)


def _longest_common_subsequence(first: jax.Array, second: jax.Array) -> jax.Array:
    """Its length, int32 ``[]``, for tokens ``[a]`` and ``[b]``; negative entries match nothing."""

    def next_row(row: jax.Array, token: jax.Array) -> tuple[jax.Array, None]:
        # row[j] belongs to the tokens so far and the first j of the other sequence. A match extends
        # row[j - 1], and what is left of the recursion, the maximum with the entry to the left, is
        # a running maximum.
        match = (token == second) & (token >= 0)
        best = jnp.maximum(row[1:], jnp.where(match, row[:-1] + 1, 0))
        return jax.lax.cummax(jnp.concatenate([row[:1], best])), None

    row, _ = jax.lax.scan(next_row, jnp.zeros(len(second) + 1, jnp.int32), first)
    return row[-1]


def rouge_l_tokens(hypotheses: jax.Array, references: jax.Array) -> jax.Array:
    """ROUGE-L F1 in percent on tokens instead of words, float32 ``[batch]``.

    It is 0 where either side is empty.

    Args:
        hypotheses: int32 ``[batch, a]``. Negative entries are padding at the end.
        references: int32 ``[batch, b]``, padded likewise.
    """
    common = jax.vmap(_longest_common_subsequence)(hypotheses, references)
    sizes = jnp.sum(hypotheses >= 0, axis=-1) + jnp.sum(references >= 0, axis=-1)
    return 200.0 * common.astype(jnp.float32) / jnp.maximum(sizes, 1)
