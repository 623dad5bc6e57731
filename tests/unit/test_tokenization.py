"""Tokenizers, and text -> ids in pieces and threads: always the ids that the tokenizer itself gives."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.data.rows import BadRow, check_document
from dstrain.data.segments import RowRules
from dstrain.data.store import TokenStore, find_or_write_store, write_store
from dstrain.data.tokenization import TextEncoder, build_tokenizer, num_token_ids, pad_token_id
from dstrain.errors import UserError

RULES = RowRules()


class ListSource:
    """Documents from a list, a line each."""

    description, split_seeded = "a list", True

    def __init__(self, documents: list):
        self.items = documents
        self.sha256 = str(hash(tuple(documents)))
        self.reads = 0

    def documents(self):
        self.reads += 1
        return (d if isinstance(d, BadRow) else check_document(f"f:{i}", d) for i, d in enumerate(self.items, 1))


@pytest.fixture(scope="module")
def byte_tokenizer():
    return build_tokenizer("bytes")


@given(text=st.text())
def test_bytes_are_the_utf8_bytes(byte_tokenizer, text):
    ids = byte_tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert byte_tokenizer.decode(ids) == text


def test_bytes_specials_and_vocabulary(byte_tokenizer):
    assert (byte_tokenizer.eos_token_id, byte_tokenizer.pad_token_id) == (256, 257)
    assert len(byte_tokenizer) == num_token_ids(byte_tokenizer) == 258
    assert byte_tokenizer.decode([72, 105, 256, 257], skip_special_tokens=True) == "Hi"
    # A special token that is quoted in a text does not end a document.
    assert byte_tokenizer("<|endoftext|>")["input_ids"] == list(b"<|endoftext|>")


def test_bytes_survive_saving(byte_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    byte_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve \x00\n\t 𝄞 <|endoftext|>"
    assert loaded(text)["input_ids"] == list(text.encode())
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (256, 257, 258)
    assert TextEncoder(build_tokenizer(str(tmp_path))).sha256 == TextEncoder(byte_tokenizer).sha256


def test_unknown_tokenizers_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    for name in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="name a folder with its files, a hub name, or bytes"):
            build_tokenizer(name)


def test_pad_token_falls_back(shared_data):
    gpt2 = build_tokenizer(str(shared_data / "tokenizers/gpt2"))
    assert gpt2.pad_token_id is None
    assert pad_token_id(gpt2) == gpt2.eos_token_id == 50256


@pytest.mark.parametrize(
    ("name", "dtype", "prefix", "suffix"),
    [
        ("bytes", "uint16", [], [256]),
        ("tokenizers/gpt2", "uint16", [], [50256]),
        ("tokenizers/smollm2", "uint16", [], [2]),
        ("models/stories260K-hf", "uint16", [1], []),
        ("models/stories15M-hf-bf16", "uint16", [1], []),
    ],
)
def test_documents_as_the_tokenizer_has_them(shared_data, tmp_path, name, dtype, prefix, suffix):
    """Special tokens where the tokenizer puts them, an end-of-text where it puts none, long texts seamless."""
    tokenizer = build_tokenizer(name if name == "bytes" else str(shared_data / name))
    encoder = TextEncoder(tokenizer)
    assert encoder.dtype == dtype
    assert [ids.tolist() for ids in encoder.affixes] == [prefix, suffix]
    shakespeare = (shared_data / "tinyshakespeare.txt").read_text()[:300_000]
    texts = ["Once upon a time", "  two\n\n\nparts \n", "ünïcödé 𝄞", shakespeare]
    write_store(tmp_path, ListSource([(text,) for text in texts]), encoder, RULES)
    store = TokenStore.open(tmp_path)
    for i, text in enumerate(texts):
        ids = store.tokens[store.offsets[i] : store.offsets[i + 1]].tolist()
        assert ids == [*tokenizer(text, verbose=False)["input_ids"], *suffix]
    assert store.facts["num_bytes"] == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize(("name", "end"), [("tokenizers/gpt2", 50256), ("models/stories260K-hf", 2)])
def test_a_completion_always_ends_with_an_end(shared_data, tmp_path, name, end):
    encoder = TextEncoder(build_tokenizer(str(shared_data / name)))
    write_store(tmp_path, ListSource([("Two and two", " are four."), ("One and one", " are two.")]), encoder, RULES)
    store = TokenStore.open(tmp_path)
    assert [int(store.tokens[i - 1]) for i in store.offsets[1:]] == [end, end]


@pytest.mark.parametrize("name", ["bytes", "tokenizers/gpt2", "tokenizers/smollm2", "models/stories260K-hf"])
def test_long_texts_are_cut_only_where_the_ids_stay(shared_data, name):
    encoder = TextEncoder(build_tokenizer(name if name == "bytes" else str(shared_data / name)))
    text = (shared_data / "tinyshakespeare.txt").read_text()[:200_000]
    pieces = encoder.split(text, 10_000)
    assert "".join(pieces) == text
    assert len(pieces) > 10 if name != "models/stories260K-hf" else len(pieces) == 1
    assert np.array_equal(np.concatenate(encoder.encode(pieces)), encoder.encode([text])[0])
    assert encoder.split("x" * 100_000, 10_000) == ["x" * 100_000]  # no line feed, no cut


def test_truncation_and_padding_set_on_the_tokenizer_do_not_leak_in(tmp_path):
    tokenizer = build_tokenizer("bytes")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    assert TextEncoder(tokenizer).encode(["abcdefghij"])[0].tolist() == list(b"abcdefghij")


def test_a_tokenizer_without_the_fast_backend(byte_tokenizer, tmp_path):
    """Tokenizers written in Python give the same store, one thread at a time."""

    class Slow:
        eos_token_id = 256

        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = [list(t.encode()) for t in ([text] if isinstance(text, str) else text)]
            return {"input_ids": ids[0] if isinstance(text, str) else ids}

        def get_vocab(self):
            return {str(i): i for i in range(70_000)}

    encoder = TextEncoder(Slow())
    assert encoder.dtype == np.uint32
    write_store(tmp_path, ListSource([("ab",), ("c",)]), encoder, RULES)
    assert TokenStore.open(tmp_path).tokens.tolist() == [97, 98, 256, 99, 256]
    assert len(encoder.sha256) == 64


def test_empty_documents_are_skipped_and_counted(byte_tokenizer, tmp_path):
    write_store(tmp_path, ListSource([("",), ("a",), (" \n",), ("b",)]), TextEncoder(byte_tokenizer), RULES)
    store = TokenStore.open(tmp_path)
    assert store.tokens.tolist() == [97, 256, 98, 256]
    assert (store.carries_loss, store.is_rows) == (None, False)
    assert (store.facts["num_documents"], store.facts["num_empty_documents"]) == (2, 2)
    with pytest.raises(UserError, match="a list holds no text"):
        write_store(tmp_path, ListSource([("",)]), TextEncoder(byte_tokenizer), RULES)


def test_prompts_and_completions(byte_tokenizer, tmp_path):
    source = ListSource([("2+2=", "4"), ("", "alone"), ("no answer", "")])
    write_store(tmp_path, source, TextEncoder(byte_tokenizer), RULES)
    store = TokenStore.open(tmp_path)
    assert store.tokens.tolist() == [*b"2+2=4", 256, *b"alone", 256]
    assert store.carries_loss.tolist() == [False] * 4 + [True] * 2 + [True] * 6
    assert store.is_rows
    assert [store.place(i) for i in range(2)] == ["f:1", "f:2"]
    assert store.facts["skipped_rows"] == {"empty": {"rows": 1, "first": ["f:3"]}}
    everything = tmp_path / "everything"
    everything.mkdir()
    write_store(everything, source, TextEncoder(byte_tokenizer), RowRules(train_on_prompts=True))
    store = TokenStore.open(everything)
    assert (store.tokens.tolist(), store.carries_loss, store.is_rows) == ([*b"2+2=4", 256, *b"alone", 256], None, True)
    with pytest.raises(UserError, match="mixes plain text with prompt and completion"):
        write_store(tmp_path, ListSource([("a",), ("b", "c")]), TextEncoder(byte_tokenizer), RULES)


def test_the_cache_is_by_content_and_mends_itself(byte_tokenizer, tmp_path, caplog):
    encoder = TextEncoder(byte_tokenizer)
    source = ListSource([("some text",)])
    folder = find_or_write_store(tmp_path, source, encoder, RULES)
    assert find_or_write_store(tmp_path, source, encoder, RULES) == folder
    assert source.reads == 1
    assert find_or_write_store(tmp_path, ListSource([("other text",)]), encoder, RULES) != folder
    (folder / "tokens.bin").write_bytes(b"\0")
    assert find_or_write_store(tmp_path, source, encoder, RULES) == folder
    assert source.reads == 2
    assert "damaged" in caplog.text
    assert TokenStore.open(folder).tokens.tolist() == [*b"some text", 256]
    assert [path.name for path in (tmp_path / "tokens").glob("*.tmp-*")] == []


def test_leftovers_of_killed_runs_are_removed(byte_tokenizer, tmp_path):
    old, fresh = tmp_path / "tokens/a.tmp-1", tmp_path / "tokens/b.tmp-2"
    for folder in (old, fresh):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    find_or_write_store(tmp_path, ListSource([("text",)]), TextEncoder(byte_tokenizer), RULES)
    assert not old.exists()
    assert fresh.exists()


def test_nothing_is_left_of_a_store_that_failed(byte_tokenizer, tmp_path):
    source = ListSource([("fine",), BadRow("f:2", "broken", "line 2 is broken")])
    with pytest.raises(UserError, match="line 2 is broken"):
        find_or_write_store(tmp_path, source, TextEncoder(byte_tokenizer), RULES)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_order_is_kept_over_many_jobs(byte_tokenizer, tmp_path):
    texts = [f"document {i} " + "x" * (i % 700) for i in range(3000)]
    write_store(tmp_path, ListSource([(text,) for text in texts]), TextEncoder(byte_tokenizer), RULES)
    store = TokenStore.open(tmp_path)
    assert bytes(store.tokens[store.tokens < 256].astype(np.uint8)).decode() == "".join(texts)
    assert store.lengths.tolist() == [len(text) + 1 for text in texts]
