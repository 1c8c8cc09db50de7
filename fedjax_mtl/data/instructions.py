"""Instructions and their answers for language models: data sets, prompts, tokens, who owns what.

Two public data sets are read from files that are already there; nothing is downloaded. The
partitions are those of MIRA (Elbakary et al., arXiv 2410.15524, section IV, and its released code).
On Dolly (databricks-dolly-15k) every category is dealt to ten clients; on Natural Instructions
(Wang et al., arXiv 2204.07705) a client is one task.

The prompt ends with a heading for the answer, after Alpaca (Taori et al., 2023), in words of our
own. Prompt and answer are tokenised apart, so that a generated answer continues exactly what
training saw. Examples are ``inputs`` and ``labels``, int32 ``[n, length]``: a label is the token
after its input, or ``IGNORED`` at prompt positions and padding, as
:func:`fedjax_mtl.tasks.language_modelling` expects them.
"""

import bisect
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.core.federation import Splits, make_federation
from fedjax_mtl.tasks.language import IGNORED

TEMPLATES = ("alpaca", "short")

_DOLLY = (
    "the file databricks-dolly-15k.jsonl, one object a line with instruction, context, response "
    "and category"
)
_NATURAL = (
    "a task of Natural Instructions 2.8 (the folder tasks of "
    "https://github.com/allenai/natural-instructions), an object with Definition, a list of "
    "texts, and Instances, a list of objects with input and output"
)
# Where released models keep the name of their end token, and common names of it, tried in this
# order.
_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_END_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]")


class Instruction(NamedTuple):
    """One instruction and its answer.

    Attributes:
        instruction: what is asked.
        context: what it is asked about; may be empty.
        response: the answer.
        category: a name for the kind of question.
    """

    instruction: str
    context: str
    response: str
    category: str


class ClientRows(NamedTuple):
    """Who owns what, as row numbers of a list of instructions.

    Attributes:
        train: the training rows of each client.
        test: the test rows of each client.
        categories: the category of each client.
    """

    train: list[np.ndarray]
    test: list[np.ndarray]
    categories: list[str]


# --- Reading


def load_dolly(path: str | os.PathLike[str]) -> list[Instruction]:
    """Reads databricks-dolly-15k: a line of JSON for each instruction, in the order of the file.

    Blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: a line is no JSON object, lacks a field or has no answer, or there is no line.
            The message names file and line.
    """
    path = Path(path)
    _check_there(path, _DOLLY)
    found = []
    # Bytes, as text would also be split at rarer line ends that are legal within JSON strings.
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _parse(line, where, _DOLLY)
        item = Instruction(*(_text(record, field, where, _DOLLY) for field in Instruction._fields))
        if not item.response.strip():
            raise InputError(
                f"{where}: the response is empty; remove the line, there is nothing to learn"
            )
        found.append(item)
    if not found:
        raise InputError(f"{path} holds no instruction; expected {_DOLLY}")
    return found


def load_natural_instructions(
    directory: str | os.PathLike[str],
    task_files: Sequence[str] | None = None,
    *,
    num_tasks: int = 80,
    share: float = 0.2,
    seed: int = 0,
    longest_input: int = 1023,
    fewest_instances: int = 20,
) -> list[Instruction]:
    """Reads the first tasks that are large enough, and of each a random share of its instances.

    Each task is a category. The defaults are those of MIRA's released code. The instruction is the
    first definition and the response the first reference output; an instance whose first output is
    blank is dropped like one whose input is too long.

    Args:
        directory: the folder with one JSON file a task.
        task_files: names of tasks with or without ``.json``, walked in this order: for the official
            training tasks, the lines of ``splits/default/train_tasks.txt``. None walks all files in
            alphabetical order.
        num_tasks: stop after so many tasks.
        share: of a task's remaining instances, rounded, at least two (one to learn from, one to
            test).
        seed: of the random shares.
        longest_input: characters; instances with more are dropped.
        fewest_instances: tasks with fewer left are skipped.

    Returns:
        Task after task, instances in the order of the file.

    Raises:
        FileNotFoundError: there is no such folder or file.
        InputError: a file is no JSON, a field is missing, an argument is out of range, or fewer
            than ``num_tasks`` tasks are left.
    """
    if not 0 < share <= 1:
        raise InputError(f"share is {share}; give a share of the instances in (0, 1]")
    if num_tasks < 1 or fewest_instances < 2:
        raise InputError(
            f"num_tasks is {num_tasks} and fewest_instances {fewest_instances}; "
            "give at least 1 task and at least 2 instances"
        )
    rng = np.random.default_rng(seed)
    found: list[Instruction] = []
    kept = 0
    for path in _task_paths(Path(directory), task_files):
        instances = [item for item in _read_task(path) if len(item.context) <= longest_input]
        if len(instances) < fewest_instances:
            continue
        count = max(round(share * len(instances)), 2)
        found += [
            instances[row] for row in np.sort(rng.choice(len(instances), count, replace=False))
        ]
        kept += 1
        if kept == num_tasks:
            return found
    raise InputError(
        f"{directory}: only {kept} tasks have at least {fewest_instances} instances of at most "
        f"{longest_input} characters, but num_tasks is {num_tasks}; lower num_tasks or give more "
        "task files"
    )


