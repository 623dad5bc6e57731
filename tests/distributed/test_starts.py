"""Every start of the README's table (DESIGN section 3): one tiny run, the same losses, one writer, a quiet screen."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.parity import thinned
from tests.launch import ROOT, TINY_LLAMA, TRAIN, Result, children_cpu_s, environment, run_command

STEPS = 4
ACCELERATE_CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {{deepspeed_config_file: {root}/ds_configs/zero2.json, zero3_init_flag: false}}
machine_rank: 0
num_machines: 1
num_processes: 2
mixed_precision: 'no'
use_cpu: true
"""
README = (ROOT / "README.md").read_text()
# Every start in README's table, and accelerate with a file of its own; `deepspeed --hostfile` alone asks ssh.
COMMANDS = re.findall(
    r"^\| `((?:deepspeed|torchrun|accelerate|python)\b[^`]* dstrain/train\.py[^`]*)` \|", README, re.M
)
CONFIG_FILE = "accelerate launch --config_file $FOLDER/accelerate.yaml dstrain/train.py $FLAGS"
STARTS = [*COMMANDS[1:], CONFIG_FILE]
TORCHRUN, HOSTFILE, PYTHON = (
    next(c for c in STARTS if c.startswith(head)) for head in ("torchrun", "deepspeed --hostfile", "python")
)
LAUNCHED = [command for command in STARTS if command != PYTHON]
ACCELERATE = next(c for c in STARTS if "--deepspeed_config_file" in c)
ONE_PROCESS = "accelerate started one plain process"


def test_readme_names_every_start():
    assert len(COMMANDS) == 7 and COMMANDS[0].startswith("deepspeed --hostfile hostfile dstrain/train.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    (folder / "model.json").write_text(json.dumps(TINY_LLAMA))
    (folder / "accelerate.yaml").write_text(ACCELERATE_CONFIG.format(root=ROOT))
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(4000)))
    return folder


def start(folder: Path, command: str, *more: str, run_name: str = "") -> Result:
    run_dir = folder / (run_name or str(STARTS.index(command)))
    own_file = "" if "--use_deepspeed" in command or "--config_file" in command else "ds_configs/zero2.json"
    flags = [
        *(("--deepspeed_config", own_file) if own_file else ()),
        *("--set", "bf16.enabled=false", "--set", "train_batch_size=4", "--local_rank", "0"),
        *("--config_name", f"{folder}/model.json", "--train_file", f"{folder}/text.txt", "--block_size", "32"),
        *("--max_steps", str(STEPS), "--max_eval_batches", "2", "--output_dir", str(run_dir), *more),
    ]
    # HF_HOME: a default_config.yaml of this user's accelerate must not decide
    env = {"HF_HOME": str(folder / "hf"), "FLAGS": " ".join(flags), "FOLDER": str(folder)}
    return run_command(["bash", "-c", command], run_dir=run_dir, env=env, timeout_s=120)


@pytest.fixture(scope="module")
def plain_losses(folder) -> list[float]:
    return losses(start(folder, PYTHON, run_name="plain").check())


def losses(result: Result) -> list[float]:
    return [line["loss"] for line in result.metrics() if line["kind"] in ("train", "eval")]


@pytest.mark.parametrize("command", thinned(LAUNCHED, *(c for c in LAUNCHED if c != CONFIG_FILE)))
def test_start(command, folder, plain_losses):
    result = start(folder, command).check()
    alone = command.startswith("accelerate launch dstrain")
    assert losses(result) == pytest.approx(plain_losses, rel=1e-6)
    assert [line["step"] for line in result.metrics("train")] == list(range(1, STEPS + 1))
    assert [line["exit_code"] for line in result.metrics("summary")] == [0]
    world_size = 1 if alone else 2
    assert result.run_json()["world"]["world_size"] == world_size
    assert {path.name for path in (result.run_dir / "logs").iterdir()} >= {f"rank_{r}.log" for r in range(world_size)}
    assert (ONE_PROCESS in result.stdout) == alone
    steps = re.findall(rf"^step +(\d+)/{STEPS}  loss", result.stdout, re.M)
    assert steps == [str(i) for i in range(1, STEPS + 1)]
    assert not foreign_lines(result.stdout)
    assert "no summary" not in (result.run_dir / "report.html").read_text()


def foreign_lines(stdout: str) -> list[str]:
    """Lines before the loss curve that are neither ours nor of the deepspeed launcher, which has a time in front."""
    ours = re.compile(rf"^(expected: |data: |step +\d+(/{STEPS})?[: ]|{ONE_PROCESS}|\[20\d\d-\d\d-\d\d )")
    before = stdout[: stdout.rindex("held-out loss")]
    return [line for line in before.splitlines() if line.strip() and not ours.match(line)]


@pytest.mark.parametrize(
    ("command", "exit_code"),
    [(TORCHRUN, 1), (HOSTFILE, 2), (ACCELERATE, 1)],
    ids=["torchrun", "deepspeed", "accelerate"],
)
def test_a_mistake_is_said_once_and_nothing_is_written(command, exit_code, folder):
    """deepspeed returns our code; torchrun and accelerate return 1 for any failure."""
    result = start(folder, command, "--max_step", "3", run_name="wrong").check(exit_code)
    errors = [line for line in result.stderr.splitlines() if line.startswith("dstrain: error:")]
    assert len(errors) == 1 and "did you mean --max_steps?" in errors[0]
    assert 'File "' + str(ROOT / "dstrain") not in result.stderr
    assert not (folder / "wrong").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max_step", "3"), "did you mean --max_steps?"),
        (("--deepspeed_config", str(ROOT / "ds_configs/zero2.json"), "--set", "zero_optimization.stage=7"), "stage"),
    ],
    ids=["flag", "json"],
)
def test_a_mistake_costs_no_import_of_torch(flags, words, folder):
    """Two seconds of processor time."""
    command = [sys.executable, "-X", "importtime", str(TRAIN), *flags]
    before = children_cpu_s()
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=folder, timeout=60)
    seconds = children_cpu_s() - before
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 2 and words in done.stderr
    assert "dstrain.arguments" in imported and not imported & {"torch", "deepspeed", "transformers", "numpy"}
    assert seconds < 2.0
