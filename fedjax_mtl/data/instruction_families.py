"""Eight families of tiny instructions built in code: instruction tuning without a file.

They are for byte-level models and stand in for the tasks of MIRA (Elbakary et al., arXiv
2410.15524, section IV): every client has one family, and a few clients share it. Contexts are
random words of a few letters. With the ``short`` template and a
:class:`~fedjax_mtl.data.instructions.ByteTokenizer`, every example fits into 32 tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedjax_mtl.core.checks import InputError
from fedjax_mtl.data.instructions import ClientRows, Instruction

LETTERS = "aeioubdlnrst"
VOWELS = "aeiou"

Family = Callable[[np.random.Generator], tuple[str, str, str]]

_TRIES = 100  # draws for each example that is wanted, repetitions included


class InstructionFamilies(NamedTuple):
    """The instructions, and who owns which.

    Attributes:
        instructions: client after client, with each one's training part first.
        clients: the rows of ``instructions`` that each client owns.
    """

    instructions: list[Instruction]
    clients: ClientRows


def _word(rng: np.random.Generator, shortest: int = 3, longest: int = 5) -> str:
    return "".join(rng.choice(list(LETTERS), rng.integers(shortest, longest + 1)))


def _on_a_word(instruction: str, answer: Callable[[str], str], shortest: int = 3) -> Family:
    """Returns a family that asks one thing of one word.

    It is ``rng -> (instruction, context, response)``.
    """

    def draw(rng: np.random.Generator) -> tuple[str, str, str]:
        word = _word(rng, shortest)
        return instruction, word, answer(word)

    return draw


def _add(rng: np.random.Generator) -> tuple[str, str, str]:
    first, second = rng.integers(10, size=2)
    return "add", f"{first}+{second}", str(first + second)


def _first_or_last(rng: np.random.Generator) -> tuple[str, str, str]:
    words = [_word(rng) for _ in range(3)]
    if rng.random() < 0.5:
        return "first", " ".join(words), words[0]
    return "last", " ".join(words), words[-1]


def _without_vowels(word: str) -> str:
    return "".join(letter for letter in word if letter not in VOWELS)


_FAMILIES: dict[str, Family] = {
    "copy": _on_a_word("copy", lambda word: word),
    "reverse": _on_a_word("reverse", lambda word: word[::-1]),
    "upper_case": _on_a_word("upper", str.upper),
    "add_digits": _add,
    "count_letters": _on_a_word("count", lambda word: str(len(word)), shortest=1),
    "sort_letters": _on_a_word("sort", lambda word: "".join(sorted(word))),
    "first_or_last_word": _first_or_last,
    "remove_vowels": _on_a_word("no vowels", _without_vowels),
}
FAMILIES = tuple(_FAMILIES)


def draw_families(
    seed: int, *, clients_per_family: int = 2, train_examples: int = 32, test_examples: int = 16
) -> InstructionFamilies:
    """Draws every family's instructions and deals them to its clients.

    A client's category is its family. No instruction occurs twice within a family, neither in two
    clients nor in train and test, so that no client can learn another one's test answers by heart.
    Addition has just 100: by default 96 of them are used.

    Args:
        seed: of the draw.
        clients_per_family: how many clients share a family.
        train_examples: training examples of each client.
        test_examples: test examples of each client.

    Raises:
        InputError: a count below 1, or more examples than a family has.
    """
    if min(clients_per_family, train_examples, test_examples) < 1:
        raise InputError(
            f"clients_per_family is {clients_per_family}, train_examples {train_examples} and "
            f"test_examples {test_examples}; all must be at least 1"
        )
    per_client = train_examples + test_examples
    found = InstructionFamilies([], ClientRows([], [], []))
    for number, family in enumerate(FAMILIES):
        rng = np.random.default_rng([seed, number])
        start = len(found.instructions)
        found.instructions.extend(_draw_distinct(family, clients_per_family * per_client, rng))
        for client in range(clients_per_family):
            own = np.arange(per_client) + start + client * per_client
            found.clients.train.append(own[:train_examples])
            found.clients.test.append(own[train_examples:])
            found.clients.categories.append(family)
    return found


def _draw_distinct(family: str, count: int, rng: np.random.Generator) -> list[Instruction]:
    """Draws ``count`` different instructions that have an answer.

    A word of vowels alone has no answer when its vowels are removed.
    """
    drawn: dict[tuple[str, str, str], None] = {}
    for _ in range(_TRIES * count):
        item = _FAMILIES[family](rng)
        if item[-1]:
            drawn[item] = None
        if len(drawn) == count:
            return [Instruction(*item, family) for item in drawn]
    raise InputError(
        f"family {family!r} has only about {len(drawn)} different instructions but {count} are "
        "wanted for its clients; lower clients_per_family, train_examples or test_examples"
    )