def _task_paths(directory: Path, task_files: Sequence[str] | None) -> list[Path]:
    if not directory.is_dir():
        raise FileNotFoundError(
            f"There is no folder {directory}. Expected the folder tasks of Natural Instructions "
            "2.8, https://github.com/allenai/natural-instructions; nothing is downloaded by "
            "itself."
        )
    if task_files is None:
        return sorted(directory.glob("*.json"))
    return [directory / f"{name.removesuffix('.json')}.json" for name in task_files]


def _read_task(path: Path) -> list[Instruction]:
    """Reads all instances of a task that have an answer.

    The category is the file's name without ``.json``.
    """
    _check_there(path, _NATURAL)
    task = _parse(path.read_bytes(), str(path), _NATURAL)
    definition = _first_text(task, "Definition", str(path))
    if not isinstance(task.get("Instances"), list):
        raise InputError(f"{path}: field 'Instances' is missing or no list; expected {_NATURAL}")
    found = []
    for number, instance in enumerate(task["Instances"]):
        where = f"{path}, instance {number}"
        if not isinstance(instance, dict):
            raise InputError(f"{where}: no object; expected {_NATURAL}")
        context = _text(instance, "input", where, _NATURAL)
        response = _first_text(instance, "output", where)
        if response.strip():
            found.append(Instruction(definition, context, response, path.stem))
    return found


def _check_there(path: Path, expected: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}. Expected {expected}; nothing is downloaded by itself."
        )


def _parse(data: bytes, where: str, expected: str) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError as error:  # also bytes that are no UTF-8
        raise InputError(f"{where}: not valid JSON ({error}); expected {expected}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: no JSON object; expected {expected}")
    return record


def _text(record: dict[str, Any], field: str, where: str, expected: str) -> str:
    if not isinstance(record.get(field), str):
        raise InputError(f"{where}: field {field!r} is missing or no text; expected {expected}")
    return record[field]


def _first_text(record: dict[str, Any], field: str, where: str) -> str:
    values = record.get(field)
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        raise InputError(
            f"{where}: field {field!r} is missing or no list of texts; expected {_NATURAL}"
        )
    return values[0]


# --- Tokenizers


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
        vocabulary: tokens are ``0 .. vocabulary - 1``.
        start_tokens: what every text starts with, often nothing.
        end_token: follows an answer.
        padding_token: fills rows up; no model should attend to it.
    """

    vocabulary: int
    start_tokens: list[int]
    end_token: int
    padding_token: int

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without start and end."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text of the tokens before the first end token.

        Other special tokens and negative numbers are left out.
        """


class ByteTokenizer:
    """The bytes of UTF-8, then an end and a padding token.

    It is a vocabulary of 258 that needs no file.
    """

    vocabulary = 258
    end_token = 256
    padding_token = 257

    def __init__(self) -> None:
        self.start_tokens: list[int] = []

    def encode(self, text: str) -> list[int]:
        """Returns the bytes of a text."""
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text of the bytes before the first end token."""
        kept = [token for token in _before(tokens, self.end_token) if token < 256]
        return bytes(kept).decode("utf-8", errors="replace")


class FileTokenizer:
    """A tokenizer of the ``tokenizers`` library; see :func:`load_tokenizer`."""

    def __init__(self, tokenizer: Any, end_token: int) -> None:
        """Wraps a tokenizer of the library, whose own cutting and padding are turned off.

        Args:
            tokenizer: a ``tokenizers.Tokenizer``.
            end_token: the token that ends an answer.
        """
        padding = tokenizer.padding
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        # The largest token, not their number: files may leave numbers out.
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1
        self.end_token = end_token
        self.padding_token = padding["pad_id"] if padding else end_token
        empty = tokenizer.encode("")
        added = zip(empty.ids, empty.special_tokens_mask, strict=True)
        # Some put an end after every text as well; it belongs after the answer only.
        self.start_tokens: list[int] = [
            token for token, special in added if special and token != end_token
        ]

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without start and end."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text of the tokens before the first end token."""
        return self._tokenizer.decode(_before(tokens, self.end_token), skip_special_tokens=True)


