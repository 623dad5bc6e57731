"""`build_data`: from flags to samples, the held-out split, the cache, and several processes of one host."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dstrain.arguments import DataArguments
from dstrain.data import build_data, build_loader, build_tokenizer
from dstrain.data.build import default_cache_dir, held_out_documents
from dstrain.errors import UserError


def build(cache_dir, block_size=32, seed=42, tokenizer="bytes", is_main=True, barrier=lambda: None, **flags):
    return build_data(
        DataArguments(**flags),
        build_tokenizer(tokenizer),
        seed=seed,
        block_size=block_size,
        is_main_per_host=is_main,
        barrier=barrier,
        cache_dir=cache_dir,
    )


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def all_ids(samples):
    return [samples[i]["input_ids"].tolist() for i in range(len(samples))]


def stories(count):
    return [{"text": f"Story number {i}. " + "Once upon a time. " * (i % 5)} for i in range(count)]


def test_the_builtin_corpus_is_the_default(tmp_path):
    data = build(tmp_path, block_size=1024, max_train_samples=150)
    assert data.num_tokens == len(data.train) * 1024
    assert data.num_label_tokens == len(data.train) * 1023
    assert len(data.validation) >= 1
    assert data.facts["loss_share"] == round(1023 / 1024, 6)
    assert data.source.startswith("built-in corpus")
    json.dumps(data.facts)
    began = time.perf_counter()
    again = build(tmp_path, block_size=1024, max_train_samples=150)
    assert time.perf_counter() - began < 0.5
    assert again.samples_sha256 == data.samples_sha256
    # The same documents are held out whatever the seed, so that figures of different runs compare.
    other_seed = build(tmp_path, block_size=1024, max_train_samples=150, seed=7)
    assert other_seed.samples_sha256 == data.samples_sha256
    assert all_ids(other_seed.validation) == all_ids(data.validation)


def test_documents_are_held_out_by_content_and_seed(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", stories(1000))
    splits = [build(tmp_path, train_file=[file], seed=seed) for seed in (1, 1, 2)]
    one, same, other = ({tuple(ids) for ids in all_ids(data.validation)} for data in splits)
    assert one == same != other
    assert splits[0].samples_sha256 != splits[2].samples_sha256
    assert splits[0].sha256 == splits[2].sha256


def test_held_out_share_and_copies():
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    held_out = held_out_documents(hashes, seed=5)
    assert 0.009 < held_out.mean() < 0.011
    assert held_out_documents(hashes[:7], seed=5).sum() == 1
    assert held_out_documents(np.full(200, 7, np.uint64), seed=5).sum() == 1  # copies of one document
    doubled = held_out_documents(np.repeat(hashes, 2), seed=5)
    assert (doubled[::2] == doubled[1::2]).all()
    kept = held_out_documents(hashes[: len(hashes) // 2], seed=5)  # a document stays where it is as others come
    assert (kept == held_out[: len(kept)]).all()


def test_one_long_document_holds_out_blocks(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(3000)))
    data = build(tmp_path, train_file=[str(tmp_path / "a.txt")])
    train, validation = all_ids(data.train), all_ids(data.validation)
    assert len(validation) == round((len(train) + len(validation)) / 100)
    text = (tmp_path / "a.txt").read_bytes()
    assert all(text.count(bytes(ids)) == 1 for ids in [*train, *validation][:50])
    assert {tuple(ids) for ids in train}.isdisjoint(tuple(ids) for ids in validation)
    assert data.facts["validation"] == f"{len(validation)} of the {len(train) + len(validation)} training samples"


def test_a_single_sample_is_trained_on(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    data = build(tmp_path, train_file=[str(tmp_path / "a.txt")])
    assert all_ids(data.train) == [[*b"short", 256]]
    assert data.validation is None
    assert data.facts["validation"] == "none: there is only one sample"


def test_a_validation_file_is_kept_apart(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", stories(200))
    held_out = write_jsonl(tmp_path / "b.jsonl", [{"text": "held out"}])
    data = build(tmp_path, train_file=[train], validation_file=[held_out])
    assert all_ids(data.validation) == [[*b"held out", 256]]
    assert data.facts["num_documents"] == 200
    assert data.facts["validation"] == held_out
    assert data.sha256 != build(tmp_path, train_file=[train]).sha256


def test_prompt_rows_are_padded_and_learn_completions(tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(20) for b in range(20)]
    data = build(tmp_path, train_file=[write_jsonl(tmp_path / "a.jsonl", rows)])
    assert len(data.train) + len(data.validation) == 400
    with build_loader(
        data.train, seed=1, global_batch=8, micro_batch=4, dp_rank=0, dp_size=2, pad_token_id=257
    ) as loader:
        (batch,) = next(loader)
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        prompt, completion = bytes(ids[ids < 256].tolist()).decode().split("=")
        assert bytes(labels[(labels >= 0) & (labels < 256)].tolist()).decode() == completion
        assert eval(prompt) == int(completion)  # noqa: S307 - digits and plus signs of our own
        assert (labels == 256).sum() == 1  # the end of the answer is learnt too
        assert mask.sum() == len(prompt) + 1 + len(completion) + 1
    assert data.facts["loss_share"] < 0.7
    assert data.train.num_label_tokens == sum((data.train[i]["labels"] >= 0).sum() for i in range(len(data.train)))


def test_packing_is_remembered(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", stories(500))
    data, again = (build(tmp_path, train_file=[file], packing=True, block_size=128) for _ in range(2))
    assert "position_ids" in data.train[0]
    assert all_ids(data.train) == all_ids(again.train)
    assert len(list((tmp_path / "tokens").glob("*/packs-128-*.npy"))) == 2
    assert data.samples_sha256 != build(tmp_path, train_file=[file], block_size=128).samples_sha256
    assert data.num_tokens / (len(data.train) * 128) > 0.95


def test_unusable_data_are_refused(tmp_path):
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "blank.txt").write_text(" \n")
    row = write_jsonl(tmp_path / "cut.jsonl", [{"prompt": "x" * 50, "completion": "y"}])
    with pytest.raises(UserError, match=r"blank\.txt holds no text"):
        build(tmp_path, train_file=[str(tmp_path / "blank.txt")])
    with pytest.raises(UserError, match=r"training data .*cut\.jsonl.* hold no token to predict"):
        build(tmp_path, train_file=[row])
    with pytest.raises(UserError, match="matches no file"):
        build(tmp_path, train_file=[str(tmp_path / "nothing.txt")])


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"the data cache .*file cannot be written \(Not a directory\)"):
        build(tmp_path / "file", max_train_samples=3)


def test_a_cache_that_fills_its_disk_is_named(tmp_path):
    """numpy (2.4) raises an OSError without a code when it could write a part only."""
    text = tmp_path / "a.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(20_000)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(UserError, match=r"the data cache .* cannot be written \(\d+ requested and \d+ written\)"):
            build(tmp_path / "cache", train_file=[str(text)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_cache_lies_where_the_desktop_says(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/dstrain")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache/dstrain"


def run_host(cache_dir, **flags):
    """Three threads in the part of one host's processes; the outcome (data or error) of each."""
    barrier, outcomes = threading.Barrier(3), [None] * 3

    def process(rank):
        try:
            outcomes[rank] = build(cache_dir, is_main=rank == 1, barrier=barrier.wait, **flags)
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return outcomes


