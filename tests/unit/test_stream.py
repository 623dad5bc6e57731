"""Streams: the blocks of memory-mapped data, read on the way; interrupted anywhere, the very same tokens."""

import json
import threading
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.arguments import DataArguments
from dstrain.data import build_data, build_loader, build_tokenizer
from dstrain.data.columns import ColumnFlags
from dstrain.data.packing import BlockSamples
from dstrain.data.rows import check_document
from dstrain.data.segments import RowRules
from dstrain.data.sources import FileSource
from dstrain.data.store import TokenStore, find_or_write_store
from dstrain.data.stream import StreamSamples, WindowOrder
from dstrain.data.stream_source import name_files
from dstrain.data.tokenization import TextEncoder
from dstrain.errors import UserError
from dstrain.run import Run
from dstrain.run_folder import RunFolder
from tests.unit.test_data_sources import write_rows

ENCODER = TextEncoder(build_tokenizer("bytes"))


class Lists:
    """A stream source of lists of documents, or texts; notes which are read."""

    description = "lists"

    def __init__(self, *files):
        self.files, self.was_read = files, []
        self.identity = {}

    def __len__(self):
        return len(self.files)

    def read(self, file, first):
        for row, document in enumerate(self.files[file][first:], first):
            self.was_read.append((file, row))
            yield check_document(f"{file}:{row}", (document,) if isinstance(document, str) else document)


class Counting(TextEncoder):
    """Notes every text that is tokenized."""

    def __init__(self):
        super().__init__(build_tokenizer("bytes"))
        self.texts = []

    def encode(self, texts):
        self.texts += texts
        return super().encode(texts)


def stream_of(source, block_size=4, window=3, encoder=ENCODER, **flags):
    return StreamSamples(source, encoder, DataArguments(streaming=True, shuffle_buffer=window, **flags), block_size)


def read(stream, first, count, seed=1):
    order = stream.order(seed)
    rows = [stream[order[position]]["input_ids"].tolist() for position in range(first, first + count)]
    stream.close()
    return rows


def tokens_of(*texts):
    return [token for text in texts for token in (*text.encode(), 256)]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "jsonl.gz", "csv.zst", "parquet"])
def test_blocks_are_those_of_memory_mapped_data(tmp_path, suffix):
    rows = [{"text": f"Story {i}: " + 'and then, "one" day\n' * (i % 7)} for i in range(60)]
    files = [write_rows(tmp_path / f"a.{suffix}", rows[:40]), write_rows(tmp_path / f"b.{suffix}", rows[40:])]
    data = build(tmp_path, train_file=[str(file) for file in files])
    source = FileSource(files, ColumnFlags(), None, tmp_path)
    store = TokenStore.open(find_or_write_store(tmp_path, source, ENCODER, RowRules()))
    blocks = BlockSamples(store, np.arange(60), 32)
    assert len(blocks) > 30
    read_on_the_way = {index: data.train[index] for index in range(len(blocks))}
    data.train.close()
    for index, sample in read_on_the_way.items():
        assert sample["input_ids"].tolist() == blocks[index]["input_ids"].tolist()
        assert sample["labels"].tolist() == sample["input_ids"].tolist()


