"""Shakespeare by speaking role: the parser, the windows and the loss weights."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
import pytest

from fedjax_mtl.data import shakespeare

# Public-domain lines in the layout of the 1994 file: a header, a poem, a play with indentation,
# The Comedy of Errors without, a poem and the end.
TEXT = """\
The Project Gutenberg Etext of The Complete Works of William Shakespeare
  NOBODY. This line is before the first play.

1609

THE SONNETS

by William Shakespeare


  From fairest creatures we desire increase,
  That thereby beauty's rose might never die,
  Alas. Too few lines to be a play.


1604

THE TRAGEDY OF HAMLET, PRINCE OF DENMARK


by William Shakespeare



Dramatis Personae

  Bernardo, an officer.


<<THIS ELECTRONIC VERSION OF THE COMPLETE WORKS IS WITHIN MARKS
    AND MAY HAVE INDENTED LINES BEFORE ANYBODY SPEAKS>>


ACT I. Scene I.
Elsinore. A platform before the Castle.

              Enter two Sentinels.

  Ber. Who's there?
  HAMLET. To be,  or not to be, that is the question,
    Whether 'tis nobler in the mind to suffer
    The slings   and arrows of outrageous fortune,

    Or to take arms against a sea of troubles,
                                   [Thunder.]
    And by opposing end them. To die, to sleep.
  GHOST. Adieu.
    Remember me.
  BER. I have seen nothing.
  QUEEN. O Hamlet, speak no more; thou turn'st mine eyes
    into my very soul, and there I see such black.
    No more.
  BER. 'Tis now struck twelve.
  HAMLET. No, by the rood, not so.
THE END


1593

THE COMEDY OF ERRORS

by William Shakespeare



ACT I. SCENE 1

AEGEON. Proceed, Solinus, to procure my fall,
And by the doom of death end woes and all.
A heavier task could not have been imposed
Than I to speak my griefs unspeakable;
Yet, that the world may witness that my end.
<<THIS ELECTRONIC VERSION
IS NOBODY'S SPEECH>>
ACT II. SCENE 1
Nor is this anybody's.
DUKE. Merchant of Syracuse, plead no more;
I am not partial to infringe our laws.
THE END


1609

A LOVER'S COMPLAINT

by William Shakespeare

  From off a hill. Whose concave womb
  A plaintful story. From a sist'ring vale

End of this Etext of The Complete Works of William Shakespeare
  HAMLET. Not spoken.
