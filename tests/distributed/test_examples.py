"""The examples do what they say: every command of their READMEs runs (a few steps), and their numbers are true."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.launch import ROOT, Result, run, run_command, train

EXAMPLES = ROOT / "examples"
READMES = sorted(EXAMPLES.glob("**/README.md"))
TINY = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def commands(readme: Path) -> list[str]:
    """The lines of a README's sh blocks, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", readme.read_text(), re.M | re.S)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_every_recipe_has_its_commands():
    assert {readme.parent.name: len(commands(readme)) for readme in READMES} == {
        "examples": 1,
        "shakespeare": 2,
        "stories": 1,
    }


def run_shortened(command: str, changes: dict[str, str], run_dir: Path, *more: str) -> Result:
    """Run a README's command from the root of the project with some of its words changed."""
    assert not set(changes) - set(shlex.split(command)), f"{command} no longer has {changes}"
    words = [changes.get(word, word) for word in shlex.split(command)]
    return run_command([*words, *more], run_dir=run_dir).check()


SHORT = ("--max_eval_batches", "2", "--set", "scheduler.params.warmup_num_steps=2", "--report_to", "none")


def test_shakespeare(tmp_path):
    """On a text of the same 65 characters, so that it runs without the data."""
    characters = "\n !$&',-.3:;?" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmnopqrstuvwxyz"
    words = [characters[i * 7 % 59 : i * 7 % 59 + 6] for i in range(4000)]
    (tmp_path / "text.txt").write_text(characters + "".join(words))
    prepare, start = commands(EXAMPLES / "shakespeare/README.md")
    data = tmp_path / "data"
    changed = {"tinyshakespeare.txt": str(tmp_path / "text.txt"), "runs/shakespeare_data": str(data)}
    made = run_command([changed.get(word, word) for word in shlex.split(prepare)]).check()
    assert "65 tokens" in made.stdout
    whole = (data / "train.txt").read_text() + (data / "validation.txt").read_text()
    assert whole == (tmp_path / "text.txt").read_text()

    places = ("--tokenizer_name", data / "tokenizer", "--train_file", data / "train.txt")
    places += ("--validation_file", data / "validation.txt", "--output_dir", tmp_path / "run")
    places += ("--max_steps", 40, "--logging_steps", 1)
    result = run_shortened(start, {}, tmp_path / "run", *map(str, places), *SHORT)
    assert len(result.losses()) == 40 and result.losses()[-1] < result.losses()[0] - 0.5
    assert result.metrics("train")[0]["tokens"] == 12 * 64  # as many predictions a step as nanoGPT's
    facts = result.run_json()["data"]
    assert facts["num_tokens"] % 65 == 0 and facts["num_documents"] == 1
    sample = result.run_json()["sample"]["text"]
    assert sample and set(sample) <= set(characters)


def test_shakespeares_characters_are_all_tokens(shared_data, tmp_path):
    done = run(EXAMPLES / "shakespeare/prepare.py", str(shared_data / "tinyshakespeare.txt"), str(tmp_path)).check()
    assert done.stdout.startswith("1003854 characters to train on, 111540 to validate, 65 tokens")
    from dstrain import build_tokenizer
    from dstrain.data.tokenization import TextEncoder

    text = (tmp_path / "validation.txt").read_text()
    tokenizer = build_tokenizer(str(tmp_path / "tokenizer"))
    ids = TextEncoder(tokenizer).encode([text])[0]
    assert len(ids) == len(text) == 111540 and tokenizer.decode(ids[:2000].tolist()) == text[:2000]


def test_shakespeare_reached_what_its_readme_says():
    """result.jsonl is the metrics.jsonl of the run that the README tells of."""
    lines = [json.loads(line) for line in (EXAMPLES / "shakespeare/result.jsonl").read_text().splitlines()]
    (held_out,) = [line for line in lines if line["kind"] == "eval"]
    assert held_out["step"] == 2000 and held_out["loss"] <= 1.88
    assert held_out["tokens"] == 111540 // 65 * 64  # the whole split
    assert f"{held_out['loss']:.4f}" in (EXAMPLES / "shakespeare/README.md").read_text()


def test_stories_start_where_the_pretrained_model_is(shared_data, tmp_path):
    """1.35 on the stories, not 6 (from scratch) and not 1.7 (an end-of-text that the model has never seen)."""
    (command,) = commands(EXAMPLES / "stories/README.md")
    changes = {
        "stories260K-hf": str(shared_data / "models/stories260K-hf"),
        "tinystories_sample.parquet": str(shared_data / "tinystories_sample.parquet"),
        "runs/stories": str(tmp_path / "run"),
        "200": "3",
        "10": "1",
    }
    result = run_shortened(command, changes, tmp_path / "run", *SHORT)
    lines = result.metrics("train")
    assert lines[0]["learning_rate"] == 0.0
    assert result.losses() == pytest.approx([1.35] * 3, abs=0.06)
    assert result.metrics("eval")[-1]["loss"] == pytest.approx(1.35, abs=0.06)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("own_loop")
    (folder / "model.json").write_text(json.dumps(TINY))
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(4000)))
    flags = (
        f"--deepspeed_config ds_configs/zero2.json --config_name {folder}/model.json --train_file {folder}/text.txt "
        "--set bf16.enabled=false --block_size 32 --max_steps 5 --set scheduler.params.warmup_num_steps=2"
    )
    return folder, flags.split()


def test_own_loop_has_the_losses_of_train(tiny):
    """Two processes, the shipped ZeRO-2 in fp32; in bf16 two programs differ by 1e-6 already in the first loss."""
    folder, flags = tiny
    reference = train(folder / "reference", *flags, "--max_eval_batches", "1", launcher="torchrun", ranks=2).check()
    own = run(EXAMPLES / "own_loop.py", *flags, launcher="torchrun", ranks=2).check()
    lines = [json.loads(line) for line in own.stdout.splitlines() if line.startswith("{")]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines] == pytest.approx(reference.losses(), rel=1e-6)


def test_own_loop_is_short_and_its_command_is_there():
    source = (EXAMPLES / "own_loop.py").read_text()
    code = source.split('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    assert "torchrun --nproc_per_node 2 examples/own_loop.py" in commands(EXAMPLES / "README.md")[0]