def test_a_hub_folder_is_streamed(tmp_path):
    for name, texts in (("train-0", ["one", "", "two"]), ("train-1", ["three " * 20]), ("validation-0", ["held out"])):
        write_rows(tmp_path / "hub" / "data" / f"{name}.parquet", [{"id": "7", "text": text} for text in texts])
    data = build(tmp_path, dataset_name=str(tmp_path / "hub"), text_column="text", shuffle_buffer=2)
    expected = tokens_of("one", "two", "three " * 20) * 2
    rows = [data.train[index]["input_ids"] for index in range(len(expected) // 32)]
    assert np.concatenate(rows).tolist() == expected[: len(rows) * 32]
    assert sorted(data.files) == ["train-0.parquet", "train-1.parquet"]
    state = data.train.state_at(5)
    assert state["sample"] == 4
    again = build(tmp_path, dataset_name=str(tmp_path / "hub"), text_column="text", shuffle_buffer=2)
    again.train.load_state(state, lambda *_: None)
    assert again.train[5]["input_ids"].tolist() == data.train[5]["input_ids"].tolist()
    for stream in (data.train, again.train):
        stream.close()


def test_behind_the_end_comes_the_beginning_without_a_gap():
    events = []
    stream = stream_of(Lists(["abc", " \n", "defgh"], ["", "ij"]), window=2)
    stream.load_state({}, lambda position, text: events.append((position, text)))
    once = tokens_of("abc", "defgh", "ij")
    rows = [stream[index]["input_ids"] for index in range(12)]
    assert np.concatenate(rows).tolist() == (once * 5)[:48]
    assert [position for position, _ in events] == [4, 7, 10]  # the first block that begins in pass 2, 3, 4
    assert "pass 2" in events[0][1]
    stream.close()
    few = stream_of(Lists(["abc"], ["defgh", "ij"]), window=1, max_train_samples=2)
    assert np.concatenate(read(few, 0, 5)).tolist() == (tokens_of("abc", "defgh") * 2)[:20]


documents = st.lists(st.lists(st.text("ab \n", max_size=9), min_size=1, max_size=6), min_size=1, max_size=3)


@given(documents.filter(lambda files: any(t.strip() for f in files for t in f)), st.integers(1, 5), st.data())
@settings(max_examples=15)
def test_a_stream_resumed_anywhere_gives_the_same_tokens(files, window, data):
    block_size = data.draw(st.integers(2, 7))
    whole = stream_of(Lists(*files), block_size, window)
    order, position = whole.order(1), data.draw(st.integers(0, 20))
    rows = [whole[order[i]]["input_ids"].tolist() for i in range(position + 1)]
    state = json.loads(json.dumps(whole.state_at(position)))
    assert state["sample"] == position // window * window
    rows += [whole[order[i]]["input_ids"].tolist() for i in range(position + 1, position + 10)]
    whole.close()
    resumed = stream_of(Lists(*files), block_size, window)
    resumed.load_state(state, lambda *_: None)
    assert read(resumed, position, 10) == rows[position:]
    without_mark = stream_of(Lists(*files), block_size, window)
    assert read(without_mark, position, 10) == rows[position:]


def test_resuming_reads_up_to_the_mark_without_tokenizing():
    files = [[f"{file} {row:3}" for row in range(100)] for file in "abc"]  # documents of 6 tokens
    whole = stream_of(Lists(*files), block_size=6, window=10)
    rows = read(whole, 0, 250)
    source, encoder = Lists(*files), Counting()
    stream = stream_of(source, block_size=6, window=10, encoder=encoder)
    stream.load_state(whole.state_at(239), lambda *_: None)
    encoder.texts.clear(), source.was_read.clear()  # of the first sample, which every start reads
    assert read(stream, 239, 11) == rows[239:]
    assert encoder.texts[0] == "c  30"  # block 230 is where the window of block 239 begins
    assert {file for file, _ in source.was_read[:50]} == {2}  # whole files are not even read


def test_windows_are_permuted_one_by_one():
    order = WindowOrder(100, seed=3)
    read_order = [order[i] for i in range(300)]
    for window in range(3):
        part = read_order[100 * window : 100 * window + 100]
        assert sorted(part) == list(range(100 * window, 100 * window + 100))
        assert part != sorted(part)
    assert read_order[:100] != [i - 100 for i in read_order[100:200]]
    assert [WindowOrder(1, 3)[i] for i in range(5)] == list(range(5))
    assert WindowOrder(100, 3)[250] == read_order[250]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_ranks_divide_the_stream(dp_size):
    source = Lists([f"document {i} " + "x" * (i % 13) for i in range(40)])
    expected = read(stream_of(source), 0, 8 * 12)
    for first in (0, 5):
        steps = [[] for _ in range(12 - first)]
        for rank in range(dp_size):
            stream = stream_of(source)
            before = threading.active_count()
            with build_loader(
                stream,
                seed=1,
                global_batch=8,
                micro_batch=2,
                dp_rank=rank,
                dp_size=dp_size,
                samples_consumed=8 * first,
            ) as loader:
                for step, batches in zip(steps, islice(loader, 12 - first), strict=True):
                    step.append([batch["input_ids"].tolist() for batch in batches])
            assert threading.active_count() == before  # the stream's own thread has ended too
        micro_batches = [[step[r][k] for k in range(8 // (2 * dp_size)) for r in range(dp_size)] for step in steps]
        assert [[row for rows in step for row in rows] for step in micro_batches] == [
            expected[8 * step : 8 * step + 8] for step in range(first, 12)
        ]


def test_a_block_of_the_past_is_read_again():
    stream = stream_of(Lists([f"{i:3}" for i in range(100)]), window=5)
    late, early = stream[77], stream[12]
    assert early["input_ids"].tolist() == tokens_of(" 12")
    assert stream[78]["input_ids"].tolist() == tokens_of(" 78")
    assert late["input_ids"].tolist() == tokens_of(" 77")
    stream.close()


def build(tmp_path, **flags):
    return build_data(
        DataArguments(streaming=True, **flags),
        build_tokenizer("bytes"),
        seed=42,
        block_size=32,
        is_main_per_host=True,
        barrier=lambda: None,
        cache_dir=tmp_path / "cache",
    )


def test_what_is_broken_in_the_middle_is_named(tmp_path):
    lines = [json.dumps({"text": "fine " * 20})] * 30
    lines[20] = '{"text": 5}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = build(tmp_path, train_file=[str(tmp_path / "a.jsonl")], shuffle_buffer=4)
    loader = build_loader(data.train, seed=1, global_batch=4, micro_batch=4, dp_rank=0, dp_size=1)
    with loader, pytest.raises(UserError, match=r"a\.jsonl:21: column text holds a number"):
        list(islice(loader, 100))


def test_broken_rows_can_be_left_out(tmp_path, caplog):
    lines = [json.dumps({"text": text}) for text in ("one", "two", "three")]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:2], "{", lines[2]]))
    data = build(tmp_path, train_file=[str(tmp_path / "a.jsonl")], shuffle_buffer=1, bad_rows="skip")
    assert np.concatenate(read(data.train, 0, 6)).tolist() == (tokens_of("one", "two", "three") * 20)[: 6 * 32]
    assert f"left out: {tmp_path / 'a.jsonl'}:3 is not valid JSON" in caplog.text


def test_what_cannot_be_read_at_all_is_refused_at_once(tmp_path):
    write_rows(tmp_path / "blank.jsonl", [{"text": " "}])
    write_rows(tmp_path / "other.jsonl", [{"a": "x", "b": "y"}])
    for name, problem in (
        ("blank.jsonl", "holds no text"),
        ("other.jsonl", "which column is the text"),
        ("nothing.jsonl", "matches no file"),
    ):
        with pytest.raises(UserError, match=problem):
            build(tmp_path, train_file=[str(tmp_path / name)])
    with pytest.raises(UserError, match="cannot be loaded"):
        build(tmp_path, dataset_name=str(tmp_path / "nowhere"))


def test_held_out_text_has_a_file_of_its_own(tmp_path):
    train = write_rows(tmp_path / "a.jsonl", [{"text": "training text " * 9}] * 30)
    held_out = write_rows(tmp_path / "b.jsonl", [{"text": "held out"}])
    data = build(tmp_path, train_file=[str(train)], validation_file=[str(held_out)], max_train_samples=20)
    assert data.validation[0]["input_ids"].tolist() == tokens_of("held out")
    assert data.facts["validation"] == str(held_out)
    assert data.facts["num_validation_tokens"] == 9
    without = build(tmp_path, train_file=[str(train)])
    assert without.validation is None
    assert "--validation_file" in without.facts["validation"]
    json.dumps([data.facts, data.identity])


def test_a_changed_file_is_refused_by_name(tmp_path):
    files = [write_rows(tmp_path / name, [{"text": "some text"}]) for name in ("a.jsonl", "b.jsonl")]
    flags = {"train_file": [str(file) for file in files]}
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.write({"identity": {"data": build(tmp_path, **flags).identity, "seed": 1}})
    folder.check_identity({"data": build(tmp_path, **flags).identity, "seed": 1})
    for change in ({"text_column": "text"}, {"shuffle_buffer": 7}, {"max_train_samples": 1}):
        with pytest.raises(UserError, match=r"another data \(samples: "):
            folder.check_identity({"data": build(tmp_path, **flags, **change).identity})
    files[1].write_text('{"text": "changed"}\n')
    with pytest.raises(UserError, match=r"another data \(b\.jsonl: 22 bytes.*, now 20 bytes"):
        folder.check_identity({"data": build(tmp_path, **flags).identity})


def test_files_of_one_name_are_told_apart(tmp_path):
    files = [write_rows(tmp_path / folder / "a.jsonl", [{"text": folder}]) for folder in ("x", "yy")]
    assert list(name_files(files)) == ["a.jsonl", "a.jsonl (2)"]


class RunSoFar:
    """What `Run.begin_data` uses of a run that goes on after step 3 of 10."""

    def __init__(self, stream):
        self.state, self.resolved = SimpleNamespace(step=3), SimpleNamespace(global_batch=4)
        self.total_steps, self.events = 10, []
        self.monitor = SimpleNamespace(event=lambda step, name, text: self.events.append((step, name)))
        self.data = SimpleNamespace(train=stream, validation=None, facts={"validation": "none"})
        self.args = SimpleNamespace(data=DataArguments(streaming=True))


def test_a_run_hands_the_mark_on_and_tells_each_pass_once():
    run = RunSoFar(stream_of(Lists(["abc"] * 6), window=3))  # a pass of 6 blocks: its ends lie in steps 2, 4, 5, 7, ...
    Run.begin_data(run, {"data": {"sample": 12, "offset": 0, "place": [2, 0, 0, 0]}})
    assert read(run.data.train, 12, 50)
    assert run.events == [(3, "notice"), (5, "data"), (7, "data"), (8, "data"), (10, "data")]
    again = RunSoFar(stream_of(Lists(["abc"] * 6), window=3))
    Run.begin_data(again, {})
    assert read(again.data.train, 0, 50)
    assert again.events == [(3, "notice"), (4, "data"), (5, "data"), (7, "data"), (8, "data"), (10, "data")]
