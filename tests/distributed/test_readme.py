"""Every command of the README is run: the starts on a tiny model, and they give the same losses."""

import json
import re

import pytest

from tests.launch import ROOT, run_command

README = (ROOT / "README.md").read_text()
STARTS = re.findall(r"^\| `((?:deepspeed|torchrun|accelerate|python)\b[^`]*)` \|", README, re.M)
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if "=" not in line[:6]
]
MAKE_TARGETS = re.findall(r"`?\bmake ([a-z]+)\b", README)
TINY = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def test_the_readme_is_short_and_all_its_commands_are_found():
    assert README.count("\n") <= 250
    assert (len(STARTS), len(COMMANDS)) == (7, 2)
    assert set(MAKE_TARGETS) == {"train", "test"}


def test_every_linked_file_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) >= 14
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("target", ["train", "test", "lint", "env"])
def test_make_has_the_target(target):
    run_command(["make", "-n", target]).check()


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    run_command(["bash", "-c", command]).check()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Flags of a run of three steps in fp32, and the losses of the first start of them."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "llama.json").write_text(json.dumps(TINY))
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(4000)))
    flags = (
        "--deepspeed_config ds_configs/zero2.json --set bf16.enabled=false --set train_batch_size=4 --block_size 32 "
        f"--config_name {folder}/llama.json --train_file {folder}/text.txt --max_steps 3 --max_eval_batches 2"
    )
    return flags, folder, {}


@pytest.mark.parametrize("command", STARTS)
def test_start(command, tiny):
    if command == STARTS[0]:
        pytest.skip("asks ssh to localhost")
    flags, folder, losses = tiny
    run_dir = folder / str(STARTS.index(command))
    run_command(
        ["bash", "-c", command], env={"FLAGS": f"{flags} --output_dir {run_dir}"}, run_dir=run_dir, timeout_s=200
    ).check()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [row["loss"] for row in rows if row["kind"] in ("train", "eval")]
    assert len(found) == 4
    assert found == pytest.approx(losses.setdefault("first", found), rel=1e-5)