def test_one_process_of_a_host_works_and_all_read(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", stories(300))
    outcomes = run_host(tmp_path, train_file=[file])
    assert len({data.samples_sha256 for data in outcomes}) == 1
    assert all_ids(outcomes[0].train) == all_ids(outcomes[1].train)


def test_the_working_process_tells_the_others_what_is_wrong(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [*stories(3), {"txt": "a"}])
    outcomes = run_host(tmp_path, train_file=[file])
    (message,) = {str(outcome) for outcome in outcomes}
    assert message.startswith(f"{file}:4 has no column text (it has txt)")
    assert all(isinstance(outcome, UserError) for outcome in outcomes)
    write_jsonl(tmp_path / "a.jsonl", stories(4))  # mended: the answer of the failed start is not believed
    assert {type(outcome).__name__ for outcome in run_host(tmp_path, train_file=[file])} == {"TrainingData"}


def test_a_crash_of_the_working_process_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("dstrain.data.build.build_sources", lambda *_: 1 / 0)
    outcomes = run_host(tmp_path, max_train_samples=5)
    assert isinstance(outcomes[1], ZeroDivisionError)
    for other in (outcomes[0], outcomes[2]):
        assert "could not be prepared" in str(other)


def test_reading_data_imports_no_torch(tmp_path):
    """Sources, stores and packing are NumPy only: tools that look at data start at once."""
    code = (
        "import sys; from dstrain.data import packing, sources, store, order; "
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)


@pytest.mark.parametrize(
    ("name", "documents", "bytes_per_token"),
    [("imdb.test.parquet", 25_000, 4.6), ("tinystories_sample.parquet", 7_960, 4.0), ("tinyshakespeare.txt", 1, 3.3)],
)
def test_real_data(shared_data, tmp_path, name, documents, bytes_per_token):
    data = build(
        tmp_path,
        block_size=1024,
        tokenizer=str(shared_data / "tokenizers/gpt2"),
        train_file=[str(shared_data / name)],
        max_train_samples=min(documents, 3000),
        packing=documents > 1,
    )
    assert data.facts["num_documents"] == min(documents, 3000)
    tokens = data.num_tokens + data.validation.num_tokens
    assert data.facts["num_bytes"] / tokens == pytest.approx(bytes_per_token, rel=0.1)
    assert 0.005 < data.validation.num_tokens / tokens < 0.03
    assert data.num_tokens / (1024 * len(data.train)) > 0.97


def test_few_rows_hold_out_a_row(tmp_path):
    rows = [{"prompt": "x" * n, "completion": "yes"} for n in (1, 2, 3, 60)]
    data = build(tmp_path, train_file=[write_jsonl(tmp_path / "a.jsonl", rows)])
    assert len(data.validation) + len(data.train) + data.facts["num_rows_without_loss"] in (3, 4)
    assert data.facts["validation"] == "1 of the 4 training documents"