def load_tokenizer(
    directory: str | os.PathLike[str], end_token: str | None = None
) -> FileTokenizer:
    """Reads ``tokenizer.json`` from a model's folder.

    Args:
        directory: the model's folder.
        end_token: its name; by default the ``eos_token`` of ``tokenizer_config.json`` or
            ``special_tokens_map.json`` beside it, then the first of a few common names that the
            vocabulary has.

    Raises:
        FileNotFoundError: there is no ``tokenizer.json``.
        InputError: the file is no tokenizer, or no end token can be found.
    """
    from tokenizers import Tokenizer as LibraryTokenizer

    directory = Path(directory)
    path = directory / "tokenizer.json"
    _check_there(
        path, "the tokenizer that the Hugging Face tokenizers library saves beside a model"
    )
    try:
        tokenizer = LibraryTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: no tokenizer of the tokenizers library ({error})") from error
    named = end_token or _end_name(directory)
    for name in [named] if named else _END_NAMES:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return FileTokenizer(tokenizer, token)
    missing = (
        f"the vocabulary has no {named!r}"
        if named
        else f"none of {_END_NAMES} is in the vocabulary"
    )
    raise InputError(
        f"{path}: no end token; {missing}. "
        "Give the name of the token that ends an answer as end_token"
    )


def _end_name(directory: Path) -> str | None:
    """Returns the end token's name as the files beside ``tokenizer.json`` have it.

    There it is a text, or an object with ``content``.
    """
    for name in _SETTINGS_FILES:
        path = directory / name
        if path.is_file():
            named = _parse(path.read_bytes(), str(path), "the settings of a tokenizer").get(
                "eos_token"
            )
            named = named.get("content") if isinstance(named, dict) else named
            if named:
                return named
    return None


def _before(tokens: Iterable[int], end_token: int) -> list[int]:
    """Returns the tokens before the first end token, without negative ones.

    Negative ones stand for no token where answers are padded.
    """
    kept = [int(token) for token in tokens if token >= 0]
    return kept[: kept.index(end_token)] if end_token in kept else kept


# --- Prompts and tokens


def format_prompt(instruction: str, context: str = "", template: str = "alpaca") -> str:
    """Returns the text before the answer.

    Args:
        instruction: what is asked.
        context: what it is asked about; may be empty.
        template: ``alpaca`` with an explanation and headings, or ``short``
            (``instruction: context``) for tiny models.

    Raises:
        InputError: an unknown template.
    """
    if template not in TEMPLATES:
        raise InputError(f"unknown template {template!r}; expected one of {TEMPLATES}")
    if template == "short":
        return f"{instruction}: {context}\n" if context else f"{instruction}\n"
    given = ", and the input that it is about" if context else ""
    about = f"### Input:\n{context}\n\n" if context else ""
    return (
        f"You are given an instruction{given}. Answer it as well as you can.\n\n"
        f"### Instruction:\n{instruction}\n\n{about}### Response:\n"
    )


def encode_examples(
    instructions: Sequence[Instruction],
    tokenizer: Tokenizer,
    max_length: int,
    template: str = "alpaca",
) -> dict[str, np.ndarray]:
    """Returns examples to train on.

    The answer and the end token are counted in the loss; all else is ``IGNORED``. Where prompt and
    answer are too long together, the context loses its beginning; if that is not enough, the answer
    loses its end.

    Args:
        instructions: one a row.
        tokenizer: text to tokens.
        max_length: tokens in a row.
        template: see :func:`format_prompt`.

    Returns:
        ``inputs`` and ``labels``, int32 ``[n, max_length]``, filled up on the right.

    Raises:
        InputError: no token of an answer would fit, or an unknown template. The message names the
            example.
    """
    shape = (len(instructions), max_length)
    inputs = np.full(shape, tokenizer.padding_token, np.int32)
    labels = np.full(shape, IGNORED, np.int32)
    for row, item in enumerate(instructions):
        answer = [*tokenizer.encode(item.response), tokenizer.end_token]
        # The last token is only predicted, so that a row holds one token more than it has inputs.
        prompt = _prompt_tokens(item, tokenizer, max_length + 1 - len(answer), template)
        tokens = np.array([*prompt, *answer][: max_length + 1], np.int32)
        if len(prompt) > max_length:
            raise InputError(
                _does_not_fit(row, len(prompt), f"max_length {max_length} and an answer")
            )
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        tokens[: len(prompt)] = IGNORED
        labels[row, : len(tokens) - 1] = tokens[1:]
    return {"inputs": inputs, "labels": labels}


