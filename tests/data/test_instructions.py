"""Instruction data: the readers, tokenizers, prompts, masks and the partition."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_mtl.data import instructions as data
from fedjax_mtl.tasks.language import IGNORED

BYTES = data.ByteTokenizer()
SETTINGS = settings(deadline=None, max_examples=60)
RECORD = {"instruction": "Name it.", "context": "", "response": "Rome", "category": "open_qa"}
TEXT = st.text(max_size=20)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# --- Dolly


def test_dolly(tmp_path):
    odd = {**RECORD, "context": "a\u2028b \u00e9", "category": "closed_qa", "more": 1}
    path = tmp_path / "dolly.jsonl"
    lines = [json.dumps(RECORD), "", json.dumps(odd, ensure_ascii=False)]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert data.load_dolly(path) == [
        data.Instruction("Name it.", "", "Rome", "open_qa"),
        data.Instruction("Name it.", "a\u2028b \u00e9", "Rome", "closed_qa"),
    ]


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ('{"instruction": ', r"d\.jsonl, line 2: not valid JSON .*expected the file databricks"),
        ("[1]", r"d\.jsonl, line 2: no JSON object"),
        (
            json.dumps({**RECORD, "response": " \n"}),
            r"d\.jsonl, line 2: the response is empty; remove",
        ),
        (
            json.dumps({**RECORD, "context": None}),
            r"d\.jsonl, line 2: field 'context' is missing or no text",
        ),
        (
            json.dumps({k: v for k, v in RECORD.items() if k != "category"}),
            "line 2: field 'category'",
        ),
    ],
)
def test_dolly_refuses(second_line, message, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + second_line + "\n")
    with pytest.raises(ValueError, match=message):
        data.load_dolly(path)


def test_dolly_missing_empty_or_binary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl.*nothing is downloaded"):
        data.load_dolly(tmp_path / "missing.jsonl")
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no instruction"):
        data.load_dolly(path)
    path.write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(ValueError, match=r"empty\.jsonl, line 1: not valid JSON"):
        data.load_dolly(path)


# --- Natural Instructions


def write_task(directory, name, count, long=0, blank=0):
    """Writes a task with instances of three kinds.

    There are ``count`` proper ones, ``long`` ones whose input has 1024 characters, and ``blank``
    ones without answer.
    """
    inputs = (
        [f"{name} {number}" for number in range(count)] + ["x" * 1024] * long + ["blank"] * blank
    )
    outputs = [["yes", "no"]] * (count + long) + [[" "]] * blank
    instances = [
        {"id": f"{name}-{i}", "input": given, "output": output}
        for i, (given, output) in enumerate(zip(inputs, outputs, strict=True))
    ]
    task = {"Definition": [f"Do {name}.", "Or so."], "Instances": instances, "Source": ["x"]}
    (directory / f"{name}.json").write_text(json.dumps(task))


@pytest.fixture
def tasks_directory(tmp_path):
    for name, sizes in {"a": (30, 5, 3), "b": (19, 40, 9), "c": (20,), "d": (100,)}.items():
        write_task(tmp_path, name, *sizes)
    return tmp_path


def test_natural_instructions(tasks_directory):
    found = data.load_natural_instructions(tasks_directory, num_tasks=3)
    # b has too few instances that are short enough and answered.
    assert [item.category for item in found] == ["a"] * 6 + ["c"] * 4 + ["d"] * 20
    assert len(set(found)) == len(found)
    for item in found:
        assert item.instruction == f"Do {item.category}." and item.response == "yes"
        assert item.context.startswith(item.category)
    assert data.load_natural_instructions(tasks_directory, num_tasks=3) == found
    assert data.load_natural_instructions(tasks_directory, num_tasks=3, seed=1) != found
    whole = data.load_natural_instructions(tasks_directory, num_tasks=1, share=1.0)
    assert [item.context for item in whole] == [f"a {number}" for number in range(30)]
    tiny = data.load_natural_instructions(tasks_directory, num_tasks=1, share=0.01)
    assert len(tiny) == 2


def test_natural_instructions_walks_the_given_list(tasks_directory):
    found = data.load_natural_instructions(tasks_directory, ["d", "b.json", "c"], num_tasks=2)
    assert list(dict.fromkeys(item.category for item in found)) == ["d", "c"]
    some = data.load_natural_instructions(tasks_directory, ["b"], num_tasks=1, fewest_instances=19)
    assert {item.category for item in some} == {"b"}
    longer = data.load_natural_instructions(
        tasks_directory, ["b"], num_tasks=1, share=1.0, longest_input=1024
    )
    assert len(longer) == 59


def test_natural_instructions_refuses(tasks_directory):
    load = data.load_natural_instructions
    with pytest.raises(
        ValueError, match="only 3 tasks have at least 20 .* num_tasks is 80; lower num_tasks"
    ):
        load(tasks_directory)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere.*natural-instructions"):
        load(tasks_directory / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no file .*zzz\.json"):
        load(tasks_directory, ["zzz"])
    for arguments in ({"share": 0.0}, {"num_tasks": 0}, {"fewest_instances": 1}):
        with pytest.raises(ValueError, match="give"):
            load(tasks_directory, **arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"t\.json: not valid JSON"),
        ('{"Instances": []}', r"t\.json: field 'Definition' is missing or no list of texts"),
        ('{"Definition": "text", "Instances": []}', "field 'Definition'"),
        ('{"Definition": ["d"]}', r"t\.json: field 'Instances' is missing"),
        ('{"Definition": ["d"], "Instances": [3]}', r"t\.json, instance 0: no object"),
        ('{"Definition": ["d"], "Instances": [{"output": ["o"]}]}', "instance 0: field 'input'"),
        ('{"Definition": ["d"], "Instances": [{"input": "i", "output": []}]}', "field 'output'"),
    ],
)
def test_natural_instructions_names_the_bad_field(content, message, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        data.load_natural_instructions(tmp_path)


# --- Tokenizers


@SETTINGS
@given(TEXT)
def test_bytes_round_trip(text):
    tokens = BYTES.encode(text)
    assert BYTES.decode(tokens) == text and all(0 <= token < 256 for token in tokens)
    noise = [BYTES.padding_token, *tokens, BYTES.end_token, 65, IGNORED]
    assert BYTES.decode(np.array(noise)) == text


def test_odd_texts_have_bytes_too():
    assert BYTES.encode("\ud800") == [ord("?")]
    assert BYTES.decode([0xC3]) == "\ufffd"
    assert BYTES.vocabulary == 258


def save_tokenizer(directory, end="</s>", start=False, padding=False):
    """A tokenizer of words with gaps in its numbers, which would cut texts after 2 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<unk>": 0, end: 1, "<s>": 2, "one": 3, "two": 4, "three": 9}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([end, "<s>"])
    tokenizer.enable_truncation(2)
    if start:
        special = [("<s>", 2), (end, 1)]
        tokenizer.post_processor = processors.TemplateProcessing(
            f"<s> $A {end}", special_tokens=special
        )
    if padding:
        tokenizer.enable_padding(pad_id=0, pad_token="<unk>", length=5)
    tokenizer.save(str(directory / "tokenizer.json"))


