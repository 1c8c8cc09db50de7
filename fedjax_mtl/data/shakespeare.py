"""Next-character prediction on Shakespeare, one client per speaking role.

The text is the complete works in Project Gutenberg's 1994 layout (etext 100), the one that LEAF
and the released FedEM code read. In that layout

* a play starts with its title, a few lines above a line "by William Shakespeare";
* a speech starts with two spaces, the role's name, a full stop and a space ("  HAMLET. Words");
* its further lines start with at least four spaces (stage directions do too, and count as
  lines of the speech, as in LEAF);
* The Comedy of Errors alone has no indentation: a speech there starts with the name, and goes
  on to the next one, to a line that starts with "<" or to "THE END"; "ACT ..." is no role.

Of each role, the first 80% of the lines are for training and the last ones, at least one, for
testing. A sample is a window of 80 characters and the same window one character later; windows
never cross from the training part to the test part.

Sources:
    Caldas et al., "LEAF: A Benchmark for Federated Settings", 2018 (arXiv:1812.01097).
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        2017 (arXiv:1602.05629).
    Marfoq et al., "Federated Multi-Task Learning under a Mixture of Distributions", 2021
        (arXiv:2108.10252), and its released code (character set, windows, loss weights).
"""

from __future__ import annotations

import os
import re
import string
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedjax_mtl.core.checks import InputError

CHARACTERS: str = string.printable
"""The vocabulary: the 100 printable ASCII characters; a character's code is its index here."""

WINDOW: int = 80
"""Characters in a sample."""

_SOURCE = (
    "Project Gutenberg's etext 100 in its 1994 layout, the file 100.txt in "
    "https://www.gutenberg.org/files/100/old/1994-01-100.zip"
)

_LOSS_WEIGHTS = {
    "\n": 0.437953, " ": 0.042501, ",": 0.655960, ".": 0.698723, "I": 0.977749,
    "a": 0.222602, "c": 0.813312, "d": 0.407186, "e": 0.134556, "f": 0.790867,
    "g": 0.953292, "h": 0.249691, "i": 0.274449, "l": 0.372965, "m": 0.569937,
    "n": 0.252073, "o": 0.193414, "r": 0.260357, "s": 0.253478, "t": 0.187647,
    "u": 0.474301, "w": 0.747062, "y": 0.638830,
}  # fmt: skip

_SPEECH = re.compile(r" {2}([A-Za-z][A-Za-z ]*)\. (.*)")
_MORE = re.compile(r" {4}(.*)")
_SPEECH_FLUSH = re.compile(r"([A-Za-z][A-Za-z ]*)\. (.*)")
_FLUSH_PLAY = "THE COMEDY OF ERRORS"
_POEMS = ("THE SONNETS", "A LOVER'S COMPLAINT")
_END = re.compile(r"\*\*\* ?END |End of (the|this|The Complete)\b.*(Gutenberg|Etext|Works)", re.I)
_TITLE_REACH = 7  # a title stands at most this many lines above "by William Shakespeare"
_PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--"}
)


class RoleWindows(NamedTuple):
    """Samples of all clients, client after client, each with its training samples first.

    `inputs` and `labels` are views of one array [num, 81], so that the set takes 81 bytes a
    sample.

    Attributes:
        inputs: uint8 [num, 80], character codes (indices into `CHARACTERS`).
        labels: uint8 [num, 80], the code that follows each of `inputs`.
        client: int32 [num], the client of each sample, an index into `names`.
        is_test: bool [num], whether the sample is from the last lines of its role.
        names: one "PLAY_ROLE" per client, in the order of the text.
    """

    inputs: np.ndarray
    labels: np.ndarray
    client: np.ndarray
    is_test: np.ndarray
    names: list[str]


