"""A Slurm of two hosts, from Debian's packages, and what it does when a run on it is hit.

    python -m tests.slurm                          # the table of docs/clusters/slurm.md; about 15 minutes
    python -m tests.slurm limit kill               # some of its rows

Root, namespaces (`tests.cluster`) and `apt-get install slurmctld slurmd munge` are needed.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.launch.ops import extensions_root
from tests import cluster, faults, launch
from tests.cluster import Cluster
from tests.launch import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
_CONF = """
ClusterName=dstrain
SlurmctldHost={first}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
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
SlurmdTimeout=30
KillWait=10
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Job:
    """A submitted run. folder: where it was submitted; run: its run folder."""

    slurm: "Slurm"
    number: int
    folder: Path
    run: Path

    @property
    def log(self) -> str:
        logs = list(self.folder.glob(f"*-{self.number}.out"))
        return logs[0].read_text() if logs else ""

    @property
    def state(self) -> str:
        shown = self.slurm.command("scontrol", "show", "job", str(self.number))
        match = re.search(r"JobState=(\w+)", shown)
        return match[1] if match else "GONE"

    def metrics(self, kind: str = "train") -> list[dict[str, Any]]:
        return read_metrics(self.run, kind)

    @property
    def step(self) -> int:
        return max((row["step"] for row in self.metrics()), default=0)

    @property
    def codes(self) -> list[int]:
        """Of the starts that have ended, as the batch script saw them."""
        return [int(code) for code in re.findall(r"^exit code (\d+) ", self.log, re.M)]

    def wait(self, ready: Callable[[], Any], timeout_s: float = 240.0) -> float:
        """Seconds until `ready()`; fails with the job's log."""
        start = time.monotonic()
        while not ready():
            assert time.monotonic() - start < timeout_s, f"{self.state} after {timeout_s} s\n{self.log[-4000:]}"
            time.sleep(0.2)
        return time.monotonic() - start

    def start_now(self) -> None:
        """Cut short the two minutes that Slurm (22.05) lets a requeued job wait, but not all of them: a host that has
        just revoked the job's credential starts nothing for it."""
        time.sleep(5)
        self.slurm.command("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def wait_for_end(self, timeout_s: float = 300.0) -> str:
        self.wait(lambda: self.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), timeout_s)
        return self.state


@dataclass
class Slurm:
    """A running Slurm on the hosts of `hosts`."""

    hosts: Cluster
    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """What a user has in the shell that submits."""
        return user_environment() | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def command(self, *words: str, cwd: Path = ROOT) -> str:
        done = self.hosts.run("node1", ["env", f"--chdir={cwd}", *words], env=self.env)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, folder: Path, own: Sequence[str], flags: Sequence[str], script: Path = launch.TRAIN) -> Job:
        """`dstrain launch --to slurm own -- script flags`, on two hosts without GPUs, from `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        words = ["dstrain", "launch", "--to", "slurm", "--num_nodes", "2", "--use_cpu", *own]
        said = self.command(*words, "--", str(script), *flags, cwd=folder)
        match = re.search(r"Submitted batch job (\d+)", said)
        assert match, said
        return Job(self, int(match[1]), folder, Path(flags[flags.index("--output_dir") + 1]))

    def up(self) -> None:
        self.folder.mkdir()
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        nodes = [f"NodeName={n} NodeAddr={self.hosts.address(n)} CPUs=2 State=UNKNOWN" for n in self.hosts.names]
        settings = {"first": "node1", "address": self.hosts.address("node1"), "folder": self.folder}
        (self.folder / "slurm.conf").write_text(_CONF.format(nodes="\n".join(nodes), **settings))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munged = [f"--{flag}={self.folder}/munge.{suffix}" for flag, suffix in names.items()]
        # in a host, so that it ends with it; the socket is a file that both see
        self.daemon("node1", "munged", "--force", "--foreground", *munged)
        self.daemon("node1", "slurmctld", "-D")
        for name in self.hosts.names:
            self.daemon(name, "slurmd", "-D", "-N", name)
        deadline = time.monotonic() + 60
        while self.idle() < 2:
            assert time.monotonic() < deadline, (self.folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.5)

    def idle(self) -> int:
        done = self.hosts.run("node1", ["sinfo", "--noheader", "--Node", "--format=%T"], env=self.env)
        return done.stdout.split().count("idle")

    def daemon(self, host: str, *words: str) -> None:
        with open(self.folder / f"{words[0]}.{host}.out", "a") as out:
            command = self.hosts.command(host, words, env=self.env)
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)


@contextmanager
def build_slurm(folder: Path) -> Iterator[Slurm]:
    """node1 (which also is the controller) and node2, idle. folder: new or empty."""
    with cluster.build_cluster(folder / "hosts") as hosts:
        give_ops(hosts)
        slurm = Slurm(hosts, folder / "slurm")
        slurm.up()
        yield slurm


def training(folder: Path, max_steps: int) -> list[str]:
    """Flags of a small run that saves every 50 steps."""
    return [*faults.flags(folder), "--max_steps", str(max_steps), "--save_steps", "50", "--save_total_limit", "2"]


def uninterrupted(folder: Path, max_steps: int) -> list[float]:
    """The losses of two ranks on this host, under torchrun."""
    result = launch.run(
        launch.TRAIN, *training(folder, max_steps), launcher="torchrun", ranks=2, run_dir=folder / "run"
    )
    return result.check().losses()


def largest_difference(own: Sequence[float], losses: Sequence[float]) -> float:
    """Relative, of a curve to another of as many steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(own, losses, strict=True))


