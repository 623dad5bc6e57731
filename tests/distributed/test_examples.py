"""The examples do what they say: every command of their READMEs runs (a few steps), and their numbers are true."""

import json
import math
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests import forked
from tests.distributed.parity import thinned
from tests.launch import ROOT, TINY_LLAMA, Result, run, run_command

EXAMPLES = ROOT / "examples"
READMES = sorted(EXAMPLES.glob("**/README.md"))


def commands(readme: Path) -> list[str]:
    """The lines of a README's sh blocks, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", readme.read_text(), re.M | re.S)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_every_recipe_has_its_commands():
    assert {readme.parent.name: len(commands(readme)) for readme in READMES} == {
        "chat": 5,
        "examples": 1,
        "gsm8k": 2,
        "imdb": 3,
        "shakespeare": 2,
        "stories": 1,
        "summaries": 4,
        "translation": 3,
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


def rows_of(name: str, count: int) -> list[dict]:
    """Rows with the columns of the data that a recipe is for."""
    if name == "imdb":
        words = ("dull and slow", "fine and moving")
        return [{"text": f"Film {i}: {words[i % 2]}. " * (1 + i % 40), "label": i % 2} for i in range(count)]
    return [{"de": f"{i} plus {i} macht {2 * i}.", "en": f"{i} and {i} is {2 * i}."} for i in range(count)]


@pytest.mark.parametrize("name", thinned(["imdb", "translation"], "imdb"))
def test_rows_to_a_figure(name, tmp_path):
    """The three commands of a recipe, on rows of the same columns."""
    learn, start, judge = commands(EXAMPLES / name / "README.md")
    changes = {f"runs/{name}_tokenizer": f"{tmp_path}/tokenizer", "8192": "300", "6000": "300"}
    for command in (learn, judge):
        for word in shlex.split(command):
            if word.endswith(".parquet"):
                changes[word] = f"{tmp_path}/{word}"
                pq.write_table(pa.Table.from_pylist(rows_of(name, 200)), changes[word])
            if word.startswith(f"runs/{name}/"):
                changes[word] = word.replace(f"runs/{name}", f"{tmp_path}/run")

    def run_changed(command: str, *more: str) -> Result:
        return run_command([changes.get(w, w) for w in shlex.split(command)] + list(more), run_dir=tmp_path / "run")

    run_changed(learn).check()
    files = yaml.safe_load((EXAMPLES / name / "flags.yaml").read_text())
    more = ["--tokenizer_name", f"{tmp_path}/tokenizer", "--output_dir", f"{tmp_path}/run", *SHORT]
    for flag in ("train_file", "validation_file"):
        if flag in files:
            pq.write_table(pa.Table.from_pylist(rows_of(name, 200)), tmp_path / files[flag])
            more += [f"--{flag}", str(tmp_path / files[flag])]
    epochs = {"imdb": "6", "translation": "120"}[name]  # short rows: nearly three passes a step
    run_changed(start, *more, "--num_train_epochs", epochs).check()
    run_changed(judge).check()
    found = json.loads((tmp_path / "run" / "test.json").read_text())["metrics"]
    assert found["accuracy"] > 0.9 if name == "imdb" else found["chrf"] > 10


def test_imdb_reached_what_its_readme_says():
    """result.json is what the last command of the README wrote."""
    found = json.loads((EXAMPLES / "imdb/result.json").read_text())
    text = (EXAMPLES / "imdb/README.md").read_text()
    assert {label: facts["rows"] for label, facts in found["metrics"]["by_label"].items()} == {
        " negative": 12_500,
        " positive": 12_500,
    }
    assert all(f"{found['metrics'][key]:.2%}".replace("%", " %") in text for key in ("accuracy", "recall", "f1"))


def test_translation_reached_what_its_readme_says():
    found = json.loads((EXAMPLES / "translation/result.json").read_text())
    text = (EXAMPLES / "translation/README.md").read_text()
    assert found["settings"]["num_rows"] == 1000
    assert f"BLEU {found['metrics']['bleu']:.1f}, chrF {found['metrics']['chrf']:.1f}" in text


def test_summaries_reached_what_its_readme_says():
    found = json.loads((EXAMPLES / "summaries/result.json").read_text())
    text = (EXAMPLES / "summaries/README.md").read_text()
    assert found["settings"]["num_rows"] == 354 and "the 354 rows" in text
    scores = (found["metrics"][name] for name in ("rouge1", "rouge2", "rougeL"))
    assert f"| the model | {' | '.join(f'{score:.1f}' for score in scores)} |" in text


def test_chat_reached_what_its_readme_says():
    before, after = (json.loads((EXAMPLES / f"chat/{name}.json").read_text()) for name in ("before", "result"))
    assert before["data"] == after["data"] and before["settings"]["tokens"] == after["settings"]["tokens"] == 1680
    losses = [found["metrics"]["loss"] for found in (after, before)]
    text = " ".join((EXAMPLES / "chat/README.md").read_text().split())
    assert "a loss of {:.4f} on the 1,680 tokens of their answers, {:.4f} before".format(*losses) in text


def test_gsm8k_reached_what_its_readme_says():
    found = json.loads((EXAMPLES / "gsm8k/result.json").read_text())
    assert found["settings"]["num_rows"] == 1319
    right = round(found["metrics"]["exact_match"] * 1319)
    text = (EXAMPLES / "gsm8k/README.md").read_text()
    assert f"{right} of 1,319 answers are right ({right / 1319:.1%})".replace("%", " %") in text


def test_the_texts_of_the_summaries_are_on_one_side(shared_data, tmp_path):
    """Each stands under several templates; and the lead that the README tells of is that of these rows."""
    words = shlex.split(commands(EXAMPLES / "summaries/README.md")[0])
    run_command([*words[:2], str(shared_data / words[2]), str(tmp_path)]).check()
    sides = [
        [json.loads(line) for line in (tmp_path / f"{side}.jsonl").read_text().splitlines()]
        for side in ("train", "validation", "test")
    ]
    texts = [{row["text"] for row in side} for side in sides]
    assert [len(side) for side in sides] == [1914, 132, 354] and [len(side) for side in texts] == [306, 22, 57]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    lead = json.loads(run_command(["python", "examples/summaries/lead.py", str(tmp_path)]).check().stdout)
    row = " | ".join(f"{lead[name]:.1f}" for name in ("rouge1", "rouge2", "rougeL"))
    assert f"| the first words | {row} |" in (EXAMPLES / "summaries/README.md").read_text()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["chat", "gsm8k", "summaries"])
def test_fine_tuning_to_a_figure(name, shared_data, tmp_path):
    """All commands of a recipe on its own data with the smallest real model, a few steps and 20 rows to judge."""
    flags = yaml.safe_load((EXAMPLES / name / "flags.yaml").read_text())

    def moved(word: str) -> str:
        if word == "stories15M-hf":
            return str(shared_data / "models/stories260K-hf")
        if word.startswith("runs/"):
            return f"{tmp_path}/{word.removeprefix('runs/')}"
        return str(shared_data / word) if (shared_data / word).is_file() else word

    places = ("model_name_or_path", "train_file", "validation_file", "output_dir")
    more = [word for flag in places if flag in flags for word in (f"--{flag}", moved(flags[flag]))]
    for command in commands(EXAMPLES / name / "README.md"):
        words = [moved(word) for word in shlex.split(command)]
        if "dstrain/train.py" in words:
            words += [*more, *SHORT, "--num_train_epochs", "0.1"]
        if "evaluate" in words:
            words += ["--max_eval_samples", "20"]
        run_command(words, run_dir=tmp_path / name).check()
    found = json.loads((tmp_path / name / "test.json").read_text())
    figure = {"chat": "loss", "gsm8k": "exact_match", "summaries": "rouge1"}[name]
    assert math.isfinite(found["metrics"][figure]) and found["model"] == f"{tmp_path}/{name}/export"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("own_loop")
    (folder / "model.json").write_text(json.dumps(TINY_LLAMA))
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(4000)))
    flags = (
        f"--deepspeed_config ds_configs/zero2.json --config_name {folder}/model.json --train_file {folder}/text.txt "
        "--set bf16.enabled=false --block_size 32 --max_steps 5 --set scheduler.params.warmup_num_steps=2"
    )
    return folder, flags.split()


def test_own_loop_has_the_losses_of_train(tiny):
    """Two processes, the shipped ZeRO-2 in fp32; in bf16 two programs differ by 1e-6 already in the first loss."""
    folder, flags = tiny
    reference = forked.train(folder / "reference", *flags, "--max_eval_batches", "1", ranks=2).check()
    own = run(EXAMPLES / "own_loop.py", *flags, launcher="torchrun", ranks=2).check()
    lines = [json.loads(line) for line in own.stdout.splitlines() if line.startswith("{")]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines] == pytest.approx(reference.losses(), rel=1e-6)


def test_own_loop_is_short_and_its_command_is_there():
    source = (EXAMPLES / "own_loop.py").read_text()
    code = source.split('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    assert "torchrun --nproc_per_node 2 examples/own_loop.py" in commands(EXAMPLES / "README.md")[0]
