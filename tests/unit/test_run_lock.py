"""The lock of a run folder: refused while its holder lives, free when it was killed, patient with crashed hosts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dstrain.errors import UserError
from dstrain.parallel import check_master_port
from dstrain.run_folder import RunFolder
from dstrain.run_lock import RunLock
from tests.launch import ROOT

TAKES = "import sys; from pathlib import Path; from dstrain.run_lock import RunLock; RunLock(Path(sys.argv[1])).take()"
LOCKS = "import fcntl, sys; file = open(sys.argv[1] + '/lock', 'r+'); fcntl.lockf(file, fcntl.LOCK_EX)"


@contextmanager
def held(folder: Path, how: str = TAKES) -> Iterator[subprocess.Popen]:
    """Another process holds the folder."""
    waits = f"{how}; print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", waits, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()


def test_a_living_holder_is_named_and_a_killed_one_is_no_obstacle(tmp_path):
    lock = RunLock(tmp_path / "run")
    lock.wait_until_free()
    with held(lock.folder) as holder:
        for attempt in (lambda: lock.wait_until_free(patience_s=0.2), lock.take):
            with pytest.raises(UserError, match=f"is in use by process {holder.pid} on {os.uname().nodename} since"):
                attempt()
        assert lock.is_held
        os.kill(holder.pid, signal.SIGKILL)
        lock.wait_until_free(patience_s=5.0)
    assert lock.path.exists()
    lock.take()
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    lock.release()


def test_a_holder_that_is_about_to_end_is_waited_for(tmp_path):
    with held(tmp_path) as holder:
        subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {holder.pid}"])
        RunLock(tmp_path).wait_until_free(patience_s=20.0)


def test_what_a_lock_leaves(tmp_path):
    with RunLock(tmp_path / "new") as lock:
        lock.take()
    assert not (tmp_path / "new").exists()
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        (tmp_path / "run" / "run.json").write_text("{}")
        RunFolder(lock.folder).clear()
        assert [path.name for path in lock.folder.iterdir()] == ["lock"]
        (tmp_path / "run" / "run.json").write_text("{}")
    assert [path.name for path in lock.folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize("beats", [True, False])
def test_a_lock_of_another_host_is_refused_when_it_is_touched(beats, tmp_path):
    """A file server keeps the lock of a host that crashed; only a living rank touches the file."""
    (tmp_path / "lock").write_text(json.dumps({"host": "node7", "pid": 1, "since": "noon", "boot_id": "another"}))
    with held(tmp_path, LOCKS):
        if beats:
            subprocess.Popen(["sh", "-c", f"sleep 0.5; touch {tmp_path}/lock"])
        start = time.monotonic()
        with pytest.raises(UserError, match="process 1 on node7 since noon"):
            RunLock(tmp_path).wait_until_free(patience_s=0.1, crashed_host_s=60.0 if beats else 1.0)
        assert (time.monotonic() - start >= 1.0) != beats


def test_the_port_of_another_run_is_refused_on_rank_0(monkeypatch):
    import socket

    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv("RANK", "1")
        check_master_port()
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match=f"port {port}, where the ranks.*Add --master_port"):
            check_master_port()
    check_master_port()