"""

HAMLET = "THE_TRAGEDY_OF_HAMLET_PRINCE_OF_DENMARK_HAMLET"
QUEEN = "THE_TRAGEDY_OF_HAMLET_PRINCE_OF_DENMARK_QUEEN"
AEGEON = "THE_COMEDY_OF_ERRORS_AEGEON"
HAMLET_LINES = [
    "To be, or not to be, that is the question,",
    "Whether 'tis nobler in the mind to suffer",
    "The slings and arrows of outrageous fortune,",
    "Or to take arms against a sea of troubles,",
    "[Thunder.]",
    "And by opposing end them. To die, to sleep.",
    "No, by the rood, not so.",
]
AEGEON_LINES = [
    "Proceed, Solinus, to procure my fall,",
    "And by the doom of death end woes and all.",
    "A heavier task could not have been imposed",
    "Than I to speak my griefs unspeakable;",
    "Yet, that the world may witness that my end.",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "100.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def one_role(tmp_path: Path, lines: list[str]) -> Path:
    """A play in which the role ONE speaks `lines`, and OTHER one word."""
    speech = "\n    ".join(lines)
    path = tmp_path / "one.txt"
    path.write_text(f"A PLAY\n\nby William Shakespeare\n\n  ONE. {speech}\n  OTHER. Ay.\n")
    return path


def test_roles_and_their_lines(path):
    roles = shakespeare.read_roles(path)
    prefix = "THE_TRAGEDY_OF_HAMLET_PRINCE_OF_DENMARK_"
    assert list(roles) == [
        *(prefix + role for role in ("BER", "HAMLET", "GHOST", "QUEEN")),
        AEGEON,
        "THE_COMEDY_OF_ERRORS_DUKE",
    ]
    assert roles[HAMLET] == HAMLET_LINES
    assert roles[prefix + "BER"] == [
        "Who's there?",
        "I have seen nothing.",
        "'Tis now struck twelve.",
    ]
    assert roles[AEGEON] == AEGEON_LINES
    assert roles["THE_COMEDY_OF_ERRORS_DUKE"][0] == "Merchant of Syracuse, plead no more;"


def test_windows_are_the_shifted_text_of_each_part(path):
    windows = shakespeare.load_shakespeare(path)
    # BER and DUKE are too short, GHOST has too few lines.
    assert windows.names == [HAMLET, QUEEN, AEGEON]
    assert windows.inputs.dtype == windows.labels.dtype == np.uint8
    assert windows.client.dtype == np.int32 and windows.is_test.dtype == np.bool_
    assert windows.inputs.shape == windows.labels.shape == (len(windows.client), 80)

    train_text = " ".join(HAMLET_LINES[:6])
    mine = windows.client == 0
    train = windows.inputs[mine & ~windows.is_test]
    labels = windows.labels[mine & ~windows.is_test]
    assert len(train) == len(train_text) - 80
    for start in range(len(train)):
        assert shakespeare.decode_text(train[start]) == train_text[start : start + 80]
        assert shakespeare.decode_text(labels[start]) == train_text[start + 1 : start + 81]
    # Its one test line is shorter than a window.
    assert not (mine & windows.is_test).any()
    assert "  " not in train_text


def test_windows_share_one_array(path):
    windows = shakespeare.load_shakespeare(path)
    assert windows.inputs.base is windows.labels.base
    assert windows.inputs.base.shape == (len(windows.client), 81)


@pytest.mark.parametrize(("num_lines", "num_test"), [(3, 1), (9, 1), (10, 2), (14, 2), (15, 3)])
def test_last_fifth_of_the_lines_is_for_testing(num_lines, num_test, tmp_path):
    letters = string.ascii_letters[:num_lines]
    lines = [letter * 100 for letter in letters]
    windows = shakespeare.load_shakespeare(one_role(tmp_path, lines))
    assert windows.names == ["A_PLAY_ONE"]
    seen = {
        is_test: set(shakespeare.decode_text(windows.inputs[windows.is_test == is_test].ravel()))
        for is_test in (False, True)
    }
    assert seen[False] == set(letters[:-num_test]) | {" "}
    assert seen[True] == set(letters[-num_test:]) | ({" "} if num_test > 1 else set())
    assert windows.is_test.sum() == num_test * 101 - 1 - 80
    assert not windows.is_test[: len(windows.is_test) - windows.is_test.sum()].any()


def test_stride_and_limit(path, tmp_path):
    path = one_role(tmp_path, [letter * 100 for letter in "abcdefghij"])
    every = shakespeare.load_shakespeare(path)
    num_train, num_test = 8 * 101 - 1 - 80, 2 * 101 - 1 - 80
    assert len(every.client) == num_train + num_test

    for stride in (3, 7, 1000):
        some = shakespeare.load_shakespeare(path, stride=stride)
        for is_test in (False, True):
            np.testing.assert_array_equal(
                some.inputs[some.is_test == is_test],
                every.inputs[every.is_test == is_test][::stride],
            )

    limited = shakespeare.load_shakespeare(path, max_windows_per_client=11)
    assert len(limited.client) == 11 and limited.is_test.sum() == 2
    np.testing.assert_array_equal(limited.inputs[:9], every.inputs[:9])
    np.testing.assert_array_equal(limited.labels[9:], every.labels[num_train : num_train + 2])
    single = shakespeare.load_shakespeare(path, max_windows_per_client=1)
    assert single.is_test.tolist() == [False]
    assert len(shakespeare.load_shakespeare(path, 1, 10**6).client) == num_train + num_test

    for arguments in ({"stride": 0}, {"max_windows_per_client": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            shakespeare.load_shakespeare(path, **arguments)


def test_training_text_of_80_characters_has_no_sample(tmp_path):
    for first, num in ((39, 0), (40, 1)):
        path = one_role(tmp_path, ["a" * first, "b" * 40, "c" * 200])
        if num:
            windows = shakespeare.load_shakespeare(path)
            assert (~windows.is_test).sum() == num and windows.is_test.sum() == 120
        else:
            with pytest.raises(ValueError, match="no role has more than 80 characters"):
                shakespeare.load_shakespeare(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_line_ends_and_encodings(encoding, path, tmp_path):
    plain = shakespeare.read_roles(path)
    other = tmp_path / "other.txt"
    text = TEXT.replace("'tis", "\u2019tis").replace("GHOST. Adieu", "GHOST. Adi\u00e9u")
    if encoding == "cp1252":  # read as Latin-1, in which the quotation mark is a control code
        plain[HAMLET] = [line.replace("'tis", "tis") for line in plain[HAMLET]]
    plain["THE_TRAGEDY_OF_HAMLET_PRINCE_OF_DENMARK_GHOST"][0] = "Adieu."
    other.write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert shakespeare.read_roles(other) == plain


def test_errors_name_the_file_and_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.txt.*1994-01-100\.zip"):
        shakespeare.load_shakespeare(tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError):
        shakespeare.load_shakespeare(tmp_path)

    path = tmp_path / "text.txt"
    # The layout of later files: names on their own lines, no indentation.
    for text in ("", "THE TEMPEST\n\nby William Shakespeare\n\nMASTER.\nBoatswain!\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"text\.txt: no play found.*by William Shakespeare"):
            shakespeare.load_shakespeare(path)

    path.write_text("\n\nby William Shakespeare\n")
    with pytest.raises(ValueError, match=r"text\.txt, line 3: expected the title"):
        shakespeare.load_shakespeare(path)

    path.write_text("A PLAY\n\nby William Shakespeare\n\n  ONE. Ay.\n  TWO. No.\n")
    with pytest.raises(ValueError, match=r"text\.txt: no role has more than 80 characters"):
        shakespeare.load_shakespeare(path)


def test_codes_follow_string_printable():
    codes = shakespeare.encode_text(string.printable)
    np.testing.assert_array_equal(codes, np.arange(100))
    assert codes.dtype == np.uint8
    assert shakespeare.decode_text(codes) == string.printable
    assert shakespeare.encode_text("").shape == (0,)
    for text in ("caf\u00e9", "a\x00b"):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            shakespeare.encode_text(text)


def test_character_weights():
    weights = shakespeare.character_weights()
    assert weights.shape == (100,) and weights.dtype == np.float32
    assert (weights < 8).sum() == 23
    for character, weight in (("\n", 0.437953), (" ", 0.042501), ("I", 0.977749), ("y", 0.63883)):
        assert weights[string.printable.index(character)] == pytest.approx(8 * weight)
    for character in ("0", "A", "k", "Y", "?"):
        assert weights[string.printable.index(character)] == 8
