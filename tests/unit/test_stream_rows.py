"""Streams of prompts and chats: the samples of memory-mapped data, with their masks, also from the middle on."""

import itertools
import json
from itertools import islice
from unittest import mock

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from dstrain.arguments import DataArguments
from dstrain.data import build_data, build_loader, build_tokenizer, stream_cuts, stream_rows
from dstrain.data.packing import IGNORE
from dstrain.data.rows import Chat
from dstrain.data.tokenization import TextEncoder
from dstrain.errors import UserError
from tests.unit.test_chats import CHATML, INST, QWEN3
from tests.unit.test_data_sources import hub_folder, write_rows  # noqa: F401 - a fixture
from tests.unit.test_stream import Lists, stream_of

BLOCK_SIZE = 280


def chat(number, turns):
    messages = [{"role": "user", "content": f"{number}+{i}?"} for i in range(turns)]
    answers = [
        {"role": "assistant", "content": "so </think>" * (i % 2) + f"{number + i}" * (number % 5 + 1)}
        for i in range(turns)
    ]
    return [message for pair in zip(messages, answers, strict=True) for message in pair]


PROMPTS = [{"prompt": "Count to " + "a " * (4 * i % 145), "completion": f" {i}" * (i % 3 + 1)} for i in range(40)]
ALPACA = [{"instruction": f"Say {i}.", "input": "twice" * (i % 2), "output": f"{i}"} for i in range(30)]
CHATS = [{"messages": chat(i, i % 5 + 1)} for i in range(30)]
GPT = [
    {
        "conversations": [
            {"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in row["messages"]
        ]
    }
    for row in CHATS
]
REVIEWS = [{"text": f"film {i} " * (i % 9 * 5), "label": i % 2} for i in range(30)]
TEMPLATES = {"prompt_template": "{text}\n\n:", "completion_template": " {label:negative|positive}"}
CASES = {
    "prompts": ("jsonl", PROMPTS, {}),
    "prompts cut at their start": ("csv.zst", PROMPTS, {"long_rows": "cut_start"}),
    "long prompts skipped": ("jsonl", PROMPTS, {"long_rows": "skip"}),
    "loss on prompts": ("json", PROMPTS, {"train_on_prompts": True}),
    "alpaca": ("parquet", ALPACA, {}),
    "templates": ("parquet", REVIEWS, TEMPLATES),
    "openai": ("parquet", CHATS, {"chat_template": CHATML}),
    "sharegpt": ("jsonl.gz", GPT, {"chat_template": CHATML}),
    "several documents a chat": ("jsonl", CHATS, {"chat_template": QWEN3}),
    "loss on all turns": ("jsonl", CHATS, {"chat_template": QWEN3, "train_on_prompts": True}),
    "text": ("jsonl", REVIEWS, {"text_column": "text"}),
}


def build(tmp_path, chat_template=None, tokenizer=None, **flags):
    return build_data(
        DataArguments(**flags),
        tokenizer or build_tokenizer("bytes", chat_template=chat_template),
        seed=42,
        block_size=BLOCK_SIZE,
        is_main_per_host=True,
        barrier=lambda: None,
        cache_dir=tmp_path / "cache",
    )


def as_lists(sample):
    return {name: values.tolist() for name, values in sample.items()}


def pieces_of(pack):
    """The rows of a packed sample."""
    starts = np.flatnonzero(pack["position_ids"] == 0)[1:]
    parts = [np.split(pack[name], starts) for name in ("input_ids", "labels")]
    return [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in zip(*parts, strict=True)]


@pytest.mark.parametrize("name", [name for name in CASES if name != "text"])
def test_rows_are_those_of_memory_mapped_data(tmp_path, name):
    suffix, rows, flags = CASES[name]
    files = [write_rows(tmp_path / f"{i}.{suffix}", part) for i, part in enumerate((rows[:20], rows[20:]))]
    flags |= {"train_file": [str(file) for file in files], "validation_file": [str(files[0])]}
    mapped = build(tmp_path, **flags).train
    stream = build(tmp_path, streaming=True, shuffle_buffer=7, **flags).train
    for index in range(len(mapped) + 5):
        assert as_lists(stream[index]) == as_lists(mapped[index % len(mapped)])
    stream.close()
    assert len({len(mapped[i]["input_ids"]) for i in range(len(mapped))}) > 1


@pytest.mark.parametrize("name", CASES)
def test_packs_hold_the_rows_of_some_blocks(tmp_path, name):
    suffix, rows, flags = CASES[name]
    file = str(write_rows(tmp_path / f"a.{suffix}", rows))
    flags |= {"train_file": [file], "validation_file": [file]}
    mapped = build(tmp_path, packing=True, **flags).train
    once = sorted(str(piece) for i in range(len(mapped)) for piece in pieces_of(mapped[i]))
    stream = build(tmp_path, packing=True, streaming=True, shuffle_buffer=1, **flags).train
    packs, starts = [], []  # those of the first samples that are packed together
    while len(starts) < 3:
        packs.append(pieces_of(stream[len(packs)]))
        if stream.state_at(len(packs) - 1)["sample"] == len(packs) - 1:
            starts.append(len(packs) - 1)
    stream.close()
    for first, last in itertools.pairwise(starts):
        found = [str(piece) for pack in packs[first:last] for piece in pack]
        passes = [found.count(piece) / once.count(piece) for piece in set(once)]
        assert len(found) == sum(found.count(piece) for piece in set(once))
        assert max(passes) - min(passes) <= 1  # the rows one after another, from the last group's end on
        sizes = [sum(len(piece["input_ids"]) for piece in pack) for pack in packs[first:last]]
        assert max(sizes) <= BLOCK_SIZE
        assert 64 * BLOCK_SIZE <= sum(sizes) < 65 * BLOCK_SIZE


@pytest.mark.parametrize("packing", [False, True])
def test_each_pass_is_told_once_also_behind_an_interruption(packing):
    source = Lists([("q" * (i % 9), "a" * (i % 5 + 1)) for i in range(30)])

    def passes(state, first):
        events = []
        stream = stream_of(source, 40, window=5, packing=packing)
        stream.load_state(state, lambda position, text: events.append((position, text.split()[-1])))
        state = [stream[i] and stream.state_at(i) for i in range(first, 90)][62 - first]
        stream.close()
        return events, state

    events, state = passes({}, 0)
    assert [number for _, number in events[:2]] == ["2", "3"]
    if not packing:
        assert [position for position, _ in events] == [30, 60]
    assert passes(state, 62)[0] == [event for event in events if event[0] > 60]


@pytest.mark.parametrize(("everything", "labelled"), [(False, "b$"), (True, "$ab$")])
def test_tokens_before_a_prompt_carry_loss_as_in_memory_mapped_data(tmp_path, everything, labelled):
    tokenizer = build_tokenizer("bytes")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> <|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    file = str(write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}]))
    flags = {"tokenizer": tokenizer, "train_file": [file], "validation_file": [file], "train_on_prompts": everything}
    mapped, stream = (build(tmp_path, **flags, streaming=streaming).train for streaming in (False, True))
    assert as_lists(stream[0]) == as_lists(mapped[0])
    stream.close()
    assert "".join({256: "$"}.get(i, chr(i)) for i in mapped[0]["labels"] if i != IGNORE) == labelled


