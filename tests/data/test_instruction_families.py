"""Template instructions: the right answers, no repetition, and examples that fit tiny models."""

import numpy as np
import pytest

from fedjax_mtl.data import instruction_families as families
from fedjax_mtl.data import instructions

DEFAULT = families.draw_families(0)


def answer(instruction: str, context: str) -> str:
    """What the answer should be, spelt out another way."""
    match instruction:
        case "copy":
            return context
        case "reverse":
            return "".join(reversed(context))
        case "upper":
            return context.upper()
        case "add":
            return str(sum(map(int, context.split("+"))))
        case "count":
            return str(sum(1 for _ in context))
        case "sort":
            return "".join(letter * context.count(letter) for letter in sorted(set(context)))
        case "first":
            return context[: context.index(" ")]
        case "last":
            return context[context.rindex(" ") + 1 :]
        case "no vowels":
            return context.translate(str.maketrans("", "", "aeiou"))
    raise AssertionError(instruction)


def test_answers():
    for item in DEFAULT.instructions:
        assert item.response == answer(item.instruction, item.context) != ""
    asked = {
        item.instruction for item in DEFAULT.instructions if item.category == "first_or_last_word"
    }
    assert asked == {"first", "last"}
    assert len({(item.instruction, item.category) for item in DEFAULT.instructions}) == 9


def test_each_client_has_one_family():
    clients = DEFAULT.clients
    assert len(families.FAMILIES) == 8
    assert clients.categories == [family for family in families.FAMILIES for _ in range(2)]
    assert [len(own) for own in clients.train] == [32] * 16
    assert [len(own) for own in clients.test] == [16] * 16
    for train, test, category in zip(*clients, strict=True):
        own = np.concatenate([train, test])
        assert {DEFAULT.instructions[row].category for row in own} == {category}
    rows = np.concatenate(clients.train + clients.test)
    assert sorted(rows.tolist()) == list(range(len(DEFAULT.instructions)))


def test_nothing_occurs_twice_in_a_family():
    assert len(set(DEFAULT.instructions)) == len(DEFAULT.instructions)


def test_examples_fit_into_32_bytes():
    tokenizer = instructions.ByteTokenizer()
    examples = instructions.encode_examples(DEFAULT.instructions, tokenizer, 32, "short")
    assert (examples["labels"] == tokenizer.end_token).sum() == len(DEFAULT.instructions)
    splits = instructions.federate(examples, DEFAULT.clients)
    assert splits.train.num_clients == splits.test.num_clients == 16
    assert (splits.train.capacity, splits.test.capacity) == (32, 16)


def test_the_seed_decides():
    assert families.draw_families(0).instructions == DEFAULT.instructions
    assert families.draw_families(1).instructions != DEFAULT.instructions


def test_refused():
    with pytest.raises(ValueError, match=r"'add_digits' has only about \d+ .* 102 are wanted"):
        families.draw_families(0, test_examples=19)
    with pytest.raises(ValueError, match="must be at least 1"):
        families.draw_families(0, train_examples=0)