def test_tokenizer_of_a_file(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = data.load_tokenizer(tmp_path)
    assert tokenizer.encode("one two three one") == [3, 4, 9, 3]
    assert tokenizer.decode([3, 2, 9, 1, 4]) == "one three"
    assert tokenizer.decode(np.array([4, -1, -1], np.int32)) == "two"
    assert (tokenizer.vocabulary, tokenizer.end_token, tokenizer.padding_token) == (10, 1, 1)
    assert tokenizer.start_tokens == []


def test_start_and_padding_of_a_file(tmp_path):
    save_tokenizer(tmp_path, start=True, padding=True)
    tokenizer = data.load_tokenizer(tmp_path)
    assert tokenizer.start_tokens == [2] and tokenizer.padding_token == 0
    assert tokenizer.encode("one two three") == [3, 4, 9]
    item = data.Instruction("one", "", "two three", "c")
    examples = data.encode_examples([item], tokenizer, 5, "short")
    assert examples["inputs"].tolist() == [[2, 3, 4, 9, 0]]
    assert examples["labels"].tolist() == [[-1, 4, 9, 1, -1]]


@pytest.mark.parametrize("content", ["<stop>", {"content": "<stop>", "lstrip": False}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_end_token_of_the_settings(name, content, tmp_path):
    save_tokenizer(tmp_path, "<stop>")
    with pytest.raises(ValueError, match=r"no end token; none of .*as end_token"):
        data.load_tokenizer(tmp_path)
    assert data.load_tokenizer(tmp_path, "<stop>").end_token == 1
    (tmp_path / name).write_text(json.dumps({"eos_token": content}))
    assert data.load_tokenizer(tmp_path).end_token == 1
    (tmp_path / name).write_text(json.dumps({"eos_token": "<halt>"}))
    with pytest.raises(ValueError, match="the vocabulary has no '<halt>'"):
        data.load_tokenizer(tmp_path)


def test_tokenizer_missing_or_broken(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no file .*tokenizer\.json.*nothing is downloaded"
    ):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: no tokenizer"):
        data.load_tokenizer(tmp_path)


# --- Prompts and tokens


def test_prompts():
    prompt = data.format_prompt("Add.", "1 2")
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n" in prompt
    assert prompt.endswith("### Response:\n")
    assert "### Input:" not in data.format_prompt("Add.")
    assert data.format_prompt("add", "1", "short") == "add: 1\n"
    assert data.format_prompt("add", template="short") == "add\n"
    with pytest.raises(ValueError, match="unknown template 'long'; expected one of"):
        data.format_prompt("a", template="long")


INSTRUCTIONS = st.builds(
    data.Instruction, st.text(max_size=5), TEXT, st.text(min_size=1, max_size=8), st.just("c")
)


@SETTINGS
@given(st.lists(INSTRUCTIONS, min_size=1, max_size=3), st.sampled_from(data.TEMPLATES))
def test_masks(items, template):
    length = 320
    examples = data.encode_examples(items, BYTES, length, template)
    prompts, lengths = data.encode_prompts(items, BYTES, length, template)
    assert (
        examples["inputs"].shape
        == examples["labels"].shape
        == prompts.shape
        == (len(items), length)
    )
    assert (
        examples["inputs"].dtype
        == examples["labels"].dtype
        == prompts.dtype
        == lengths.dtype
        == np.int32
    )
    for item, inputs, labels, prompt, size in zip(
        items, examples["inputs"], examples["labels"], prompts, lengths, strict=True
    ):
        assert BYTES.decode(prompt[:size]) == data.format_prompt(
            item.instruction, item.context, template
        )
        assert (prompt[size:] == BYTES.padding_token).all()
        counted = labels != IGNORED
        # What counts is the answer and its end, in one piece right after the prompt.
        answer = [*BYTES.encode(item.response), BYTES.end_token]
        assert labels[counted].tolist() == answer
        assert np.nonzero(counted)[0].tolist() == list(range(size - 1, size - 1 + len(answer)))
        np.testing.assert_array_equal(inputs[:size], prompt[:size])
        follows = counted[:-1] & counted[1:]
        np.testing.assert_array_equal(labels[:-1][follows], inputs[1:][follows])
        assert (inputs[size + len(answer) - 1 :] == BYTES.padding_token).all()


@SETTINGS
@given(INSTRUCTIONS, st.integers(2, 40))
def test_long_prompts_lose_the_beginning_of_their_context(item, room):
    bare = len(BYTES.encode(data.format_prompt(item.instruction, template="short")))
    fits = data.keep_fitting([item], BYTES, room, "short") == [item]
    assert fits == (bare <= room)
    if not fits:
        with pytest.raises(ValueError, match="example 0: its prompt takes"):
            data.encode_prompts([item], BYTES, room, "short")
        with pytest.raises(ValueError, match="example 0: .*keep_fitting"):
            data.encode_examples([item], BYTES, room, "short")
        return
    prompts, lengths = data.encode_prompts([item], BYTES, room, "short")
    text = BYTES.decode(prompts[0, : lengths[0]])
    shortened = [
        data.format_prompt(item.instruction, item.context[cut:], "short") for cut in range(21)
    ]
    assert text == next(prompt for prompt in shortened if len(BYTES.encode(prompt)) <= room)
    # An answer that does not fit beside the bare prompt loses its end, but never its beginning.
    examples = data.encode_examples([item], BYTES, room, "short")
    answer = [*BYTES.encode(item.response), BYTES.end_token]
    counted = examples["labels"][examples["labels"] != IGNORED]
    assert counted.tolist() == answer[: room + 1 - bare]
    # The context keeps all that fits beside the answer, whose last token is only predicted.
    fitting = [
        prompt for prompt in shortened if len(BYTES.encode(prompt)) + len(answer) <= room + 1
    ]
    start = BYTES.encode(fitting[0] if fitting else shortened[-1])
    assert examples["inputs"][0, : len(start)].tolist() == start


# --- Clients


def make_instructions(sizes):
    rng = np.random.default_rng(0)
    names = rng.permutation(np.repeat(list(sizes), list(sizes.values())))
    return [data.Instruction("i", "", str(n), str(name)) for n, name in enumerate(names)]


def test_categories_are_dealt_evenly():
    items = make_instructions({"a": 23, "b": 10, "c": 50})
    clients = data.deal_categories(items, 5, seed=3)
    order = list(dict.fromkeys(item.category for item in items))
    assert clients.categories == [name for name in order for _ in range(5)]
    rows = np.concatenate(clients.train + clients.test)
    assert sorted(rows.tolist()) == list(range(83))
    for train, test, category in zip(*clients, strict=True):
        assert {items[row].category for row in [*train, *test]} == {category}
        size = len(train) + len(test)
        assert size in {"a": (4, 5), "b": (2,), "c": (10,)}[category]
        assert len(test) == max(round(0.2 * size), 1)
    again, other = data.deal_categories(items, 5, seed=3), data.deal_categories(items, 5, seed=4)
    assert all(map(np.array_equal, again.train, clients.train))
    assert not all(map(np.array_equal, other.train, clients.train))


def test_one_task_a_client_and_the_federation():
    items = make_instructions({"t1": 20, "t2": 10})
    clients = data.deal_categories(items, clients_per_category=1)
    assert sorted(clients.categories) == ["t1", "t2"]
    examples = data.encode_examples(items, BYTES, 16, "short")
    splits = data.federate(examples, clients)
    assert sorted(splits.train.sizes.tolist()) == [8, 16] and sorted(
        splits.test.sizes.tolist()
    ) == [2, 4]
    assert splits.test.examples["labels"] is splits.train.examples["labels"]
    np.testing.assert_array_equal(splits.test.indices[0][: len(clients.test[0])], clients.test[0])


def test_deal_refuses():
    items = make_instructions({"a": 30, "b": 19})
    with pytest.raises(ValueError, match="category 'b' has 19 instructions for 10 clients"):
        data.deal_categories(items)
    with pytest.raises(ValueError, match="at least 1 client"):
        data.deal_categories(items, 0)
    with pytest.raises(ValueError, match="test_share 1.0"):
        data.deal_categories(items, 2, test_share=1.0)