def encode_prompts(
    instructions: Sequence[Instruction],
    tokenizer: Tokenizer,
    capacity: int,
    template: str = "alpaca",
) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts to generate answers from.

    Where a prompt is too long, the context loses its beginning.

    Args:
        instructions: one a row.
        tokenizer: text to tokens.
        capacity: tokens; a model's longest sequence less those to be generated.
        template: see :func:`format_prompt`.

    Returns:
        The prompts, int32 ``[n, capacity]``, filled up on the right, and their lengths, int32
        ``[n]``.

    Raises:
        InputError: a prompt does not fit even without its context, or an unknown template. The
            message names the example.
    """
    prompts = np.full((len(instructions), capacity), tokenizer.padding_token, np.int32)
    lengths = np.zeros(len(instructions), np.int32)
    for row, item in enumerate(instructions):
        prompt = _prompt_tokens(item, tokenizer, capacity, template)
        if len(prompt) > capacity:
            raise InputError(_does_not_fit(row, len(prompt), f"capacity {capacity}"))
        prompts[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    return prompts, lengths


def keep_fitting(
    instructions: Sequence[Instruction], tokenizer: Tokenizer, room: int, template: str = "alpaca"
) -> list[Instruction]:
    """Returns the instructions whose prompt fits, if need be without its context.

    Args:
        instructions: to choose from.
        tokenizer: text to tokens.
        room: tokens; what :func:`encode_examples` takes as ``max_length``.
        template: see :func:`format_prompt`.
    """
    return [
        item
        for item in instructions
        if len(_prompt_tokens(item, tokenizer, room, template)) <= room
    ]


def _prompt_tokens(item: Instruction, tokenizer: Tokenizer, room: int, template: str) -> list[int]:
    """Returns the prompt, cut to fit into ``room`` tokens.

    As little as possible of the beginning of its context is cut off. Without any context it may
    still be too long. The text is cut, not the tokens, so that what is left is tokenised as text
    always is.
    """

    def tokens(cut: int) -> list[int]:
        text = format_prompt(item.instruction, item.context[cut:], template)
        return [*tokenizer.start_tokens, *tokenizer.encode(text)]

    cut = bisect.bisect_left(
        range(len(item.context)), True, key=lambda cut: len(tokens(cut)) <= room
    )
    return tokens(cut)


def _does_not_fit(row: int, needed: int, room: str) -> str:
    return (
        f"example {row}: its prompt takes {needed} tokens without any context, too many for "
        f"{room}; raise the limit, or leave such examples out with keep_fitting"
    )


# --- Clients


def deal_categories(
    instructions: Sequence[Instruction],
    clients_per_category: int = 10,
    seed: int = 0,
    test_share: float = 0.2,
) -> ClientRows:
    """Deals every category at random and evenly to clients of its own.

    Each client's part is cut into train and test. Clients of a category follow each other,
    categories in the order of their first appearance. With one client a category and the tasks of
    Natural Instructions as categories, a client is a task.

    Args:
        instructions: to deal.
        clients_per_category: how many clients share a category.
        seed: of the deal.
        test_share: of each client's instructions, rounded, at least one on either side.

    Raises:
        InputError: a category with fewer than two instructions a client, or an argument out of
            range.
    """
    if clients_per_category < 1 or not 0 < test_share < 1:
        raise InputError(
            f"clients_per_category is {clients_per_category} and test_share {test_share}; "
            "give at least 1 client and a share between 0 and 1"
        )
    rng = np.random.default_rng(seed)
    categories = np.array([item.category for item in instructions])
    clients = ClientRows([], [], [])
    for category in dict.fromkeys(categories.tolist()):
        members = rng.permutation(np.nonzero(categories == category)[0])
        if len(members) < 2 * clients_per_category:
            raise InputError(
                f"category {category!r} has {len(members)} instructions for {clients_per_category} "
                "clients, who need two each, one to learn from and one to test; use fewer clients "
                "or drop the category"
            )
        for own in np.array_split(members, clients_per_category):
            count = min(max(round(test_share * len(own)), 1), len(own) - 1)
            clients.train.append(own[count:])
            clients.test.append(own[:count])
            clients.categories.append(category)
    return clients


def federate(examples: dict[str, np.ndarray], clients: ClientRows) -> Splits:
    """Returns the clients' train and test sets over one table of examples.

    Args:
        examples: from :func:`encode_examples`, a row for each instruction.
        clients: who owns which rows.
    """
    train = make_federation(examples, clients.train)
    return Splits(train, make_federation(train.examples, clients.test))
