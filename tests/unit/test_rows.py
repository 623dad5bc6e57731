"""What rows mean: shapes told by columns or by flags, templates over columns, and rows that cannot be used."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from dstrain.arguments import DataArguments
from dstrain.data import build_data, build_tokenizer
from dstrain.data.columns import ColumnFlags
from dstrain.data.rows import BadRow, Chat
from dstrain.data.sources import FileSource, build_sources
from dstrain.data.templates import RowError, parse_template
from dstrain.errors import UserError
from tests.unit.test_data_sources import hub_folder, write, write_rows  # noqa: F401 - a fixture

PAIR = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
GPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
CHAT = Chat(tuple(PAIR))


def read(path, **flags):
    """Documents and bad rows of a file."""
    rows = FileSource([path], ColumnFlags(**flags), None, path.parent).documents()
    return [row if isinstance(row, BadRow) else row.document for row in rows]


SHAPES = {
    "text": ({"text": "a", "label": 1}, ("a",)),
    "prompt": ({"prompt": "2+2=", "completion": "4", "text": "no"}, ("2+2=", "4")),
    "messages": ({"id": 3, "messages": PAIR, "text": "no"}, CHAT),
    "sharegpt": ({"id": "x", "conversations": GPT}, CHAT),
    "conversational prompt": ({"prompt": PAIR[:1], "completion": PAIR[1:]}, Chat(tuple(PAIR), 1)),
    "alpaca": (
        {"instruction": "Add.", "input": "2, 2", "output": "4", "text": "no"},
        (
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n"
            "### Response:",
            "4",
        ),
    ),
    "alpaca without input": (
        {"instruction": "Sing.", "input": "", "output": "La"},
        (
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nSing.\n\n### Response:",
            "La",
        ),
    ),
}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_told_by_columns(tmp_path, name, suffix):
    row, document = SHAPES[name]
    assert read(write_rows(tmp_path / f"a.{suffix}", [row])) == [document]


def test_alpaca_rows_may_leave_the_input_out(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": "c", "output": "b"}]
    first, second = read(write_rows(tmp_path / "a.jsonl", rows))
    assert "### Input:" not in first[0]
    assert "### Input:\nc\n" in second[0]


def test_a_null_in_the_first_row_tells_no_other_shape(tmp_path):
    for rows, documents in [
        ([{"prompt": "a", "completion": None}, {"prompt": "a", "completion": "b"}], [("a", "b")]),
        (
            [{"prompt": None, "completion": PAIR[1:]}, {"prompt": PAIR[:1], "completion": PAIR[1:]}],
            [Chat(tuple(PAIR), 1)],
        ),
        ([{"text": None, "name": "x"}, {"text": "a", "name": "x"}], [("a",)]),
    ]:
        first, *rest = read(write_rows(tmp_path / "a.jsonl", rows))
        assert isinstance(first, BadRow)
        assert rest == documents


def test_other_names_of_roles_and_what_else_a_message_holds(tmp_path):
    messages = [
        {"from": "system", "value": "s"},
        {"role": "human", "content": "u", "name": "Ann", "tool_calls": None},
        {"from": "chatgpt", "value": "a", "reasoning_content": "hm"},
    ]
    (chat,) = read(write_rows(tmp_path / "a.jsonl", [{"conversations": messages}]))
    assert chat.messages == (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u", "name": "Ann"},
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
    )


def test_chats_as_json_in_a_cell(tmp_path):
    rows = [{"id": 1, "messages": json.dumps(PAIR)}, {"id": 2, "messages": "[{"}, {"id": 3, "messages": "hello"}]
    for suffix in ("csv", "parquet"):
        chat, *bad = read(write_rows(tmp_path / f"a.{suffix}", rows))
        assert chat == CHAT
        assert [row.kind for row in bad] == ["invalid JSON"] * 2
    assert read(tmp_path / "a.csv", text_column="messages")[2] == ("hello",)


REVIEWS = [{"text": "Good", "label": 1, "q": "x"}, {"text": "Bad", "label": 0, "q": "y"}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_templates_over_columns(tmp_path, suffix):
    path = write_rows(tmp_path / f"a.{suffix}", REVIEWS)
    flags = {
        "prompt_template": "{text}\\n\\nSentiment of {{{label}}}:",
        "completion_template": " {label:negative|positive}",
    }
    assert read(path, **flags) == [
        ("Good\n\nSentiment of {1}:", " positive"),
        ("Bad\n\nSentiment of {0}:", " negative"),
    ]
    assert read(path, prompt_column="q", completion_column="text") == [("x", "Good"), ("y", "Bad")]
    assert read(path, prompt_column="text", completion_template="{q}!") == [("Good", "x!"), ("Bad", "y!")]
    with pytest.raises(UserError, match=r"has no column labels: did you mean \{label\}\? \(its columns"):
        read(path, **flags | {"prompt_template": "{labels}"})


def test_columns_by_flag(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"q": PAIR[:1], "a": PAIR[1:], "turns": PAIR, "n": 1, "text": "t"}])
    assert read(path, messages_column="turns") == [CHAT]
    assert read(path, prompt_column="q", completion_column="a") == [Chat(tuple(PAIR), 1)]
    for flags, message in [
        (
            {"messages_column": "n"},
            "column n holds no text and no list of messages: name another with --messages_column",
        ),
        ({"messages_column": "turn"}, "has no column turn: did you mean turns"),
        (
            {"prompt_column": "n", "completion_column": "a"},
            "column n holds no text and no list .* with --prompt_column",
        ),
        ({"prompt_column": "text", "completion_column": "a"}, "are both texts, or both lists of messages"),
    ]:
        with pytest.raises(UserError, match=message):
            read(path, **flags)


def test_hub_datasets_have_shapes_too(hub_folder, tmp_path):  # noqa: F811
    for file in (hub_folder / "data").iterdir():
        file.unlink()
    write_rows(hub_folder / "data/train.parquet", [{"messages": PAIR, "label": 1}])
    (row,) = build_sources(DataArguments(dataset_name=str(hub_folder)), tmp_path)[0].documents()
    assert row.document == CHAT
    assert row.where.endswith("(train) row 1")
    flags = {"prompt_template": "{label}?", "completion_template": "{label:no|yes}"}
    source, _ = build_sources(DataArguments(dataset_name=str(hub_folder), **flags), tmp_path)
    assert [row.document for row in source.documents()] == [("1?", "yes")]
    other, _ = build_sources(
        DataArguments(dataset_name=str(hub_folder), **flags | {"prompt_template": "{label}"}), tmp_path
    )
    assert source.sha256 != other.sha256


def test_how_rows_are_read_is_part_of_the_hash(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", REVIEWS)
    ways = [
        {},
        {"text_column": "text"},
        {"prompt_column": "text", "completion_column": "q"},
        {"prompt_column": "q", "completion_column": "text"},
        {"prompt_column": "text", "completion_template": "{q}"},
        {"messages_column": "text"},
    ]
    hashes = {FileSource([path], ColumnFlags(**way), None, tmp_path).sha256 for way in ways}
    assert len(hashes) == len(ways)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no column", "names no column: write one in braces"),
        ("{a", "write a brace that is meant as text twice"),
        ("a}", "write a brace that is meant as text twice"),
        ("{}", r"only \{column\} and \{column:word\|word\} are known"),
        ("{a!r}", "only"),
        ("{a:{b}}", "only"),
    ],
)
def test_wrong_templates(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_template("--prompt_template", text)
    assert str(caught.value).startswith("--prompt_template")


def test_what_a_template_makes_of_cells():
    template = parse_template("", "{a}{b:no|yes}\\t\\\\n\\d")
    assert template.fill({"a": "x{b}", "b": "1"}) == "x{b}yes\t\\n\\d"
    assert template.fill({"a": None, "b": False}) == "no\t\\n\\d"
    for row in (
        {"a": 1.5, "b": 0},
        {"a": True, "b": 0},
        {"a": [], "b": 0},
        {"a": 1, "b": 2},
        {"a": 1, "b": -1},
        {"a": 1},
    ):
        with pytest.raises(RowError):
            template.fill(row)


GOOD = '{"text": "fine"}\n'
BAD_ROWS = [
    (
        "not UTF-8",
        "a.jsonl",
        GOOD.encode() + b'{"text": "\xe9"}\n' + GOOD.encode(),
        ":2",
        "is not UTF-8 (byte 11 is 0xe9)",
    ),
    ("not UTF-8", "a.csv", b'text,n\nfine,1\n"two\nl\xe9nes",2\nfine,3\n', ":4", "is not UTF-8 (byte 2 is 0xe9)"),
    ("not UTF-8", "a.txt", b"fine\n\xff", ":2", "is not UTF-8 (byte 0xff): a binary file"),
    ("empty file", "a.txt", b"", "", "is empty: leave it out or fill it"),
    ("invalid JSON", "a.jsonl", GOOD + '{"text": \n' + GOOD, ":2", "is not valid JSON (Expecting value at column"),
    ("wrong type", "a.jsonl", GOOD + "[1]\n" + GOOD, ":2", "is not an object"),
    ("wrong type", "a.jsonl", GOOD + '{"text": 3}\n' + GOOD, ":2", "column text holds a number, not a text"),
    (
        "wrong type",
        "a.json",
        '[{"text": "fine"}, {"text": ["b"]}, {"text": "fine"}]',
        " row 2",
        "column text holds a list",
    ),
    ("missing column", "a.jsonl", GOOD + '{"txt": "a"}\n' + GOOD, ":2", "has no column text (it has txt)"),
    ("half a surrogate pair", "a.jsonl", GOOD + '{"text": "\\ud800"}\n' + GOOD, ":2", "(\\ud800)"),
    ("wrong number of fields", "a.csv", "text,n\nfine,1\nb\nfine,2\n", ":3", "has 1 fields, the header 2"),
]


@pytest.mark.parametrize(
    ("kind", "name", "content", "place", "problem"), BAD_ROWS, ids=[f"{k}-{n}" for k, n, *_ in BAD_ROWS]
)
def test_bad_rows_are_refused_or_skipped(tmp_path, kind, name, content, place, problem):
    folder = tmp_path / "data"
    file, fine = write(folder / name, content), write(folder / "z.txt", "fine")
    with pytest.raises(UserError) as caught:
        build(tmp_path, train_file=[str(folder)])
    (line,) = caught.value.problems
    assert line.startswith(f"{file}{place}")
    assert problem in line
    assert "--bad_rows skip" in line
    data = build(tmp_path, train_file=[str(folder)], bad_rows="skip")
    assert data.facts["skipped_rows"] == {kind: {"rows": 1, "first": [f"{file}{place}"]}}
    assert data.facts["num_documents"] == (1 if name == "a.txt" else 3)
    assert data.notices == [f"rows of {file} and 1 more left out: {kind}: 1 ({file}{place})"]
    with pytest.raises(UserError):  # what was skipped before is not believed
        build(tmp_path, train_file=[str(folder)])
    assert fine.exists()


def build(tmp_path, block_size=64, **flags):
    return build_data(
        DataArguments(**flags),
        build_tokenizer("bytes", chat_template="{% for m in messages %}{{ m['content'] + '|' }}{% endfor %}"),
        seed=1,
        block_size=block_size,
        is_main_per_host=True,
        barrier=lambda: None,
        cache_dir=tmp_path / "cache",
    )


BROKEN_CHATS = {
    "wrong type": [{"messages": 3}, {"messages": ["hi"]}],
    "missing column": [{"other": PAIR}],
    "broken chat": [
        {"messages": []},
        {"messages": PAIR[:1]},
        {"messages": PAIR[::-1]},
        {"messages": [{"role": "robot", "content": "a"}, *PAIR]},
        {"messages": [{"content": "a"}, *PAIR]},
        {"messages": [PAIR[0], {"role": "assistant", "content": ["a"]}]},
        {"messages": [PAIR[0], {"role": "assistant", "content": None}]},
    ],
    "half a surrogate pair": [{"messages": [PAIR[0], {"role": "assistant", "content": "\ud800"}]}],
}


def test_broken_chats(tmp_path):
    broken = [row for rows in BROKEN_CHATS.values() for row in rows]
    file = write_rows(tmp_path / "a.jsonl", [{"messages": PAIR}, *broken, {"messages": PAIR}])
    data = build(tmp_path, train_file=[str(file)], bad_rows="skip")
    counted = {kind: found["rows"] for kind, found in data.facts["skipped_rows"].items()}
    assert counted == {kind: len(rows) for kind, rows in BROKEN_CHATS.items()}
    assert len(data.facts["skipped_rows"]["broken chat"]["first"]) == 5
    assert ", ...)" in data.notices[0]
    for row in broken:
        with pytest.raises(UserError, match=r"b\.jsonl:2.*--bad_rows skip"):
            build(tmp_path, train_file=[str(write_rows(tmp_path / "b.jsonl", [{"messages": PAIR}, row]))])


def test_empty_rows_are_no_damage(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"text": t} for t in ("fine", "", " \n", "fine")])
    data = build(tmp_path, train_file=[str(file)])
    assert data.facts["skipped_rows"] == {"empty": {"rows": 2, "first": [f"{file}:2", f"{file}:3"]}}
    assert data.facts["num_empty_documents"] == 2
    assert data.notices == []


def test_rows_longer_than_the_block(tmp_path):
    rows = [{"prompt": "x" * n, "completion": "y" * 20} for n in (10, 50, 10, 100)]
    flags = {
        "train_file": [str(write_rows(tmp_path / "a.jsonl", rows))],
        "validation_file": [str(tmp_path / "a.jsonl")],
    }
    cut = build(tmp_path, **flags)
    assert (cut.facts["num_cut_rows"], cut.facts["num_rows_without_loss"], len(cut.train)) == (1, 1, 3)
    skip = build(tmp_path, long_rows="skip", **flags)
    found = {"longer than the block": {"rows": 2, "first": [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/a.jsonl:4"]}}
    assert skip.facts["skipped_rows"] == skip.facts["skipped_validation_rows"] == found
    assert (skip.facts["num_cut_rows"], skip.facts["num_rows_without_loss"], len(skip.train)) == (0, 0, 2)
    assert skip.samples_sha256 != cut.samples_sha256
    for packing in (False, True):
        packed = build(tmp_path, packing=packing, **flags)
        assert (packed.facts["num_cut_rows"], packed.facts["num_rows_without_loss"]) == (1, 1)
        ends = build(tmp_path, packing=packing, long_rows="cut_start", **flags)
        assert (ends.facts["num_cut_rows"], ends.facts["num_rows_without_loss"]) == (2, 0)
        assert ends.num_label_tokens == 4 * 21  # every completion whole, and its end of text
        assert ends.samples_sha256 != packed.samples_sha256
    with pytest.raises(
        UserError, match=r"a block of 64 tokens: 2, the first at .*a\.jsonl:2 with 71: raise --block_size"
    ):
        build(tmp_path, long_rows="refuse", **flags)
    assert len(build(tmp_path, block_size=128, long_rows="refuse", **flags).train) == 4


def test_loss_on_prompts_too(tmp_path):
    flags = {"train_file": [str(write_rows(tmp_path / "a.jsonl", [{"prompt": "2+2=", "completion": "4"}] * 3))]}
    default, whole = build(tmp_path, **flags), build(tmp_path, train_on_prompts=True, **flags)
    assert [data.train[0]["labels"].tolist() for data in (default, whole)] == [
        [-100] * 4 + [*b"4", 256],
        [-100, *b"+2=4", 256],
    ]
    assert default.samples_sha256 != whole.samples_sha256
    assert default.sha256 == whole.sha256


def test_flags_that_would_be_ignored_are_refused(tmp_path):
    text = [str(write(tmp_path / "a.txt", "some text"))]
    for flags, message in [
        ({"train_file": text, "long_rows": "skip"}, "--long_rows is for rows of prompts or chats"),
        ({"train_file": text, "train_on_prompts": True}, "--train_on_prompts is for rows of prompts or chats"),
        ({"train_file": text, "messages_column": "a"}, "is plain text, which has no columns: --messages_column needs"),
        ({"messages_column": "a"}, "--messages_column is for data of your own: name them with --train_file"),
    ]:
        with pytest.raises(UserError, match=message):
            build(tmp_path, **flags)


def test_documents_of_one_chat_are_held_out_together(tmp_path):
    """A template that rewrites history makes several documents of a chat: they must not be on both sides."""
    template = "{% for m in messages %}{{ m['content'] }}{% if loop.last and m['role'] == 'assistant' %}!{% endif %}"
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, PAIR[1], {"role": "user", "content": "?"}, PAIR[1]]}
        for i in range(300)
    ]
    data = build_data(
        DataArguments(train_file=[str(write_rows(tmp_path / "a.jsonl", rows))]),
        build_tokenizer("bytes", chat_template=template + "{% endfor %}"),
        seed=1,
        block_size=64,
        is_main_per_host=True,
        barrier=lambda: None,
        cache_dir=tmp_path / "cache",
    )
    assert data.facts["num_documents"] == 600
    sides = [
        {bytes(s[i]["input_ids"].tolist()).split(b"?")[0] for i in range(len(s))} for s in (data.train, data.validation)
    ]
    assert len(sides[0]) + len(sides[1]) == 300
    assert sides[0].isdisjoint(sides[1])


def test_a_parquet_file_without_its_column_is_refused_whole(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="which column is the text"):
        build(tmp_path, train_file=[str(tmp_path / "a.parquet")], bad_rows="skip")
