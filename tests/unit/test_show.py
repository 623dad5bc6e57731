"""`dstrain data`: what a person reads of the samples, and the statistics."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.arguments import DataArguments
from dstrain.cli import main
from dstrain.data import build_data, build_tokenizer
from dstrain.data.order import Order
from dstrain.data.packing import IGNORE
from dstrain.data.render import coloured, count, documents, plain
from dstrain.data.statistics import describe, length_facts

BYTES = build_tokenizer("bytes")


def sample_of(ids, labels, positions=None):
    sample = {"input_ids": np.array(ids), "labels": np.array(labels)}
    return sample if positions is None else sample | {"position_ids": np.array(positions)}


def one_document(text, tokenizer=BYTES):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    (document,) = documents(tokenizer, sample_of(ids, ids))
    return document


def build(file, block_size, packing=False, seed=42):
    return build_data(
        DataArguments(train_file=[str(file)], block_size=block_size, packing=packing),
        BYTES,
        seed=seed,
        block_size=block_size,
        is_main_per_host=True,
        barrier=lambda: None,
    )


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Prompts that count from 2 to 13 tokens and completions of one letter and the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": "p" * n, "completion": "c"}) + "\n" for n in range(2, 14)]
    file.write_text("".join(lines))
    return file


def test_tokens_without_loss_stand_apart():
    ids = [*"Q:é\n".encode(), 256]
    (document,) = documents(BYTES, sample_of(ids, [IGNORE, IGNORE, *ids[2:]]))
    assert plain(document) == "⟦Q|:⟧é|↵\n|<|endoftext|>"
    assert count([document]) == "6 tokens, 4 with loss"
    text = coloured(document)
    assert text.plain == "Q:é↵\n<|endoftext|>"
    dim = {i for span in text.spans if "dim" in str(span.style) for i in range(span.start, span.end)}
    assert dim == {0, 1}
    assert [str(span.style) for span in text.spans] == ["dim cyan", "dim default", "cyan", "default", "magenta"]


def test_the_first_token_carries_no_loss():
    assert plain(one_document("ab")) == "⟦a⟧b"


def test_packed_documents_are_apart():
    ids = list(b"abcde")
    parts = documents(BYTES, sample_of(ids, [IGNORE, 98, IGNORE, 100, IGNORE], [0, 1, 0, 1, 2]))
    assert [plain(part) for part in parts] == ["⟦a⟧b", "⟦c⟧d⟦e⟧"]


@settings(max_examples=40)
@given(st.text(min_size=1, max_size=40))
def test_cells_are_the_text(text):
    document = one_document(text)
    assert "".join(cell.text for cell in document) == text
    assert len(document) == len(text)


def test_spaces_of_a_metaspace_tokenizer_are_kept(shared_data):
    tokenizer = build_tokenizer(str(shared_data / "models" / "stories260K-hf"))
    document = one_document("Once upon a time é\N{GRINNING FACE}", tokenizer)
    assert "".join(cell.text for cell in document) == "Once upon a time é\N{GRINNING FACE}"


def test_what_a_terminal_would_obey_is_escaped():
    assert plain(one_document("a\x1b[31m\t")) == r"⟦a⟧\x1b|[|3|1|m|\t"


def test_length_facts():
    facts = length_facts(np.array([3, 1, 2, 5, 4] * 20), block_size=3)
    assert facts == {
        "document_lengths": {"min": 1, "median": 3, "p95": 5, "max": 5},
        "share_longer_than_block": 0.4,
    }


def test_statistics_are_those_of_the_run(rows, tmp_path, capsys):
    flags = ["--train_file", str(rows), "--tokenizer_name", "bytes", "--block_size", "14", "--packing"]
    assert main(["data", "stats", "--json", *flags]) == 0
    shown = json.loads(capsys.readouterr().out)
    data = build(rows, 14, packing=True)
    assert shown == {"source": data.source, "sha256": data.sha256, **data.facts}
    tokens = sum(len(data.train[i]["input_ids"]) for i in range(len(data.train)))
    with_loss = sum((data.train[i]["labels"] != IGNORE).sum() for i in range(len(data.train)))
    assert shown["packing_efficiency"] == round(tokens / (14 * len(data.train)), 6)
    assert shown["loss_share"] == round(float(with_loss) / tokens, 6)
    assert shown["document_lengths"] == {"min": 4, "median": 10, "p95": 14, "max": 15}
    assert shown["share_longer_than_block"] == round(1 / 12, 6)
    assert main(["data", "stats", *flags]) == 0
    said = capsys.readouterr().out
    assert said.strip() == describe(data.facts)
    assert "12 documents of 4 to 15 tokens (median 10, 95 % up to 14), 8.3% longer than a block of 14" in said


def test_a_mixture_is_described_by_source_and_of_a_stream_what_is_unknown(rows):
    facts = build(rows, 16).facts
    one, two = facts | {"share_reached": 0.25}, facts | {"share_reached": 0.75, "source": "other"}
    lines = describe({"source": "both", "sources": [one, two]}).splitlines()
    assert [line.split(": ")[1] for line in lines[::2]] == [str(rows), "other"]
    assert lines[1].endswith("; 25.0% of the mixture")
    assert lines[3].endswith("; 75.0% of the mixture")
    dargs = DataArguments(train_file=[str(rows)], streaming=True, shuffle_buffer=3)
    stream = build_data(dargs, BYTES, seed=1, block_size=16, is_main_per_host=True, barrier=lambda: None)
    said = describe(stream.facts)
    assert said.startswith(f"data: stream of {rows}: prompt, shuffled in windows of 3 samples; how many there are")


def test_the_first_samples_of_the_training_order_are_shown(rows, capsys):
    flags = ["--train_file", str(rows), "--tokenizer_name", "bytes", "--block_size", "16", "--seed", "7"]
    assert main(["data", "show", *flags, "--num_samples", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    data, order = build(rows, 16, seed=7), Order(11, 7)
    titles = [line for line in lines if line.startswith("== ")]
    assert [int(title.split()[2]) for title in titles] == [order[0], order[1]]
    texts = [line for line in lines if line.startswith("⟦p")]
    assert len(texts) == 2
    assert all(text.endswith("⟧c|<|endoftext|>") for text in texts)
    for i, title in enumerate(titles):
        assert title.endswith(f": {len(data.train[order[i]]['input_ids'])} tokens, 2 with loss")
    assert not [line for line in lines if line.startswith("-- document")]
    assert lines[-2].startswith(f"data: {rows}: 12 documents")
    assert main(["data", "show", *flags, "--packing", "--num_samples", "1"]) == 0
    packed = capsys.readouterr().out
    assert "-- document 1 of " in packed


def test_a_mixture_is_shown_in_its_own_order(rows, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text().replace('"pp', '"qq'))
    files, weights = [str(rows), str(other)], [3.0, 1.0]
    flags = [
        word for f, w in zip(files, weights, strict=True) for word in ("--train_file", f, "--train_weight", str(w))
    ]
    assert main(["data", "show", *flags, "--tokenizer_name", "bytes", "--block_size", "16", "--num_samples", "9"]) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("== ")]
    dargs = DataArguments(train_file=files, train_weight=weights, block_size=16)
    train = build_data(dargs, BYTES, seed=42, block_size=16, is_main_per_host=True, barrier=lambda: None).train
    order = train.order(42)
    assert [int(title.split()[2]) for title in titles] == [order[i] for i in range(9)]


def test_of_a_stream_the_first_samples_are_shown_too(tmp_path, capsys):
    file = tmp_path / "words.txt"
    file.write_text("".join(f"{i:03} " for i in range(100)))
    flags = ["--train_file", str(file), "--tokenizer_name", "bytes", "--block_size", "8"]
    assert main(["data", "show", *flags, "--streaming", "--max_steps", "1", "--num_samples", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.replace("⟦", "").replace("⟧", "").replace("|", "") for line in lines if line.startswith("⟦")][1:]
    assert len(shown) == 30
    whole = (file.read_text() + "<endoftext>") * 2
    assert all(text in whole for text in shown)
    assert len(set(shown)) > 20


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "--block_size", "8"], "no tokenizer is named"),
        (["show", "--num_samples", "0"], "--num_samples is 0"),
        (["show", "--json"], "--json belongs to"),
        (["look"], "invalid choice"),
        (["stats", "--blocksize", "8"], "unknown flag --blocksize: did you mean --block_size"),
    ],
)
def test_wrong_words_are_one_line(capsys, argv, message):
    assert main(["data", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