chats = st.builds(
    lambda turns: Chat(
        tuple(m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a}))
    ),
    st.lists(st.tuples(st.text("ab ", max_size=5), st.text("cd ", max_size=9)), min_size=1, max_size=2),
)
prompts = st.tuples(st.text("ab ", max_size=40), st.text("cd ", max_size=9))
ENCODER = TextEncoder(build_tokenizer("bytes", chat_template=QWEN3))


@mock.patch.object(stream_cuts, "_PACKED_TOGETHER", 3)  # so that samples lie in several groups
@mock.patch.object(stream_rows, "_JOB_ROWS", 8)
@given(
    files=st.lists(st.lists(st.one_of(chats, prompts), min_size=1, max_size=6), min_size=1, max_size=3),
    window=st.integers(1, 5),
    block_size=st.integers(40, 200),
    packing=st.booleans(),
    long_rows=st.sampled_from(["cut", "cut_start", "skip"]),
    position=st.integers(0, 20),
)
@settings(max_examples=15, phases=[Phase.reuse, Phase.generate])  # to shrink takes minutes
def test_rows_resumed_anywhere_are_the_same(files, window, block_size, packing, long_rows, position):
    files[0].insert(0, Chat(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})))
    files[0].insert(0, ("a", "b"))
    flags = {"window": window, "encoder": ENCODER, "packing": packing, "long_rows": long_rows}
    whole = stream_of(Lists(*files), block_size, **flags)
    order = whole.order(1)
    rows = [as_lists(whole[order[i]]) for i in range(position + 1)]
    state = json.loads(json.dumps(whole.state_at(position)))
    assert state["sample"] <= position // window * window
    rows += [as_lists(whole[order[i]]) for i in range(position + 1, position + 10)]
    whole.close()
    for given_state in (state, {}):
        resumed = stream_of(Lists(*files), block_size, **flags)
        resumed.load_state(given_state, lambda *_: None)
        assert [as_lists(resumed[order[i]]) for i in range(position, position + 10)] == rows[position:]
        resumed.close()


@pytest.mark.parametrize("dp_size", [1, 2])
def test_ranks_divide_rows(dp_size):
    source = Lists([("q" * (i % 9), "a" * (i % 5 + 1)) for i in range(30)])
    stream = stream_of(source, 16, window=5)
    order = stream.order(1)
    expected = [stream[order[i]]["input_ids"].tolist() for i in range(24)]
    stream.close()
    found = {}
    for rank in range(dp_size):
        samples = stream_of(source, 16, window=5)
        options = {"micro_batch": 2, "dp_rank": rank, "dp_size": dp_size, "samples_consumed": 8}
        with build_loader(samples, seed=1, global_batch=4, **options) as loader:
            for step, batches in enumerate(islice(loader, 4)):
                for k, batch in enumerate(batches):
                    for row, ids in enumerate(batch["input_ids"]):
                        length = int(batch["attention_mask"][row].sum()) if "attention_mask" in batch else len(ids)
                        found[8 + 4 * step + 2 * (k * dp_size + rank) + row] = ids[:length].tolist()
    assert [found[i] for i in range(8, 24)] == expected[8:]


