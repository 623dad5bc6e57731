"""Every way to start a run (DESIGN section 3): one tiny run, the same losses, one writer, a quiet screen."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import PORT, ROOT, TRAIN, Result, environment, run_command

STEPS = 4
MODEL = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
CONFIG = {
    "train_batch_size": 4,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 2},
}
ACCELERATE_CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {{deepspeed_config_file: {folder}/ds.json, zero3_init_flag: false}}
machine_rank: 0
num_machines: 1
num_processes: 2
mixed_precision: 'no'
use_cpu: true
"""
ACCELERATE = ("accelerate", "launch", "--main_process_port", str(PORT))
ACCELERATE_2 = (*ACCELERATE, *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"))
OURS = "--deepspeed_config {folder}/ds.json"


# name -> (launcher's part of the command line, flags of ours beside the common ones, processes)
STARTS = {
    "python": ((sys.executable,), OURS, 1),
    "torchrun": (("torchrun", "--nproc_per_node", "2", "--master_port", str(PORT)), f"{OURS} --local_rank 0", 2),
    "deepspeed_hostfile": (
        tuple(
            f"deepspeed --hostfile {ROOT}/hostfile --no_ssh_check --master_addr 127.0.0.1 --master_port {PORT}".split()
        ),
        OURS,
        2,
    ),
    "deepspeed_num_gpus": (("deepspeed", "--num_gpus", "2", "--master_port", str(PORT)), OURS, 2),
    "accelerate_deepspeed_file": (
        (*ACCELERATE_2, "--num_processes", "2", "--use_deepspeed", "--deepspeed_config_file", "{folder}/ds.json"),
        "",
        2,
    ),
    "accelerate_config_file": ((*ACCELERATE, "--config_file", "{folder}/accelerate.yaml"), "", 2),
    "accelerate_alone": ((*ACCELERATE_2, "--num_processes", "2"), OURS, 1),
}
ONE_PROCESS = "accelerate started one plain process"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "ds.json").write_text(json.dumps(CONFIG))
    (folder / "accelerate.yaml").write_text(ACCELERATE_CONFIG.format(folder=folder))
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(4000)))
    return folder


def start(folder: Path, name: str, *more: str, run_name: str = "") -> Result:
    """Start from the folder, not from the checkout, with paths relative to it."""
    run_name = run_name or name
    head, flags, _ = STARTS[name]
    common = f"--config_name model.json --train_file text.txt --block_size 32 --max_steps {STEPS} --max_eval_batches 2"
    command = [
        *(part.format(folder=folder) for part in head),
        *(str(TRAIN), "--output_dir", run_name),
        *flags.format(folder=folder).split(),
        *common.split(),
        *more,
    ]
    env = {"HF_HOME": str(folder / "hf")}  # a default_config.yaml of this user's accelerate must not decide
    return run_command(command, run_dir=folder / run_name, cwd=folder, env=env, timeout_s=120)


@pytest.fixture(scope="module")
def plain_losses(folder) -> list[float]:
    return losses(start(folder, "python").check())


def losses(result: Result) -> list[float]:
    return [line["loss"] for line in result.metrics() if line["kind"] in ("train", "eval")]


@pytest.mark.parametrize("name", list(STARTS)[1:])
def test_start(name, folder, plain_losses):
    result = start(folder, name).check()
    world_size = STARTS[name][2]
    assert losses(result) == pytest.approx(plain_losses, rel=1e-6)
    assert [line["step"] for line in result.metrics("train")] == list(range(1, STEPS + 1))
    assert [line["exit_code"] for line in result.metrics("summary")] == [0]
    assert result.run_json()["world"]["world_size"] == world_size
    assert {path.name for path in (result.run_dir / "logs").iterdir()} >= {f"rank_{r}.log" for r in range(world_size)}
    assert (ONE_PROCESS in result.stdout) == (name == "accelerate_alone")
    steps = re.findall(rf"^step +(\d+)/{STEPS}  loss", result.stdout, re.M)
    assert steps == [str(i) for i in range(1, STEPS + 1)]
    assert not foreign_lines(result.stdout)


def foreign_lines(stdout: str) -> list[str]:
    """Lines before the loss curve that are neither ours nor of the deepspeed launcher, which has a time in front."""
    ours = re.compile(rf"^(step +\d+(/{STEPS})?[: ]|{ONE_PROCESS}|\[20\d\d-\d\d-\d\d )")
    before = stdout[: stdout.rindex("held-out loss")]
    return [line for line in before.splitlines() if line.strip() and not ours.match(line)]


@pytest.mark.parametrize(
    ("name", "exit_code"),
    [("torchrun", 1), ("deepspeed_hostfile", 2), ("accelerate_deepspeed_file", 1)],
)
def test_a_mistake_is_said_once_and_nothing_is_written(name, exit_code, folder):
    """deepspeed returns our code; torchrun and accelerate return 1 for any failure."""
    result = start(folder, name, "--max_step", "3", run_name="wrong").check(exit_code)
    errors = [line for line in result.stderr.splitlines() if line.startswith("dstrain: error:")]
    assert len(errors) == 1 and "did you mean --max_steps?" in errors[0]
    assert 'File "' + str(ROOT / "dstrain") not in result.stderr
    assert not (folder / "wrong").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max_step", "3"), "did you mean --max_steps?"),
        (("--deepspeed_config", "ds.json", "--config_name", "x.json", "--set", "zero_optimization.stage=7"), "stage"),
    ],
    ids=["flag", "json"],
)
def test_a_mistake_costs_no_import_of_torch(flags, words, folder):
    """Two seconds, counted as processor time: the wall clock of a busy machine says little."""
    command = [sys.executable, "-X", "importtime", str(TRAIN), *flags]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=folder, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 2 and words in done.stderr
    assert "dstrain.arguments" in imported and not imported & {"torch", "deepspeed", "transformers", "numpy"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
