"""`dstrain generate`: greedy text against a plain loop, the terminal, files and conversations."""

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dstrain import cli
from dstrain.data.tokenization import build_tokenizer
from dstrain.errors import UserError
from dstrain.generate.decoding import Decoding
from dstrain.generate.model import _stop_ids, load
from dstrain.generate.prompts import fit_prompts
from dstrain.generate.sample import prompt_to_sample, sample_text
from dstrain.generate.terminal import Conversation
from dstrain.generate.text import batches_by_length, continue_prompts
from tests import tiny_model
from tests.tiny_model import END, POSITIONS

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
PROMPTS = ["Once upon a time", "a", "To be, or not"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("model"), chat_template=TEMPLATE)


def generate(capfd, *argv):
    assert cli.main(["generate", *map(str, argv)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_batch_gives_the_text_of_each_prompt_alone(kind, tmp_path):
    """With padding on the left and a cache, for rotary and for learned positions."""
    loaded = load(str(tiny_model.save(tmp_path, kind)))
    prompts = loaded.encode_prompts(PROMPTS)
    found = continue_prompts(loaded, prompts, Decoding(8))
    expected = [tiny_model.greedy(loaded.model, prompt, 8) for prompt in prompts]
    assert found == [ids[: ids.index(END)] if END in ids else ids for ids in expected]
    # What follows an end of text is no part of it.
    last = found[0][4]
    loaded.stop_ids.append(last)
    assert continue_prompts(loaded, prompts[:1], Decoding(8)) == [found[0][: found[0].index(last)]]


def test_ends_are_special_tokens_only(folder):
    """Llama's default end of text is token 2: a byte of this tokenizer, which must not end a text."""
    loaded = load(str(folder))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert loaded.stop_ids == [END]
    tokenizer = build_tokenizer("bytes", chat_template="{% for m in messages %}{{ m.content }}<|pad|>{% endfor %}")
    tokenizer.split_special_tokens = False
    assert _stop_ids([2, 5], tokenizer) == [END, END + 1]  # this template's end of a turn
    assert loaded.encode_prompts([""]) == [[END]]


def test_the_terminal_shows_what_a_file_gets(folder, tmp_path, capfd):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    common = ("--max_new_tokens", "8")
    output = tmp_path / "answers.jsonl"
    assert generate(capfd, folder, *common, "--prompt_file", tmp_path / "prompts.jsonl", "--output", output) == ""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    model = load(str(folder)).model
    for row in rows:
        ids = tiny_model.greedy(model, list(row["prompt"].encode()), 8)
        assert row["ended"] == (END in ids)
        shown = generate(capfd, folder, *common, "--prompt", row["prompt"])
        assert shown == "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in row["completion"]) + "\n"


def test_draws_are_those_of_the_seed(folder, capfd):
    flags = (folder, "--prompt", "Once", "--max_new_tokens", "12", "--temperature", "3", "--seed")
    first, again, other = (generate(capfd, *flags, seed) for seed in (1, 1, 2))
    assert first == again != other
    likeliest = generate(capfd, folder, "--prompt", "Once", "--max_new_tokens", "12")
    assert generate(capfd, folder, "--prompt", "Once", "--max_new_tokens", "12", "--top_k", "1") == likeliest


def test_a_conversation_remembers_until_it_is_reset(folder):
    loaded, out = load(str(folder)), io.StringIO()
    Conversation(loaded, Decoding(4), out).hold(io.StringIO("Hi\nWhat?\n\n/reset\nHi\n/exit\nnever read\n"))
    answers = [part.removesuffix("\n") for part in out.getvalue().split("> ")[1:]]

    def answer(prompt):
        ids = tiny_model.greedy(loaded.model, list(prompt.encode()), 4)
        return loaded.tokenizer.decode(ids[: ids.index(END)] if END in ids else ids)

    first = answer("<user>Hi<a>")
    second = answer(f"<user>Hi<assistant>{first}<user>What?<a>")

    def shown(text):
        return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)

    assert answers == [shown(first), shown(second), "", "", shown(first), ""]


def test_a_conversation_ends_with_the_model_s_positions(folder):
    out = io.StringIO()
    Conversation(load(str(folder)), Decoding(4), out).hold(io.StringIO("x" * POSITIONS + "\n"))
    assert f"reached the model's {POSITIONS} tokens: /reset" in out.getvalue()


def test_what_all_prompts_share_is_never_cut():
    prompts = [[1, 2, 10, 11, 12, 13, 14, 8, 9], [1, 2, 20, 8, 9]]
    assert fit_prompts(prompts, 6, "left") == [[1, 2, 13, 14, 8, 9], [1, 2, 20, 8, 9]]
    assert fit_prompts(prompts, 6, "right") == [[1, 2, 10, 11, 8, 9], [1, 2, 20, 8, 9]]
    assert fit_prompts(prompts, 9, "left") == prompts
    assert fit_prompts(prompts, 3, "left") == [[14, 8, 9], [20, 8, 9]]  # no room for the shared words
    assert fit_prompts([[1, 2, 3, 4]], 2, "left") == [[3, 4]]
    assert fit_prompts([[1, 2, 3, 4]] * 2, 2, "right") == [[1, 2]] * 2


def test_batches_hold_rows_of_similar_length():
    assert batches_by_length([3, 9, 1, 9, 5], 2) == [[1, 3], [4, 0], [2]]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "write one of --prompt TEXT"),
        (("--prompt", "a", "--chat"), "write one of --prompt TEXT"),
        (("--prompt", "a", "--output", "x"), "--output belongs to --prompt_file"),
        (("--prompt", "a", "--messages_column", "x"), "--messages_column belongs to --prompt_file"),
        (("--prompt", "a", "--temperature", "0"), "leave it out for greedy"),
        (("--prompt", "a", "--top_p", "1.5"), "at most 1"),
        (("--prompt", "a", "--top_k", "0"), "positive number of tokens"),
        (("--prompt", "x" * POSITIONS, "--max_new_tokens", "4"), "there is room for 60"),
        (("--prompt", "a", "--max_new_tokens", str(POSITIONS)), "leave no room for a prompt"),
    ],
)
def test_refusals(folder, flags, words, capfd):
    assert cli.main(["generate", str(folder), *flags]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1


def test_a_chat_without_a_template_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no chat template"):
        Conversation(load(str(tiny_model.save(tmp_path))), Decoding(4), io.StringIO())


def test_a_sample_while_training_leaves_the_random_state(folder):
    model = load(str(folder)).model
    sequence = SimpleNamespace(whole=contextlib.nullcontext)
    engine = SimpleNamespace(deepspeed=SimpleNamespace(module=model), device=model.device, sequence=sequence)
    tokenizer = build_tokenizer("bytes")
    prompt = prompt_to_sample(tokenizer, None, "Once")
    before = torch.get_rng_state()
    first, again, other = (sample_text(engine, tokenizer, prompt, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other
    assert first[0] == "Once"
    long, text = sample_text(engine, tokenizer, list(b"x" * 100), seed=1)
    assert long == "x" * (POSITIONS // 2)
    assert text
    held_out = [{"input_ids": np.arange(40, 80)}]
    assert prompt_to_sample(tokenizer, held_out, None) == list(range(40, 56))
