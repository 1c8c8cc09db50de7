"""Clients who tune a language model: chains, families of instructions, instruction files."""

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.problems.base import Generation, Problem
from fedjax_mtl import make_federation, tasks
from fedjax_mtl.data import instruction_families, instructions, markov_chains
from fedjax_mtl.data.instructions import Tokenizer


def chains(
    *,
    num_clients: int,
    num_groups: int,
    train_sequences: int,
    test_sequences: int,
    follow: float,
    seed: int,
) -> Problem:
    """Clients with noisy permutation chains for languages, and sequences of other chains for the base model."""
    made = markov_chains.markov_chains(
        seed,
        num_clients=num_clients,
        num_groups=num_groups,
        train_sequences=train_sequences,
        test_sequences=test_sequences,
        follow=follow,
    )
    inputs = made.splits.train.examples["inputs"]
    return Problem(
        made.splits,
        tasks.language_modelling(),
        inputs.shape[1:],
        12,
        groups=made.groups,
        pretraining=markov_chains.pretraining_sequences(seed),
    )


def _instruction_problem(
    items: list[instructions.Instruction],
    clients: instructions.ClientRows,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_new_tokens: int,
    template: str,
) -> Problem:
    """Instructions as examples with masked prompts, and the test prompts to answer."""
    examples = instructions.encode(items, tokenizer, max_length, template)
    prompts, lengths = instructions.encode_prompts(items, tokenizer, max_length, template)
    asked = make_federation({"prompts": prompts, "lengths": lengths}, clients.test)
    references = [item.response for item in items]
    return Problem(
        instructions.federate(examples, clients),
        tasks.language_modelling(),
        (max_length,),
        tokenizer.vocabulary,
        groups=np.unique(clients.categories, return_inverse=True)[1],
        generation=Generation(asked, references, tokenizer, max_new_tokens),
    )


# Enough that a small base model does not learn its pre-training set by heart.
_PRETRAINING_DRAWS = 12


def families(
    *,
    clients_per_family: int,
    train_examples: int,
    test_examples: int,
    max_length: int,
    max_new_tokens: int,
    seed: int,
) -> Problem:
    """Eight families of tiny instructions in bytes; the base model is pre-trained on other draws of them with shuffled answers."""
    made = instruction_families.instruction_families(
        seed,
        clients_per_family=clients_per_family,
        train_examples=train_examples,
        test_examples=test_examples,
    )
    tokenizer = instructions.ByteTokenizer()
    problem = _instruction_problem(
        made.instructions,
        made.clients,
        tokenizer,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        template="short",
    )
    # What questions and answers look like, not which belong together.
    rng = np.random.default_rng([seed, 1])
    draws = rng.integers(2**31, size=_PRETRAINING_DRAWS)
    asked = [
        item
        for draw in draws
        for item in instruction_families.instruction_families(int(draw)).instructions
    ]
    shuffled = [
        item._replace(response=asked[other].response)
        for item, other in zip(asked, rng.permutation(len(asked)), strict=True)
    ]
    pretraining = instructions.encode(shuffled, tokenizer, max_length, "short")
    return problem._replace(pretraining=pretraining)


def instruction_files(
    *,
    source: str,
    path: str,
    tokenizer: str,
    clients_per_category: int,
    max_length: int,
    max_new_tokens: int,
    longest_prompt: int,
    seed: int,
) -> Problem:
    """Dolly (a JSONL file) or Natural Instructions (a folder of tasks), in the tokens of a checkpoint's ``tokenizer.json``."""
    if not path or not tokenizer:
        raise ValueError(
            "config.data.path and config.data.tokenizer name the data and the folder of tokenizer.json, e.g. "
            "--config.data.path=databricks-dolly-15k.jsonl --config.data.tokenizer=gpt2"
        )
    if source == "dolly":
        items = instructions.load_dolly(path)
    elif source == "natural_instructions":
        items = instructions.load_natural_instructions(path, seed=seed)
    else:
        raise ValueError(
            f"unknown config.data.source {source!r}; expected dolly or natural_instructions"
        )
    encoder = instructions.load_tokenizer(tokenizer)
    items = instructions.keep_fitting(items, encoder, min(longest_prompt, max_length))
    clients = instructions.deal_categories(items, clients_per_category, seed)
    return _instruction_problem(
        items,
        clients,
        encoder,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        template="alpaca",
    )


DATASETS: dict[str, Callable[..., Any]] = {
    "chains": chains,
    "families": families,
    "instruction_files": instruction_files,
}
