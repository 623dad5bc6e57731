"""A supervised start over a hostfile: on which hosts, with which command, and what it ends there.

The hosts are names that a fake `ssh` on the PATH knows: it runs the command here, or fails as ssh does.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from dstrain.errors import ExitCode, UserError
from dstrain.launch import fleet, processes, supervise, sweep
from dstrain.launch.words import find_run_folder, flag_value
from tests.distributed import parity
from tests.launch import ROOT

SSH = """#!/bin/sh
for last; do host=$command; command=$last; done
test -e {hosts}/$host || {{ echo "ssh: connect to host $host port 22: Connection refused" >&2; exit 255; }}
exec sh -c "$command"
"""


class Hosts:
    """What the fake ssh answers for, and the run that is to be started there."""

    def __init__(self, folder: Path):
        self.up, self.file, self.run, self.folder = folder / "up", folder / "hostfile", folder / "run", folder
        (folder / "bin").mkdir()
        self.up.mkdir()
        ssh = folder / "bin" / "ssh"
        ssh.write_text(SSH.format(hosts=self.up))
        ssh.chmod(0o755)
        self.file.write_text("host-a slots=1\nhost-b slots=1\nhost-c slots=2\n")
        self.answer("host-a", "host-b", "host-c")
        self.said: list[str] = []

    def answer(self, *names: str) -> None:
        for path in self.up.iterdir():
            path.unlink()
        for name in names:
            (self.up / name).touch()

    def fleet(self, config: dict, *launcher: str, smaller: dict | None = None) -> fleet.Fleet:
        (self.folder / "ds.json").write_text(json.dumps(config))
        flags = ["--deepspeed_config", str(self.folder / "ds.json"), "--config_name", "m.json"]
        command = ["deepspeed", "--hostfile", str(self.file), *launcher, "dstrain/train.py", *flags]
        command += ["--output_dir", str(self.run)]
        smaller_file = None
        if smaller is not None:
            smaller_file = str(self.folder / "smaller.json")
            Path(smaller_file).write_text(json.dumps(smaller))
        place = fleet.build_place(command, find_run_folder(command), self.said.append, smaller_file)
        assert isinstance(place, fleet.Fleet)
        return place

    def begin(self, global_batch: int) -> None:
        """The run has begun: from now on it may go on with fewer hosts."""
        self.run.mkdir()
        (self.run / "metrics.jsonl").touch()
        (self.run / "run.json").write_text(json.dumps({"identity": {"global_batch": global_batch}}))


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with mock.patch.object(fleet, "is_this_host", lambda name: name == "host-here"):
        yield Hosts(tmp_path)


def hostfile_of(command: list[str]) -> list[str]:
    return Path(command[command.index("--hostfile") + 1]).read_text().split("\n")[:-1]


ZERO, PIPE = parity.SGD | parity.zero(1), parity.SGD | {"pipeline": {"stages": 2}}


def test_a_start_takes_the_hosts_that_answer_and_takes_a_returned_one_back(hosts):
    place = hosts.fleet(ZERO, "--master_addr", "10.0.0.1")
    command = place.muster()
    assert hostfile_of(command) == ["host-a slots=1", "host-b slots=1", "host-c slots=2"]
    assert "--master_addr" in command and "--force_multi" not in command
    hosts.answer("host-b", "host-c")
    hosts.begin(8)
    command = place.muster()
    # 3 ranks do not divide the batch of 8
    assert hostfile_of(command) == ["host-b slots=1"] and "--force_multi" in command
    assert "--master_addr" not in command  # that was host-a's
    assert "starts 1 rank on host-b; not on host-c: degrees and batch" in hosts.said[-1]
    assert "without host-a (runs no ssh server" in hosts.said[-1]
    hosts.answer("host-a", "host-b", "host-c")
    assert len(hostfile_of(place.muster())) == 3
    hosts.answer()
    assert place.muster() is None


def test_a_smaller_configuration_is_for_hosts_that_cannot_hold_the_degrees(hosts):
    place = hosts.fleet(PIPE, smaller=ZERO)
    assert str(hosts.folder / "smaller.json") not in place.muster()
    hosts.answer("host-a")
    hosts.begin(8)
    command = place.muster()
    assert hostfile_of(command) == ["host-a slots=1"]
    assert command[-2:] == ["--deepspeed_config", str(hosts.folder / "smaller.json")]
    assert command.count("--deepspeed_config") == 1
    without = hosts.fleet(PIPE)
    without._mustered = True
    assert hostfile_of(without.muster()) == ["host-a slots=1"]  # the run itself says what is wrong


def test_a_new_run_needs_all_its_hosts(hosts):
    hosts.answer("host-a", "host-c")
    with pytest.raises(UserError, match="host-b runs no ssh server"):
        hosts.fleet(ZERO).muster()
    hosts.begin(8)
    assert len(hostfile_of(hosts.fleet(ZERO).muster())) == 1  # of a run that has begun: as many as fit


def test_the_processes_of_another_start_are_not_ended(hosts):
    script = hosts.folder / "train.py"
    script.write_text("import time; time.sleep(60)")
    with subprocess.Popen([sys.executable, str(script), "--output_dir", str(hosts.run)]) as other:
        try:
            with pytest.raises(UserError, match="is being trained on host-a, host-b, host-c: stop that run first"):
                hosts.fleet(ZERO).muster()
            assert other.poll() is None
        finally:
            other.kill()


@pytest.mark.parametrize("flag", ["--num_gpus=1", "--include=host-a", "--no_ssh"])
def test_what_else_chooses_hosts_is_refused(hosts, flag):
    with pytest.raises(UserError, match="cannot follow a lost host"):
        hosts.fleet(ZERO, flag)


def test_a_smaller_configuration_needs_hosts(tmp_path):
    with pytest.raises(UserError, match="several hosts"):
        fleet.build_place(["torchrun", "train.py"], tmp_path, print, "ds.json")


def test_hosts_that_are_left_behind_are_not_waited_for(hosts):
    place = hosts.fleet(ZERO)
    place._hosts = fleet.read_hostfile(hosts.file)
    now = time.monotonic()
    with mock.patch.object(processes, "names") as names, mock.patch.object(fleet.time, "monotonic") as clock:
        for seconds, running, expected in (
            (10, ["deepspeed", "pdsh", "ssh", "ssh", "ssh"], False),
            (20, ["deepspeed", "pdsh.bin", "ssh", "ssh"], False),
            (35, ["deepspeed", "pdsh.bin", "ssh"], False),
            (51, ["deepspeed", "pdsh.bin", "ssh"], True),
        ):
            names.return_value, clock.return_value = running, now + seconds
            assert place.is_left_behind() is expected, seconds


@pytest.mark.ops  # a supervisor ends all below its process, a build of ops too
def test_without_any_host_the_supervisor_gives_up(hosts, capsys):
    hosts.begin(8)
    hosts.answer()
    with mock.patch.object(supervise, "NO_HOST_S", 0.0), mock.patch.object(supervise, "_ASK_AGAIN_S", 0.1):
        supervisor = supervise.Supervisor(hosts.fleet(ZERO), hosts.run, max_restarts=3)
        assert supervisor.run() == ExitCode.USER_ERROR
    assert "no host of the hostfile has answered" in capsys.readouterr().err


RUN = Path("/data/run")


@pytest.mark.parametrize(
    ("words", "role"),
    [
        ("python -u dstrain/train.py --local_rank=0 --output_dir /data/run", "rank"),
        ("python -u /x/train.py --output_dir=/data/run", "rank"),
        ("python -u train.py --output_dir run", "rank"),  # relative to its own folder
        ("python -u -m deepspeed.launcher.launch --world_info=e train.py --output_dir /data/run", "launcher"),
        ("python -u train.py --output_dir /data/run2", None),
        ("python -u train.py --output_dir other/run", None),
        ("python -u other.py --output_dir /data/run", None),
        ("python -u -m deepspeed.launcher.launch --world_info=e train.py --output_dir /data/other", None),
        ("python /venv/bin/deepspeed --hostfile h train.py --output_dir /data/run", None),
        ("python /venv/bin/dstrain launch -- deepspeed train.py --output_dir /data/run", None),
        ("pdsh -S -w a,b python -u -m deepspeed.launcher.launch train.py --output_dir /data/run", None),
        ("vim", None),
    ],
)
def test_which_processes_are_of_a_run(words, role):
    assert sweep.role_of(words.split(), Path("/data"), "train.py", RUN) == role


def test_a_sweep_ends_what_is_the_runs_and_nothing_else(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import time; time.sleep(60)")
    command = [sys.executable, str(script), "--output_dir"]
    with subprocess.Popen([*command, "run"], cwd=tmp_path) as rank, subprocess.Popen([*command, "run2"]) as other:
        try:
            request = {"script": "train.py", "output_dir": str(tmp_path / "run")}
            asked = [sys.executable, "-m", "dstrain.launch.sweep"]
            look = subprocess.run(
                asked, input=json.dumps(request), capture_output=True, text=True, cwd=ROOT, check=True
            )
            assert json.loads(look.stdout)["found"] == 1 and rank.poll() is None
            left = sweep.sweep("train.py", str(tmp_path / "run"), 0.0, [p.name for p in processes.shared_memory()])
            assert (left.found, left.killed, left.removed) == (1, 1, [])
            assert rank.wait(5) == -9 and other.poll() is None
        finally:
            rank.kill()
            other.kill()


def test_a_sweep_wakes_a_rank_that_was_stopped(tmp_path):
    """It has been told to end, and could not hear it."""
    script = tmp_path / "train.py"
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print(flush=True); time.sleep(60)"
    script.write_text(code)
    command = [sys.executable, str(script), "--output_dir", "run"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as rank:
        try:
            assert rank.stdout is not None and rank.stdout.readline()
            rank.send_signal(signal.SIGSTOP)
            rank.terminate()
            left = sweep.sweep("train.py", str(tmp_path / "run"), 30.0)
            assert (left.found, left.killed, rank.wait(5)) == (1, 0, 75)
        finally:
            rank.kill()


def test_ranks_below_no_launcher_are_waited_for(tmp_path):
    """Ray's: a driver that is killed leaves them to save and to say why they end."""
    hold = (
        "import sys; from pathlib import Path; from dstrain.run_lock import RunLock; lock = RunLock(Path(sys.argv[1]))"
    )
    hold += "; lock.take(); print(flush=True); sys.stdin.read(); lock.release()"
    place = fleet.OneHost([], tmp_path, print)
    supervisor = supervise.Supervisor(place, tmp_path, max_restarts=1)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT, **pipes) as rank:
        assert rank.stdin is not None and rank.stdout is not None and rank.stdout.readline()
        supervisor._wait_for_ranks_elsewhere(2)  # it was refused since they are there
        assert supervisor.lock.is_held
        threading.Timer(0.3, rank.stdin.close).start()
        supervisor._wait_for_ranks_elsewhere(-signal.SIGKILL)
        assert not supervisor.lock.is_held


def test_the_runner_kills_by_pattern():
    """Why `deepspeed` over pdsh must not get a SIGTERM: the pattern holds neither script nor run folder."""
    from deepspeed.launcher import multinode_runner, runner

    args = runner.parse_args(["--master_addr", "a", "train.py", "--output_dir", "/data/run"])
    _, kill_command, _ = multinode_runner.PDSHRunner(args, "e30=").get_cmd({}, {"a": [0], "b": [0]})
    assert kill_command[-2] == "pkill -f "
    assert kill_command[-1].endswith("deepspeed.launcher.launc") and "/data/run" not in kill_command[-1]


def test_the_last_value_of_a_flag_counts():
    assert flag_value([], "--a") is None and flag_value(["--b", "1"], "--a") is None
    assert flag_value(["--a", "1", "-a=2", "--a=3"], "-a", "--a") == "3"
    assert flag_value(["--a"], "--a") == ""