def load_shakespeare(
    path: str | os.PathLike[str],
    stride: int = 1,
    max_windows_per_client: int | None = None,
) -> RoleWindows:
    """Reads the complete works and cuts every role's lines into samples.

    Roles of one or two lines are dropped, and so are roles whose training lines come to 80
    characters or fewer, as they have no training sample. A role may be left without a test
    sample, where its last lines are that short. All windows of the text are about 4.2 million.

    Args:
        path: text file in the layout described at the top of this module.
        stride: distance between the starts of two windows; 1 takes every window.
        max_windows_per_client: keep at most so many windows of a client, the first ones of each
            part, at most a fifth of them for testing; None keeps all.

    Returns:
        The samples (shapes at `RoleWindows`).

    Raises:
        FileNotFoundError: where there is no such file.
        InputError: where the file holds no play or no role that is long enough, or an argument
            is below 1.
    """
    if stride < 1:
        raise InputError(f"stride must be at least 1, got {stride}.")
    if max_windows_per_client is not None and max_windows_per_client < 1:
        raise InputError(
            f"max_windows_per_client must be at least 1, got {max_windows_per_client}."
        )

    texts = _role_texts(path)
    if not texts:
        raise InputError(
            f"{os.fspath(path)}: no role has more than {WINDOW} characters to train on; expected "
            f"the complete works, {_SOURCE}."
        )

    counts = np.array(
        [
            _num_windows(len(train), len(test), stride, max_windows_per_client)
            for train, test in texts.values()
        ],
        np.int64,
    )
    parts = [part for pair in texts.values() for part in pair]
    windows = _cut_windows(parts, counts.ravel(), stride)
    return RoleWindows(
        inputs=windows[:, :-1],
        labels=windows[:, 1:],
        client=np.repeat(np.arange(len(texts), dtype=np.int32), counts.sum(axis=1)),
        is_test=np.repeat(np.tile([False, True], len(texts)), counts.ravel()),
        names=list(texts),
    )


def _role_texts(path: str | os.PathLike[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the codes of training and test text of every role that is long enough."""
    texts = {}
    for name, lines in read_roles(path).items():
        num_lines = len(lines)
        if num_lines <= 2:
            continue
        num_train = num_lines - max(1, num_lines // 5)
        train = encode_text(" ".join(lines[:num_train]))
        test = encode_text(" ".join(lines[num_train:]))
        if len(train) > WINDOW:
            texts[name] = train, test
    return texts


def _cut_windows(parts: list[np.ndarray], counts: np.ndarray, stride: int) -> np.ndarray:
    """Cuts the first windows of each part, as many as ``counts`` says, uint8 [num, 81]."""
    windows = np.empty((counts.sum(), WINDOW + 1), np.uint8)
    start = 0
    for codes, count in zip(parts, counts, strict=True):
        if count:
            view = np.lib.stride_tricks.sliding_window_view(codes, WINDOW + 1)
            windows[start : start + count] = view[::stride][:count]
            start += count
    return windows


def read_roles(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Reads the lines of every speaking role, short roles included.

    Lines are stripped, runs of spaces become one space, blank lines do not count, and what is
    outside the vocabulary is spelt in ASCII or left out. Role names are put in capitals, as the
    text has some of them in both forms. Poems, and "plays" with fewer than two roles, are left
    out.

    Args:
        path: as in `load_shakespeare`.

    Returns:
        The lines of each role under "PLAY_ROLE", in the order of the text.

    Raises:
        FileNotFoundError: where there is no such file.
        InputError: where the file holds no play.
    """
    path = Path(path)
    lines = [_to_vocabulary(line) for line in _read_text(path).splitlines()]
    plays = [
        (title, roles)
        for title, roles in _read_plays(lines, path)
        if len(roles) >= 2 and title.upper() not in _POEMS
    ]
    if not plays:
        raise InputError(
            f"{path}: no play found; expected titles followed by 'by William Shakespeare' and "
            f"speeches that start with two spaces and 'NAME. ', as in {_SOURCE}. (Later files of "
            "Project Gutenberg have another layout.)"
        )
    named: dict[str, list[str]] = {}
    for title, roles in plays:
        for role, said in roles.items():
            named.setdefault(re.sub(r"\W+", "_", f"{title}_{role}"), []).extend(said)
    return named


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}. Expected the complete works of Shakespeare as one text "
            f"file, {_SOURCE}; nothing is downloaded by itself."
        )
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _read_plays(lines: list[str], path: Path) -> list[tuple[str, dict[str, list[str]]]]:
    """Returns the title of every work and what its roles say, in the order of the text."""
    plays: list[tuple[str, dict[str, list[str]]]] = []
    role: str | None = None
    for number, line in enumerate(lines):
        if line.strip().lower().startswith("by william shakespeare"):
            plays.append((_title_above(lines, number, path), {}))
            role = None
            continue
        if not plays:
            continue
        if _END.match(line):
            break
        title, roles = plays[-1]
        read = _read_flush_line if title.upper() == _FLUSH_PLAY else _read_line
        role, spoken = read(line, role)
        if role is not None:
            # A role is listed from its first line on, be that line empty or not.
            said = roles.setdefault(role, [])
            spoken = re.sub(" {2,}", " ", spoken.strip())
            if spoken:
                said.append(spoken)
    return plays


