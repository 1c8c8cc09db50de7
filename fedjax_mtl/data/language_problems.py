"""Problems of clients who tune a language model, on chains or on instructions."""

import numpy as np

from fedjax_mtl import tasks
from fedjax_mtl.core.checks import InputError, check_choice
from fedjax_mtl.core.federation import make_federation
from fedjax_mtl.data import instruction_families, instructions, markov_chains
from fedjax_mtl.data.instructions import Tokenizer
from fedjax_mtl.data.problem import Generation, Problem, ProblemGroup, one_group

# Enough that a small base model does not learn its pre-training set by heart.
_PRETRAINING_DRAWS = 12


def chains_problem(
    *,
    num_clients: int = 16,
    num_groups: int = 4,
    train_sequences: int = 8,
    test_sequences: int = 128,
    follow: float = 0.75,
    seed: int = 0,
) -> Problem:
    """Clients with noisy permutation chains for languages.

    The base model is trained on sequences of other chains. See
    :func:`fedjax_mtl.data.markov_chains.draw_chains`.

    Args:
        num_clients: how many clients.
        num_groups: groups of clients whose chains are nearly the same.
        train_sequences: training sequences of each client.
        test_sequences: test sequences of each client.
        follow: probability of following the permutation.
        seed: of the draw.
    """
    made = markov_chains.draw_chains(
        seed,
        num_clients=num_clients,
        num_groups=num_groups,
        train_sequences=train_sequences,
        test_sequences=test_sequences,
        follow=follow,
    )
    shape = made.splits.train.examples["inputs"].shape[1:]
    return one_group(
        ProblemGroup(made.splits, tasks.language_modelling(), shape, 12),
        alike=made.groups,
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
    examples = instructions.encode_examples(items, tokenizer, max_length, template)
    prompts, lengths = instructions.encode_prompts(items, tokenizer, max_length, template)
    asked = make_federation({"prompts": prompts, "lengths": lengths}, clients.test)
    references = [item.response for item in items]
    group = ProblemGroup(
        instructions.federate(examples, clients),
        tasks.language_modelling(),
        (max_length,),
        tokenizer.vocabulary,
    )
    return one_group(
        group,
        alike=np.unique(clients.categories, return_inverse=True)[1],
        generation=Generation(asked, references, tokenizer, max_new_tokens),
    )


def families_problem(
    *,
    clients_per_family: int = 2,
    train_examples: int = 32,
    test_examples: int = 16,
    max_length: int = 32,
    max_new_tokens: int = 8,
    seed: int = 0,
) -> Problem:
    """Eight families of tiny instructions in bytes.

    The base model is pre-trained on other draws of them, with shuffled answers: it learns what
    questions and answers look like, not which belong together.

    Args:
        clients_per_family: clients of each family.
        train_examples: training instructions of each client.
        test_examples: test instructions of each client.
        max_length: tokens of an example; longer ones are cut.
        max_new_tokens: of an answer.
        seed: of all draws.
    """
    made = instruction_families.draw_families(
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
    rng = np.random.default_rng([seed, 1])
    draws = rng.integers(2**31, size=_PRETRAINING_DRAWS)
    asked = [
        item
        for draw in draws
        for item in instruction_families.draw_families(int(draw)).instructions
    ]
    shuffled = [
        item._replace(response=asked[other].response)
        for item, other in zip(asked, rng.permutation(len(asked)), strict=True)
    ]
    pretraining = instructions.encode_examples(shuffled, tokenizer, max_length, "short")
    return problem._replace(pretraining=pretraining)


def instruction_files_problem(
    *,
    source: str = "dolly",
    path: str | None = None,
    tokenizer: str | None = None,
    clients_per_category: int = 10,
    max_length: int = 512,
    max_new_tokens: int = 128,
    longest_prompt: int = 384,
    seed: int = 0,
) -> Problem:
    """Instructions from files, in the tokens of a checkpoint's ``tokenizer.json``.

    Args:
        source: ``dolly``, a JSONL file, or ``natural_instructions``, a folder of tasks.
        path: the file or folder.
        tokenizer: the folder of ``tokenizer.json``.
        clients_per_category: clients among whom each category is dealt.
        max_length: tokens of an example; longer ones are cut.
        max_new_tokens: of an answer.
        longest_prompt: in tokens; instructions with longer ones are left out.
        seed: of the draws.

    Raises:
        InputError: no path or tokenizer, or an unknown source.
        FileNotFoundError: a file that is not there.
    """
    check_choice("config.data.source", source, ("dolly", "natural_instructions"))
    if not path or not tokenizer:
        raise InputError(
            "config.data.path and config.data.tokenizer name the data and the folder of "
            "tokenizer.json, e.g. --config.data.path=databricks-dolly-15k.jsonl "
            "--config.data.tokenizer=gpt2"
        )
    if source == "dolly":
        items = instructions.load_dolly(path)
    else:
        items = instructions.load_natural_instructions(path, seed=seed)
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
