"""Swap folders: one for each rank of each run, deleted at its end or by the next start."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dstrain.config import resolve_config
from dstrain.errors import UserError
from dstrain.launch.swap import SwapFolders, remove_stale, swapped_bytes
from tests.launch import ROOT, environment


def config(path, *blocks, device="nvme"):
    offload = {name: {"device": device, "nvme_path": str(path)} for name in blocks}
    request = {"train_batch_size": 1, "zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}
    resolved = resolve_config(request, world_size=1)
    zero = {**resolved.deepspeed["zero_optimization"], **offload}
    return replace(resolved, deepspeed={**resolved.deepspeed, "zero_optimization": zero})


def test_two_runs_with_one_nvme_path_swap_apart(tmp_path):
    runs, asked = [SwapFolders(), SwapFolders()], config(tmp_path, "offload_optimizer", "offload_param")
    localized = [run.localize(asked).deepspeed["zero_optimization"] for run in runs]
    paths = [zero["offload_optimizer"]["nvme_path"] for zero in localized]
    assert paths == [zero["offload_param"]["nvme_path"] for zero in localized]
    assert len(set(paths)) == 2 and {str(p) for p in tmp_path.iterdir()} == set(paths)
    assert asked.deepspeed["zero_optimization"]["offload_param"]["nvme_path"] == str(tmp_path)
    assert remove_stale(tmp_path) == []
    for run in runs:
        run.close()
        run.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_rank_has_swapped_is_counted_once(tmp_path):
    with SwapFolders() as swap:
        resolved = swap.localize(config(tmp_path, "offload_optimizer", "offload_param"))
        assert swapped_bytes(resolved) == 0
        folder = Path(resolved.deepspeed["zero_optimization"]["offload_param"]["nvme_path"], "zero_stage_3")
        folder.mkdir()
        (folder / "a").write_bytes(b"x" * 2**20)
        assert swapped_bytes(resolved) == pytest.approx(2**20, rel=0.05)
    assert swapped_bytes(config(tmp_path, "offload_param", device="cpu")) == 0


def test_what_a_killed_rank_left_is_deleted_by_the_next_start(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from dstrain.launch.swap import SwapFolders
from tests.unit.test_swap import config
zero = SwapFolders().localize(config({str(tmp_path)!r}, "offload_optimizer")).deepspeed["zero_optimization"]
Path(zero["offload_optimizer"]["nvme_path"], "0.tensor.swp").write_text("x")
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    (tmp_path / "foreign").mkdir()
    swap = SwapFolders()
    swap.localize(config(tmp_path, "offload_optimizer"))
    assert not left.exists() and (tmp_path / "foreign").exists()
    swap.close()


def test_nothing_is_made_where_nothing_is_swapped_and_a_wrong_path_is_one_line(tmp_path):
    plain = config(tmp_path, "offload_param", device="cpu")
    assert SwapFolders().localize(plain) is plain
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be used \(Not a directory\): name a folder"):
        SwapFolders().localize(config(tmp_path / "file" / "x", "offload_param"))