def read_metrics(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The whole lines of a run that may be under way."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


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


def rank_on(slurm: Slurm, host: str) -> int:
    """The pid of the rank that trains on a host, as the host sees it."""
    found = slurm.hosts.run(host, ["pgrep", "--oldest", "--full", "python.* .*dstrain/train.py"]).stdout.split()
    assert found, slurm.hosts.processes(host)
    return int(found[0])


def strike(slurm: Slurm, job: Job, fault: str) -> None:
    """Let a fault happen; `mend` undoes it."""
    if fault in ("kill", "hang"):
        number = signal.SIGKILL if fault == "kill" else signal.SIGSTOP
        slurm.hosts.run("node2", ["kill", f"-{int(number)}", str(rank_on(slurm, "node2"))])
    elif fault == "crash":
        slurm.hosts.crash("node2")
    elif fault == "cut":
        slurm.hosts.cut("node2")
    elif fault == "usr1":  # what --signal sends before the limit, without waiting for it
        slurm.command("scancel", "--signal=USR1", str(job.number))


def mend(slurm: Slurm, fault: str) -> None:
    if fault == "crash":
        slurm.hosts.boot("node2")
        slurm.daemon("node2", "slurmd", "-D", "-N", "node2")
    elif fault == "cut":
        slurm.hosts.mend("node2")


def measure(slurm: Slurm, fault: str, folder: Path, max_steps: int, at_step: int) -> tuple[Job, dict[str, Any]]:
    """A run of two ranks on two hosts that is hit at a step, queued again, and goes on to its end.

    noticed_s: until the run or Slurm said so. next_step_s: from then to the next step, without the two minutes that
    Slurm (22.05) lets a requeued job wait: they are cut short. steps_lost: made before the fault, and made again.
    """
    limit = ["--time_limit", "00:02:00", "--grace_s", "60"] if fault == "limit" else ["--time_limit", "00:10:00"]
    flags = [*training(folder / "inputs", max_steps), *(["--hang_timeout", "10"] if fault == "hang" else [])]
    job = slurm.submit(folder, limit, flags)
    job.wait(lambda: job.step >= at_step)
    if fault == "limit":
        job.wait(lambda: job.metrics("summary"), 120)
    struck, step = time.monotonic(), job.step
    strike(slurm, job, fault)
    job.wait(lambda: job.metrics("summary") or job.codes or job.state != "RUNNING", 120)
    noticed_s = time.monotonic() - struck
    job.wait(lambda: job.state == "PENDING", 120)
    step = max(step, job.step)
    mend(slurm, fault)
    job.wait(lambda: slurm.idle() == 2, 120)
    if fault == "limit":  # the rest fits into one more start
        slurm.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    job.start_now()
    went_on = time.monotonic()
    job.wait(lambda: any(row["name"] == "resume" for row in job.metrics("event")), 120)
    resumed = next(row["step"] for row in job.metrics("event") if row["name"] == "resume")
    job.wait(lambda: job.step > resumed, 60)
    next_step_s = time.monotonic() - went_on
    state = job.wait_for_end()
    row = {"fault": fault, "noticed_s": round(noticed_s, 1), "exit_codes": job.codes, "state": state}
    return job, row | {"next_step_s": round(next_step_s, 1), "steps_lost": step - resumed}


STEPS = {"limit": 3000, "usr1": 200, "kill": 200, "hang": 200, "crash": 200, "cut": 200}


def main(names: list[str]) -> None:
    if why := cluster.why_not(*PROGRAMS):
        sys.exit(why)
    names = names or [name for name in STEPS if name != "usr1"]
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as temporary:
        folder = Path(temporary)
        losses = uninterrupted(folder / "plain", max(STEPS[name] for name in names))
        with build_slurm(folder) as slurm:
            for name in names:
                job, row = measure(slurm, name, folder / name, STEPS[name], at_step=60)
                own = [line["loss"] for line in job.metrics()]
                difference = largest_difference(own, losses[: STEPS[name]])
                print(json.dumps(row | {"largest_difference": difference}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
