"""`dstrain tokenizer train`: a folder that AutoTokenizer reads, the same every time."""

import json

import pytest
from transformers import AutoTokenizer

from dstrain.cli import main
from dstrain.data.tokenization import TextEncoder, build_tokenizer

TEXTS = [f"Once upon a time there was a number {i}, and it was not {i * i}.\n" for i in range(200)]
TEMPLATE = "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Runs the command on TEXTS; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    (tmp_path / "broken.jinja").write_text("{% for %}")

    def run(*argv, vocab_size=300, output="out", files=("texts.jsonl",)):
        flags = ["--vocab_size", str(vocab_size), "--output", str(tmp_path / output)]
        flags += [word for name in files for word in ("--train_file", str(tmp_path / name))]
        code = main(["tokenizer", "train", *flags, *argv])
        return code, *capsys.readouterr()

    return run


def test_the_folder_is_a_tokenizer(train, tmp_path):
    template = ("--special_tokens", "<|turn|>", "<|other|>", "--chat_template", str(tmp_path / "chat.jinja"))
    code, said, _ = train(*template)
    assert code == 0
    folder = str(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 300
    assert [tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id] == [0, 0, 1]
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|pad|>", "<|turn|>", "<|other|>"]) == [0, 1, 2, 3]
    anything = "Any text, é\N{GRINNING FACE} \x00\r\n\n  of any bytes"
    assert tokenizer.decode(tokenizer(anything)["input_ids"]) == anything
    assert tokenizer("<|turn|>")["input_ids"] == [2]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|turn|>user: Hi"
    encoder = TextEncoder(build_tokenizer(folder))
    assert encoder.affixes[1].tolist() == [0]
    ids = encoder.encode(TEXTS)
    assert f"300 tokens, {sum(map(len, TEXTS)) / sum(map(len, ids)):.3f} bytes per token" in said


def test_the_same_text_gives_the_same_files(train, tmp_path):
    for output in ("one", "two"):
        assert train(output=output)[0] == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert {file.name: file.read_bytes() for file in one.iterdir()} == {
        file.name: file.read_bytes() for file in two.iterdir()
    }


def test_a_small_text_gives_a_smaller_vocabulary_and_says_so(train, tmp_path):
    code, said, _ = train(vocab_size=5000)
    assert code == 0
    assert "fewer than the 5,000 asked for" in said
    assert len(AutoTokenizer.from_pretrained(str(tmp_path / "out"))) < 5000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--packing"], "--packing says nothing to a tokenizer"),
        (["--max_steps", "3"], "--max_steps says nothing to a tokenizer"),
        (["--chat_template", "chat.jinja"], "writes <|turn|>, which would be cut into pieces: add --special_tokens"),
        (["--chat_template", "broken.jinja"], "--chat_template is no Jinja (line 1"),
        (["--chat_template", "none.jinja"], "cannot be read"),
        (["--text_column", "txt"], "has no column txt: did you mean text"),
        (["--long_rows", "skip"], "--long_rows says nothing to a tokenizer"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(train, tmp_path, argv, message):
    code, _, said = train(*[str(tmp_path / word) if word.endswith(".jinja") else word for word in argv])
    assert code == 2
    (line,) = said.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_text_without_words(train, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    code, _, said = train("--text_column", "text", files=["empty.jsonl"])
    assert code == 2
    assert "empty.jsonl holds no text" in said


def test_what_is_said_in_chats_counts(train, tmp_path):
    turns = [{"role": "user", "content": "zyzzyva zyzzyva"}, {"role": "assistant", "content": "zyzzyva"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert train(files=["chats.jsonl"])[0] == 0
    assert "zyzzyva" in AutoTokenizer.from_pretrained(str(tmp_path / "out")).get_vocab()


def test_a_vocabulary_too_small_and_a_folder_in_use(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    code, _, said = train(vocab_size=257)
    assert code == 2
    assert "--vocab_size is 257: write at least 258" in said
    assert f"--output {tmp_path / 'out'} is there already" in said
