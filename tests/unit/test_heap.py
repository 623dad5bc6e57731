"""The heap of a rank on a CPU (dstrain/launch/heap.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain.launch.heap import heap_environment

NOWHERE = Path("/nonexistent")


def test_a_rank_on_a_cpu_gets_it_beside_what_else_the_user_tunes():
    assert heap_environment({"A": "b"}, NOWHERE)["GLIBC_TUNABLES"].startswith("glibc.malloc.tcache_count=0:")
    tuned = heap_environment({"GLIBC_TUNABLES": "glibc.rtld.nns=2"}, NOWHERE)["GLIBC_TUNABLES"]
    assert tuned.startswith("glibc.rtld.nns=2:glibc.malloc.")
    assert heap_environment({"GLIBC_TUNABLES": tuned}, NOWHERE) is None  # it has it: no second start


@pytest.mark.parametrize(
    "environment",
    [{"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, {"MALLOC_ARENA_MAX": "2"}, {"DS_ACCELERATOR": "cuda"}],
)
def test_a_heap_that_the_user_has_set_stays_and_so_does_an_accelerators(environment):
    assert heap_environment(environment, NOWHERE) is None


def test_an_accelerator_is_known_by_its_device_unless_the_cpu_is_asked_for(tmp_path):
    (tmp_path / "nvidia0").touch()
    assert heap_environment({}, tmp_path) is None
    assert heap_environment({"DS_ACCELERATOR": "cpu"}, tmp_path) is not None


def test_the_process_stays_the_same(tmp_path):
    """Its pid, its interpreter's flags and its arguments."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom dstrain.launch.heap import use_own_heap\n"
        "print('start', flush=True)\nuse_own_heap()\n"
        "print(os.getpid(), sys.flags.dont_write_bytecode, sys.argv[1:], sys.prefix, os.environ['GLIBC_TUNABLES'])\n"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    for name in [name for name in environment if name.startswith(("GLIBC_TUNABLES", "MALLOC_"))]:
        del environment[name]
    command = [sys.executable, "-B", str(script), "a b", "--c"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        lines = process.communicate()[0].splitlines()
    assert lines[:2] == ["start", "start"]
    assert lines[2].startswith(f"{process.pid} 1 ['a b', '--c'] {sys.prefix} glibc.malloc.")
