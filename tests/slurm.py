"""A Slurm of some hosts, from Debian's packages; the last host is the controller and the login node.

    with build_slurm(tmp_path) as slurm:                       # node1 and node2; node3 has the controller
        job = slurm.submit(folder, ["--max_restarts", "1"], flags)
        job.wait_for_end()

Root, namespaces (`tests.cluster`) and `apt-get install slurmctld slurmd munge` are needed. What it does when a run on
it is hit: `tests.slurm_faults`.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.launch.ops import extensions_root
from tests import cluster, launch
from tests.cluster import Cluster
from tests.launch import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
_CONF = """
ClusterName=dstrain
SlurmctldHost={controller}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_wait_s}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
ReturnToService=2
SlurmdTimeout={slurmd_timeout_s}
KillWait=10
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Job:
    """A submitted run. folder: where it was submitted."""

    slurm: "Slurm"
    number: int
    folder: Path

    @property
    def log(self) -> str:
        logs = list(self.folder.glob(f"*-{self.number}.out"))
        return logs[0].read_text() if logs else ""

    @property
    def state(self) -> str:
        shown = self.slurm.command("scontrol", "show", "job", str(self.number))
        match = re.search(r"JobState=(\w+)", shown)
        return match[1] if match else "GONE"

    @property
    def codes(self) -> list[int]:
        """Of the starts that have ended, as the batch script saw them."""
        return [int(code) for code in re.findall(r"^exit code (\d+) ", self.log, re.M)]

    def wait(self, ready: Callable[[], Any], timeout_s: float) -> None:
        """Until `ready()`; fails with the job's log."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert time.monotonic() < deadline, f"{self.state} after {timeout_s} s\n{self.log[-4000:]}"
            time.sleep(0.2)

    def start_now(self) -> None:
        """Cut short what Slurm lets a requeued job wait, but not all of it: a host that has just revoked the job's
        credential starts nothing for it."""
        time.sleep(5)
        self.slurm.command("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    @property
    def has_ended(self) -> bool:
        return self.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def wait_for_end(self, timeout_s: float = 300.0) -> str:
        self.wait(lambda: self.has_ended, timeout_s)
        return self.state


@dataclass
class Slurm:
    """A Slurm on the hosts of `hosts`. requeue_wait_s: what a requeued job waits at least (Slurm's default: 120).

    slurmd_timeout_s: until a silent host is down (Slurm's default: 300).
    """

    hosts: Cluster
    folder: Path
    requeue_wait_s: int = 120
    slurmd_timeout_s: int = 30

    @property
    def nodes(self) -> list[str]:
        """The hosts that compute."""
        return self.hosts.names[:-1]

    @property
    def controller(self) -> str:
        return self.hosts.names[-1]

    @property
    def env(self) -> dict[str, str]:
        """What a user has in the shell that submits."""
        return user_environment() | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def command(self, *words: str, cwd: Path = ROOT) -> str:
        done = self.hosts.run(self.controller, ["env", f"--chdir={cwd}", *words], env=self.env)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, folder: Path, own: Sequence[str], flags: Sequence[str], script: Path = launch.TRAIN) -> Job:
        """`dstrain launch --to slurm own -- script flags`, on two hosts without GPUs, from `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        words = ["dstrain", "launch", "--to", "slurm", "--num_nodes", "2", "--use_cpu", *own]
        said = self.command(*words, "--", str(script), *flags, cwd=folder)
        match = re.search(r"Submitted batch job (\d+)", said)
        assert match, said
        return Job(self, int(match[1]), folder)

    def up(self) -> None:
        self.folder.mkdir()
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        nodes = [f"NodeName={n} NodeAddr={self.hosts.address(n)} CPUs=2 State=UNKNOWN" for n in self.nodes]
        settings = {"requeue_wait_s": self.requeue_wait_s, "slurmd_timeout_s": self.slurmd_timeout_s}
        place = {"controller": self.controller, "address": self.hosts.address(self.controller), "folder": self.folder}
        (self.folder / "slurm.conf").write_text(_CONF.format(nodes="\n".join(nodes), **place, **settings))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munged = [f"--{flag}={self.folder}/munge.{suffix}" for flag, suffix in names.items()]
        # in a host, so that it ends with it; the socket is a file that both see
        self.daemon(self.controller, "munged", "--force", "--foreground", *munged)
        self.daemon(self.controller, "slurmctld", "-D")
        for name in self.nodes:
            self.daemon(name, "slurmd", "-D", "-N", name)
        deadline = time.monotonic() + 60
        while self.idle() < len(self.nodes):
            assert time.monotonic() < deadline, (self.folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.5)

    def idle(self) -> int:
        done = self.hosts.run(self.controller, ["sinfo", "--noheader", "--Node", "--format=%T"], env=self.env)
        return done.stdout.split().count("idle")

    def daemon(self, host: str, *words: str) -> None:
        with open(self.folder / f"{words[0]}.{host}.out", "a") as out:
            command = self.hosts.command(host, words, env=self.env)
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)


@contextmanager
def build_slurm(folder: Path) -> Iterator[Slurm]:
    """node1 and node2, idle, and node3, the controller. folder: new or empty."""
    with cluster.build_cluster(folder / "hosts", 3) as hosts:
        give_ops(hosts)
        slurm = Slurm(hosts, folder / "slurm")
        slurm.up()
        yield slurm


def give_ops(hosts: Cluster) -> None:
    """Each host's own copy of the compiled op: the builders of another host are not among its processes, and their
    lock on a shared folder would look like one that a dead build left."""
    for name in hosts.names:
        disk = hosts.folder / f"{name}.disk" / "ops"  # its /mnt/ops
        shutil.copytree(extensions_root() / "deepspeed_shm_comm", disk / "deepspeed_shm_comm")


def user_environment() -> dict[str, str]:
    """What a rank on a host needs beside PATH."""
    words = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": "/mnt/ops"}
    return words | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
