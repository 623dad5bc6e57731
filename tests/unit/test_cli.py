"""The `dstrain` command, in processes of its own where start-up counts."""

import json
import subprocess
import sys
import time
from importlib import import_module

import pytest

from dstrain import cli
from dstrain.config import load_config, resolve_config
from dstrain.config.removed import REMOVED, migrate
from tests.launch import ROOT, environment

ZERO2 = str(ROOT / "ds_configs" / "zero2.json")
HEAVY = ("torch", "deepspeed", "transformers", "numpy")


def dstrain(*argv):
    return subprocess.run(
        [sys.executable, "-m", "dstrain.cli", *argv], capture_output=True, text=True, cwd=ROOT, env=environment()
    )


def write(path, config):
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


@pytest.mark.ops  # measured when no build runs beside it
@pytest.mark.parametrize("action", ["check", "explain", "migrate"])
def test_starts_in_under_two_seconds_without_torch(action):
    program = (
        "import sys; from dstrain.cli import main; code = main(sys.argv[1:]);"
        f"print([name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, "config", action, ZERO2],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert time.monotonic() - start < 2
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_check_says_what_the_file_amounts_to():
    done = dstrain("config", "check", ZERO2, "--world_size", "2", "--set", "gradient_clipping=0")
    assert done.returncode == 0
    assert done.stderr == ""
    line = done.stdout.strip()
    assert "ZeRO-2, bf16, AdamW with WarmupCosineLR" in line
    assert "8 samples a step = 4 x 1 accumulated x 2 data-parallel" in line
    assert "no clipping" in line


def test_all_problems_are_one_line_each_and_exit_2(tmp_path):
    path = write(
        tmp_path / "bad.json",
        {"trian_batch_size": 8, "gradient_clipping": "1", "amp": {"enabled": True}, "zero_optimization": {"stge": 1}},
    )
    done = dstrain("config", "check", path)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 5
    assert all(line.startswith(f"dstrain: error: {path}: ") for line in lines)
    assert "did you mean 'train_batch_size'?" in lines[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["confg"], "invalid choice"),
        (["config"], "required"),
        (["config", "check"], "required: file"),
        (["config", "chek", ZERO2], "invalid choice"),
        (["config", "check", "none.json"], "no such file"),
        (["config", "check", ZERO2, "--world", "2"], "unrecognized"),
        (["config", "check", ZERO2, "--world_size", "0"], "write a positive number"),
        (["config", "check", ZERO2, "--world_size", "two"], "invalid int"),
        (["config", "check", ZERO2, "--world_size", "3"], "cannot be split over 3"),
        (["config", "check", ZERO2, "--set", "lr"], "write --set block.key=value"),
        (["config", "explain", ZERO2, "--set", "zero_optimization.stage=5"], "write one of 0, 1, 2, 3"),
        (["config", "migrate", "none.json"], "no such file"),
    ],
)
def test_mistakes(argv, words, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(line.startswith("dstrain: error: ") for line in err.splitlines())
    assert words in err
    assert "Traceback" not in err


def test_explain_lists_every_value_with_its_origin(capsys):
    assert cli.main(["config", "explain", ZERO2, "--world_size", "2", "--set", "optimizer.params.lr=1e-4"]) == 0
    table = capsys.readouterr().out
    rows = {line.split()[0]: line.split(maxsplit=2) for line in table.splitlines() if line}
    resolved = resolve_config(load_config(ZERO2), world_size=2)
    assert resolved.origins.keys() <= rows.keys()
    assert rows["optimizer.params.lr"][1:] == ["0.0001", "--set"]
    assert rows["gradient_clipping"][1:] == ["1.0", "default"]
    assert rows["bf16.enabled"][1:] == ["true", "user"]
    assert "norms, biases and 1-D parameters" in table


def test_explain_in_a_terminal_is_a_table(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["config", "explain", ZERO2]) == 0
    table = capsys.readouterr().out
    assert "[0.9, 0.95]" in table  # brackets are values and no markup
    assert "origin" in table


def test_explain_all_and_json(capsys):
    assert cli.main(["config", "explain", ZERO2, "--all"]) == 0
    table = capsys.readouterr().out
    assert "zero_optimization.reduce_bucket_size" in table
    assert cli.main(["config", "explain", ZERO2, "--json"]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert explained["deepspeed"]["zero_optimization"]["stage"] == 2
    assert explained["origins"]["zero_optimization.stage"] == "user"


OLD = {
    "train_batch_size": 8,
    "optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3, "freeze_step": 100, "max_grad_norm": 0.5}},
    "bfloat16": {"enabled": True},
    "zero_optimization": {"stage": 3, "cpu_offload": True, "prefetch_bucket_size": 1000, "mics_shard_size": 4},
    "elasticity": {"enabled": True, "max_train_batch_size": 64},
    "nebula": {},
    "progressive_layer_drop": {"enabled": True},
}


def test_migrate(tmp_path, capsys):
    path = write(tmp_path / "old.json", OLD)
    assert cli.main(["config", "check", path]) == 2
    assert cli.main(["config", "migrate", path]) == 0
    out, err = capsys.readouterr()
    new = json.loads(out)
    assert new["optimizer"] == {"type": "Adam", "params": {"lr": 1e-3}}
    assert new["gradient_clipping"] == 0.5
    assert new["bf16"] == {"enabled": True}
    assert new["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "stage3_prefetch_bucket_size": 1000,
    }
    assert not {"elasticity", "nebula", "progressive_layer_drop"} & new.keys()
    changes = [line for line in err.splitlines() if line.startswith("dstrain: " + path)]
    assert len(changes) == 10
    resolve_config(new, world_size=2)
    assert migrate(new) == (new, [])


def test_migrate_leaves_no_removed_key():
    config = {}
    for key in REMOVED:
        *blocks, last = key.split(".")
        block = config
        for name in blocks:
            block = block.setdefault(name, {})
        block[last] = {"enabled": True} if not blocks else True
    new, changes = migrate(config)
    assert len(changes) == len(REMOVED)
    again, more = migrate(new)
    assert (again, more) == (new, [])
    assert migrate({"zero_optimization": True})[0] == {"zero_optimization": {"stage": 1}}


def test_every_command_has_its_module_and_its_line_of_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, (module, line) in cli.COMMANDS.items():
        assert line in text
        found = import_module(module)
        assert callable(found.main if hasattr(found, "main") else found.run)
        assert name in text


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m dstrain.cli config explain {ZERO2} --all | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert "Traceback" not in done.stderr
