"""Answers that every client's own model gives to its test prompts, and their ROUGE-L."""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import assembly
from experiments.outputs import workdir
from experiments.plan import Plan
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.data.problem import Generation, Problem
from fedjax_mtl.models import LanguageModel
from fedjax_mtl.models.decoding import greedy
from fedjax_mtl.tasks import rouge

PyTree = Any

TASK = workdir.JudgedTask("answers", rouge.DESCRIPTIONS)
"""What the rows about answers are on."""


def answering(model: LanguageModel, asked: Generation) -> LanguageModel:
    """The model whose outputs are its greedy answers.

    A client predicts with some function of its parameters, whichever the algorithm is; with this
    model its predictions are answers.

    Args:
        model: of language.
        asked: the prompts, for the length of an answer and the token that ends it.
    """

    def apply(params: PyTree, prompts: PyTree, key: jax.Array | None) -> jax.Array:
        del key
        return greedy(
            model,
            params,
            prompts["prompts"],
            prompts["lengths"],
            max_new_tokens=asked.max_new_tokens,
            end_token=asked.tokenizer.end_token,
        )

    return model._replace(apply=apply)


def _asked(problem: Problem) -> Generation:
    if problem.generation is None:
        raise InputError("these data have no prompts to answer; use those of instructions")
    return problem.generation


def make_generation(plan: Plan, problem: Problem) -> Callable[[PyTree], jax.Array]:
    """``state -> greedy answers`` of a run's clients, as tokens.

    They are int32 ``[clients, capacity, max_new_tokens]``; padding answers nonsense. It is one
    program that takes one client at a time: its prompts are a batch, so the cache holds one
    client's.

    Args:
        plan: of the run.
        problem: with prompts to answer.
    """
    asked = _asked(problem)
    algorithm, _ = assembly.make_algorithm(plan, problem, lambda model: answering(model, asked))
    federation = asked.federation

    def generate(state: PyTree) -> jax.Array:
        def one(client: tuple[jax.Array, jax.Array]) -> jax.Array:
            client_id, rows = client
            prompts = jax.tree.map(lambda leaf: leaf[rows][None], federation.examples)
            return algorithm.predict(state, client_id[None], prompts)[0]

        return jax.lax.map(one, (jnp.arange(federation.num_clients), federation.indices))

    return generate


def _judged_clients(asked: Generation, tokens: np.ndarray) -> Iterator[list[dict[str, Any]]]:
    """Client by client, each answer with its reference and its ROUGE-L."""
    indices, sizes = (np.asarray(x) for x in (asked.federation.indices, asked.federation.sizes))
    for client, size in enumerate(sizes):
        answers = [asked.tokenizer.decode(row[row >= 0].tolist()) for row in tokens[client, :size]]
        references = [asked.references[row] for row in indices[client, :size]]
        values = rouge.rouge_l(answers, references)
        yield [
            {"client": client, "answer": answer, "reference": reference, "rouge_l": float(value)}
            for answer, reference, value in zip(answers, references, values, strict=True)
        ]


def score(
    plan: Plan,
    problem: Problem,
    states: PyTree,
    seeds: tuple[int, ...],
    directory: pathlib.Path,
) -> dict[int, np.ndarray]:
    """ROUGE-L F1 in percent by seed, the mean over each client's test prompts, ``[clients]``.

    The answers go to ``answers.jsonl``.

    Args:
        plan: of the run.
        problem: with prompts to answer.
        states: of all seeds.
        seeds: in the order of the states.
        directory: of the run.
    """
    asked, scores = _asked(problem), {}
    generate = jax.jit(make_generation(plan, problem))
    with (directory / "answers.jsonl").open("w") as file:
        for place, seed in enumerate(seeds):
            state = jax.tree.map(lambda leaf, p=place: leaf[p], states)
            means = []
            for lines in _judged_clients(asked, np.asarray(generate(state))):
                means.append(np.mean([line["rouge_l"] for line in lines]))
                for line in lines:
                    line = {"seed": seed, **line, "rouge_l": round(line["rouge_l"], 3)}
                    file.write(json.dumps(line) + "\n")
            scores[seed] = np.array(means)
    return scores
