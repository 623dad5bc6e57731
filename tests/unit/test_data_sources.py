"""Every format gives the same documents; what is broken is refused by file and line."""

import csv
import gzip
import json
import shutil
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from dstrain.arguments import DataArguments
from dstrain.data.columns import ColumnFlags
from dstrain.data.rows import SkippedRows
from dstrain.data.sources import BuiltinCorpus, FileSource, build_sources, find_files
from dstrain.errors import UserError

TEXTS = ["first text", 'with "quotes", commas\nand lines', "ünïcödé 𝄞", "", "last"]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def write_rows(path, rows):
    """Rows in the format that the suffix names."""
    suffixes = path.name.split(".")[1:]
    plain = path.with_suffix("") if suffixes[-1] in ("gz", "zst") else path
    if suffixes[0] == "jsonl":
        write(plain, "".join(json.dumps(row) + "\n" for row in rows))
    elif suffixes[0] == "json":
        write(plain, json.dumps(rows))
    elif suffixes[0] in ("csv", "tsv"):
        with open(plain, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if suffixes[0] == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        plain.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
    if suffixes[-1] == "gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    if suffixes[-1] == "zst":
        path.write_bytes(zstandard.compress(plain.read_bytes()))
    return path


def documents(path, text_column=None, cache=None, max_documents=None):
    source = FileSource([path], ColumnFlags(text_column), max_documents, cache or path.parent)
    return usable(source)


def usable(source):
    """The documents of a source; a row that cannot be used is refused."""
    return [row.document for row in SkippedRows("refuse").accept(source.documents())]


@pytest.mark.parametrize(
    "suffix", ["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "csv.zst", "json.zst", "parquet.gz"]
)
def test_tables_of_every_format(tmp_path, suffix):
    rows = [{"id": f"{i}", "text": text, "other": "x"} for i, text in enumerate(TEXTS)]
    path = write_rows(tmp_path / f"data.{suffix}", rows)
    assert documents(path) == [(text,) for text in TEXTS if text]
    assert documents(path, max_documents=2) == [(text,) for text in TEXTS[:2]]
    assert documents(path, text_column="other") == [("x",)] * 5


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_prompts_and_completions(tmp_path, suffix):
    path = write_rows(tmp_path / f"data.{suffix}", [{"prompt": "2+2=", "completion": "4", "text": "no"}])
    assert documents(path) == [("2+2=", "4")]
    assert documents(path, text_column="text") == [("no",)]


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "txt.zst", "py", "unknown"])
def test_a_text_file_is_one_document(tmp_path, suffix):
    text = "line\r\n\r\nline ünï\n"
    data = text.encode()
    data = gzip.compress(data) if suffix.endswith("gz") else data
    data = zstandard.compress(data) if suffix.endswith("zst") else data
    assert documents(write(tmp_path / f"a.{suffix}", data)) == [(text,)]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert documents(write(tmp_path / "a.txt", "\ufefftext")) == [("text",)]
    assert documents(write(tmp_path / "a.csv", "\ufefftext\na\n")) == [("a",)]
    assert documents(write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\n')) == [("a",)]


def test_the_only_column_of_text_is_found(tmp_path):
    assert documents(write(tmp_path / "a.jsonl", '{"n": 1, "content": "a"}\n{"n": 2, "content": null}')) == [("a",)]


GOOD = '{"text": "fine"}\n'
BROKEN = [
    (
        "a.jsonl",
        GOOD + '{"text": \n',
        r"a\.jsonl:2 is not valid JSON \(Expecting value at column \d+\): write one object",
    ),
    ("b.jsonl", GOOD + "\n[1]\n", r"b\.jsonl:3 is not an object"),
    ("c.jsonl", GOOD + '{"txt": "a"}\n', r"c\.jsonl:2 has no column text \(it has txt\)"),
    ("d.jsonl", GOOD + '{"text": 3}\n', r"d\.jsonl:2: column text holds a number, not a text"),
    ("e.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}\n', r"e\.jsonl:2 is not UTF-8 \(byte 14 is 0xe9\): convert it"),
    ("f.jsonl", '{"a": "x", "b": "y"}\n', r"f\.jsonl:1: which column is the text\? Name it with --text_column .*a, b"),
    ("g.jsonl", GOOD + '{"text": "\\ud800"}\n', r"g\.jsonl:2 holds half a surrogate pair \(\\ud800\)"),
    ("h.json", '[{"text": "a"},\n{"text": }]', r"h\.json:2 is not valid JSON"),
    ("i.json", '[{"text": "a"}, {"text": ["b"]}]', r"i\.json row 2: column text holds a list"),
    ("j.csv", "text,label\na,1\nb\n", r"j\.csv:3 has 1 fields, the header 2"),
    ("k.csv", 'text\n"a', r"k\.csv:2 is not valid CSV"),
    ("l.csv", b"text\na\n\xff\n", r"l\.csv:3 is not UTF-8"),
    ("m.txt", b"fine\nfine\nb\xffd", r"m\.txt:3 is not UTF-8 \(byte 0xff\): a binary file, or convert it"),
    ("n.txt", b"", r"n\.txt is empty: leave it out"),
    ("o.parquet", b"PAR1 nonsense", r"o\.parquet is no readable parquet file"),
    ("p.txt.gz", gzip.compress(b"text" * 1000)[:-20], r"p\.txt\.gz cannot be read \(.*\): is it whole\?"),
    ("q.txt.gz", b"no gzip at all", r"q\.txt\.gz cannot be read \(Not a gzipped file"),
    (
        "r.jsonl.zst",
        zstandard.compress(GOOD.encode() * 1000)[:-5],
        r"r\.jsonl\.zst cannot be read \(.*\): is it whole\?",
    ),
    ("s.txt.zst", b"no zstandard", r"s\.txt\.zst cannot be read"),
    ("t.json", '{"version": 1, "data": []}', r"t\.json:1: which column is the text\?|t\.json:1.* has no"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_broken_files_are_refused_by_file_and_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        documents(write(tmp_path / name, content))
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]


def test_wrong_columns_are_refused_with_what_there_is(tmp_path):
    path = write_rows(tmp_path / "a.parquet", [{"review": "a", "label": 1}])
    with pytest.raises(
        UserError, match=r"has no column revew: did you mean review\? \(its columns are review, label\)"
    ):
        documents(path, text_column="revew")
    with pytest.raises(UserError, match="column label holds no text: name another"):
        documents(path, text_column="label")
    path = write_rows(tmp_path / "b.parquet", [{"text": 1}])
    with pytest.raises(UserError, match="which column is the text"):
        documents(path)


def test_files_folders_and_globs(tmp_path):
    names = ["b.txt", "a.jsonl", "deep/c.csv", "README.md", ".hidden/d.txt", "e.py"]
    for name in names:
        write(tmp_path / name, "x")
    found = find_files([str(tmp_path)], "--train_file")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.jsonl", "b.txt", "deep/c.csv"]
    found = find_files([str(tmp_path / "*.py"), str(tmp_path / "**/*.csv"), str(tmp_path / "b.txt")], "--train_file")
    assert [path.name for path in found] == ["e.py", "c.csv", "b.txt"]


def test_all_wrong_paths_are_named_at_once(tmp_path):
    write(tmp_path / "train.txt", "x")
    (tmp_path / "empty").mkdir()
    patterns = [
        str(tmp_path / name) for name in ("trian.txt", "*.bin", "no/where.txt", "empty", "train.txt", "train.t?t")
    ]
    with pytest.raises(UserError) as caught:
        find_files(patterns, "--train_file")
    problems = [problem.replace(str(tmp_path), "") for problem in caught.value.problems]
    assert problems == [
        "--train_file /trian.txt matches no file: did you mean /train.txt?",
        "--train_file /*.bin matches no file: check the path",
        "--train_file /no/where.txt matches no file: there is no folder /no",
        "--train_file /empty is a folder without .txt, .jsonl, .json, .csv or .parquet files",
        "--train_file names /train.txt twice: it would be read twice",
    ]
    with pytest.raises(UserError) as caught:
        build_sources(DataArguments(train_file=["/no/a"], validation_file=["/no/b"]), tmp_path)
    assert [problem.split()[0] for problem in caught.value.problems] == ["--train_file", "--validation_file"]


def test_the_hash_is_of_the_content(tmp_path):
    def sha256(path, column=None, count=None):
        return FileSource([path], ColumnFlags(column), count, tmp_path / "cache").sha256

    first = write(tmp_path / "a.jsonl", GOOD)
    assert sha256(first) == sha256(write(tmp_path / "elsewhere/b.jsonl", GOOD))
    different = [sha256(first), sha256(first, "text"), sha256(first, None, 1), sha256(write(tmp_path / "a.txt", GOOD))]
    write(first, GOOD + GOOD)
    assert len({*different, sha256(first)}) == 5


def test_the_builtin_corpus_is_this_pythons_library():
    corpus = BuiltinCorpus()
    texts = [text for (text,) in usable(corpus)]
    assert 400 < len(texts) < 1200
    assert 6_000_000 < sum(map(len, texts)) < 20_000_000
    names = [path.relative_to(corpus.root).as_posix() for path in corpus._files]
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert {"argparse.py", "json/decoder.py"} < set(names)
    assert not [name for name in names if "/test/" in f"/{name}" or "site-packages" in name or "_sysconfigdata" in name]
    assert corpus.sha256 == BuiltinCorpus().sha256 != BuiltinCorpus(max_documents=10).sha256
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in corpus.description


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A local folder in hub layout, read as the hub would be, offline and with a cache of its own."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub"
    write_rows(folder / "data/train-00000-of-00002.parquet", [{"text": "a", "n": 1}, {"text": "b", "n": 2}])
    write_rows(folder / "data/train-00001-of-00002.parquet", [{"text": None, "n": 3}])
    write_rows(folder / "data/validation-00000-of-00001.parquet", [{"text": "v", "n": 4}])
    return folder


def test_hub_datasets(hub_folder, tmp_path):
    train, validation = build_sources(DataArguments(dataset_name=str(hub_folder)), tmp_path)
    assert usable(train) == [("a",), ("b",)]
    assert usable(validation) == [("v",)]
    again, _ = build_sources(DataArguments(dataset_name=str(hub_folder)), tmp_path)
    assert train.sha256 == again.sha256 != validation.sha256
    first, _ = build_sources(DataArguments(dataset_name=str(hub_folder), max_train_samples=1), tmp_path)
    assert usable(first) == [("a",)]
    assert first.sha256 != train.sha256


def test_hub_configurations(hub_folder, tmp_path):
    shutil.rmtree(hub_folder / "data")
    write_rows(hub_folder / "en/train.parquet", [{"text": "hello"}])
    write_rows(hub_folder / "de/train.parquet", [{"text": "hallo"}])
    card = (
        "---\nconfigs:\n"
        + "".join(f"- config_name: {c}\n  data_files: {c}/*.parquet\n" for c in ("en", "de"))
        + "---\n"
    )
    write(hub_folder / "README.md", card)
    train, validation = build_sources(DataArguments(dataset_name=str(hub_folder), dataset_config_name="de"), tmp_path)
    assert usable(train) == [("hallo",)]
    assert validation is None
    for config in (None, "fr"):
        with pytest.raises(UserError, match=r"cannot be loaded .*en.*de") as caught:
            build_sources(DataArguments(dataset_name=str(hub_folder), dataset_config_name=config), tmp_path)
        assert "\n" not in caught.value.problems[0]


def test_wrong_hub_names_and_columns(hub_folder, tmp_path):
    for name in (str(tmp_path / "nowhere"), "nobody/nothing"):
        with pytest.raises(UserError, match=f"--dataset_name {name} cannot be loaded"):
            build_sources(DataArguments(dataset_name=name), tmp_path)
    with pytest.raises(UserError, match="has no column txt: did you mean text"):
        build_sources(DataArguments(dataset_name=str(hub_folder), text_column="txt"), tmp_path)
    write(hub_folder / "data/train-00000-of-00002.parquet", "broken")
    with pytest.raises(UserError, match="cannot be loaded"):
        build_sources(DataArguments(dataset_name=str(hub_folder)), tmp_path)