def test_a_hub_folder_of_chats_is_streamed(hub_folder, tmp_path):  # noqa: F811
    for split, rows in (
        ("train-00000-of-00002", CHATS[:5]),
        ("train-00001-of-00002", CHATS[5:9]),
        ("validation-00000-of-00001", CHATS[9:12]),
    ):
        write_rows(hub_folder / f"data/{split}.parquet", [{"n": 1, **row} for row in rows])
    flags = {"dataset_name": str(hub_folder), "chat_template": CHATML}
    mapped = build(tmp_path, **flags).train
    stream = build(tmp_path, streaming=True, shuffle_buffer=2, **flags).train
    assert len(mapped) == 9
    found = [as_lists(stream[i]) for i in range(20)]
    assert found == [as_lists(mapped[i % 9]) for i in range(20)]
    again = build(tmp_path, streaming=True, shuffle_buffer=2, **flags).train
    again.load_state(stream.state_at(14), lambda *_: None)
    assert again.state_at(14)["place"] == [1, 0, 5, 0]
    assert [as_lists(again[i]) for i in range(14, 20)] == found[14:]
    stream.close(), again.close()


def test_broken_and_long_rows_are_named_or_left_out(tmp_path, caplog):
    bad = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    long = [{"role": "user", "content": "a" * 300}, {"role": "assistant", "content": "c"}]
    file = write_rows(tmp_path / "a.jsonl", [*CHATS[:3], {"messages": bad}, {"messages": [{}]}, {"messages": long}])
    flags = {"chat_template": INST, "streaming": True, "shuffle_buffer": 1, "train_file": [str(file)]}

    def read(**more):
        stream = build(tmp_path, **flags, **more).train
        samples = [as_lists(stream[i]) for i in range(7)]
        stream.close()
        return samples

    with pytest.raises(UserError, match=r"a\.jsonl:4 is refused by the chat template \(roles must alternate"):
        read()
    with pytest.raises(UserError, match=r"a\.jsonl:6 has 32\d tokens, more than a block of 280: raise --block_size"):
        read(bad_rows="skip", long_rows="refuse")
    skipped = read(bad_rows="skip", long_rows="skip")
    assert skipped == read(bad_rows="skip")  # a long prompt leaves no label in its block
    assert skipped[3:6] == skipped[:3]
    assert f"left out: {file}:4 is refused by" in caplog.text
    assert f"left out: {file}:5: column messages, message 1: its role is None" in caplog.text
    assert f"left out: {file}:6 has 32" in caplog.text
    cut = read(bad_rows="skip", long_rows="cut_start")
    assert len(cut[3]["input_ids"]) == BLOCK_SIZE
    assert cut[3]["labels"].count(IGNORE) < BLOCK_SIZE


def test_rows_that_cannot_be_trained_on_are_refused_at_once(tmp_path):
    write_rows(tmp_path / "long.jsonl", [{"prompt": "a" * 300, "completion": "b"}])
    write_rows(tmp_path / "text.jsonl", [{"text": "plain"}])
    write_rows(tmp_path / "chats.jsonl", CHATS)
    (tmp_path / "mixed.jsonl").write_text(json.dumps(PROMPTS[0]))
    (tmp_path / "mixed.txt").write_text("a text")
    for files, flags, problem in (
        (["long.jsonl"], {}, "hold no token to predict"),
        (["long.jsonl"], {"packing": True}, "hold no token to predict"),
        (["long.jsonl"], {"long_rows": "refuse"}, r"long\.jsonl:1 has 302 tokens"),
        (["text.jsonl"], {"train_on_prompts": True}, "--train_on_prompts is for rows of prompts or chats"),
        (["text.jsonl"], {"long_rows": "skip"}, "--long_rows is for rows of prompts or chats"),
        (["chats.jsonl"], {}, "the tokenizer has no chat template"),
        (["mixed.jsonl", "mixed.txt"], {"packing": True}, "mixes plain text with prompt and completion"),
    ):
        with pytest.raises(UserError, match=problem):
            build(tmp_path, streaming=True, train_file=[str(tmp_path / file) for file in files], **flags)


def test_what_rows_mean_is_part_of_the_identity(tmp_path):
    file = str(write_rows(tmp_path / "a.jsonl", PROMPTS))
    flags = {"streaming": True, "train_file": [file]}
    changes = [{}, {"packing": True}, {"long_rows": "skip"}, {"train_on_prompts": True}, {"bad_rows": "skip"}]
    changes += [{"prompt_column": "completion", "completion_column": "prompt"}]
    assert len({build(tmp_path, **flags, **change).samples_sha256 for change in changes}) == len(changes)
