"""Answers that every client's own model gives to its test prompts, and their ROUGE-L."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import build
from experiments.problems.base import Problem
from fedjax_mtl.models.decoding import greedy
from fedjax_mtl.tasks.rouge import rouge_l

PyTree = Any


def make_generation(
    config: ml_collections.ConfigDict, problem: Problem
) -> Callable[[PyTree], jax.Array]:
    """``state -> greedy answers`` of one run's clients, int32 ``[clients, capacity, max_new_tokens]``; padding answers nonsense.

    One program, one client at a time: its prompts are a batch, so the cache holds one client's.
    """
    asked = problem.generation

    def answering(model):
        """The model whose outputs are answers: what a state's clients predict with is any function of their parameters."""

        def apply(params, prompts, key):
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

    algorithm, _ = build.make_algorithm(config, problem, answering)
    federation = asked.federation

    def generate(state):
        def one(client):
            client_id, rows = client
            prompts = jax.tree.map(lambda leaf: leaf[rows][None], federation.examples)
            return algorithm.predict(state, client_id[None], prompts)[0]

        return jax.lax.map(one, (jnp.arange(federation.num_clients), federation.indices))

    return generate


def score(
    config: ml_collections.ConfigDict,
    problem: Problem,
    states: PyTree,
    seeds: tuple[int, ...],
    directory: pathlib.Path,
) -> dict[int, np.ndarray]:
    """ROUGE-L F1 in percent by seed, the mean over each client's test prompts, ``[clients]``; answers go to ``answers.jsonl``."""
    asked = problem.generation
    indices, sizes = (np.asarray(x) for x in (asked.federation.indices, asked.federation.sizes))
    generate, scores = jax.jit(make_generation(config, problem)), {}
    with (directory / "answers.jsonl").open("w") as file:
        for place, seed in enumerate(seeds):
            state = jax.tree.map(lambda leaf, p=place: leaf[p], states)
            tokens = np.asarray(generate(state))
            means = []
            for client, size in enumerate(sizes):
                answers = [
                    asked.tokenizer.decode(row[row >= 0].tolist()) for row in tokens[client, :size]
                ]
                references = [asked.references[row] for row in indices[client, :size]]
                values = rouge_l(answers, references)
                means.append(values.mean())
                for answer, reference, value in zip(answers, references, values, strict=True):
                    line = {
                        "seed": seed,
                        "client": client,
                        "answer": answer,
                        "reference": reference,
                    }
                    file.write(json.dumps({**line, "rouge_l": round(float(value), 3)}) + "\n")
            scores[seed] = np.array(means)
    return scores