def _read_line(line: str, role: str | None) -> tuple[str | None, str]:
    """Returns who speaks in a line, and what; ``role`` spoke in the line before."""
    speech = _SPEECH.match(line)
    if speech:
        return speech[1].upper(), speech[2]
    more = _MORE.match(line)
    return role, more[1] if more else ""


def _read_flush_line(line: str, role: str | None) -> tuple[str | None, str]:
    """Does what `_read_line` does, in the play without indentation."""
    speech = _SPEECH_FLUSH.match(line)
    if speech:
        name = speech[1].upper()
        return (None, "") if name.startswith("ACT ") else (name, speech[2])
    if line.startswith("<") or line.strip() == "THE END":
        return None, ""
    return role, line


def encode_text(text: str) -> np.ndarray:
    """Character codes of a text, uint8 [len(text)].

    Raises:
        InputError: for a character outside `CHARACTERS`.
    """
    raw = np.frombuffer(text.encode("ascii", errors="replace"), np.uint8)
    codes = _CODES[raw]
    if not text.isascii() or (codes == _NO_CODE).any():
        bad = sorted(set(text) - set(CHARACTERS))
        raise InputError(f"Characters outside the vocabulary: {bad}.")
    return codes


def decode_text(codes: np.ndarray) -> str:
    """The text of character codes, an integer array [length]; the inverse of `encode_text`."""
    return "".join(CHARACTERS[code] for code in np.asarray(codes).tolist())


def character_weights() -> np.ndarray:
    """Class weights of the cross-entropy in the released FedEM code, float32 [100].

    Frequent characters weigh less, all others 1; then all are multiplied by 8.
    """
    weights = np.ones(len(CHARACTERS), np.float32)
    for character, weight in _LOSS_WEIGHTS.items():
        weights[CHARACTERS.index(character)] = weight
    return weights * np.float32(8)


_NO_CODE = 255
_CODES = np.full(256, _NO_CODE, np.uint8)
_CODES[np.frombuffer(CHARACTERS.encode("ascii"), np.uint8)] = np.arange(len(CHARACTERS))


def _num_windows(
    train_length: int, test_length: int, stride: int, limit: int | None
) -> tuple[int, int]:
    """How many windows to keep of a role's training text and of its test text."""
    num_train, num_test = (
        max(0, -(-(length - WINDOW) // stride)) for length in (train_length, test_length)
    )
    if limit is not None and num_train + num_test > limit:
        num_test = min(num_test, limit // 5)
        num_train = min(num_train, limit - num_test)
    return num_train, num_test


def _title_above(lines: list[str], number: int, path: Path) -> str:
    """The nearest line with text above line `number`, which names the author."""
    for line in reversed(lines[max(0, number - _TITLE_REACH) : number]):
        if line.strip():
            return line.strip()
    raise InputError(
        f"{path}, line {number + 1}: expected the title of a play within {_TITLE_REACH} lines "
        f"above '{lines[number].strip()}'."
    )


def _to_vocabulary(line: str) -> str:
    """The line in printable ASCII: quotation marks and dashes replaced, accents taken off."""
    if not line.isascii():
        line = unicodedata.normalize("NFKD", line.translate(_PLAIN))
    return "".join(character for character in line if character in _VOCABULARY)


_VOCABULARY = frozenset(CHARACTERS)
