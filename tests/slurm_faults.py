"""The faults of `tests.host_faults` under Slurm: three hosts for a job of two, and a fourth with the controller.

    python -m tests.slurm_faults                                  # the rows of docs/clusters/faults.md, half an hour
    python -m tests.slurm_faults --faults crashed_host --keep /tmp/faults

The job is queued again, waits the two minutes that Slurm makes it wait, and goes on, with the host that was free where
one was lost. Nobody helps.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from tests import host_faults
from tests.cluster import Cluster, why_not
from tests.host_faults import Strike, Trial
from tests.slurm import PROGRAMS, Slurm, give_ops

_DAEMONS = ("munged ", "slurmctld ", ": slurmscriptd", "slurmd ")
_REPORTS_S = 90.0  # it tries once a minute
_TRAIN = """import runpy
runpy.run_path({paced!r}, run_name="__main__")
"""


class SlurmTrial(Trial):
    """Its hosts are those of a Slurm, the last one with the controller."""

    num_hosts, patience_s, steps = 4, 400.0, host_faults.STEPS
    settings: ClassVar[dict[str, int]] = {}
    own: tuple[str, ...] = ()

    def __init__(self, cluster: Cluster, way: str):
        self.looked_at, self.over = 0.0, False
        self.script = cluster.folder / "train.py"  # `dstrain launch --to slurm` takes no other name
        self.script.write_text(_TRAIN.format(paced=str(host_faults.SCRIPT)))
        super().__init__(cluster, way, steps=self.steps)

    def launch(self, words: Sequence[str], more: Sequence[str]) -> list[subprocess.Popen]:
        give_ops(self.cluster)
        self.slurm = Slurm(self.cluster, self.cluster.folder / "slurm", **self.settings)
        self.slurm.up()
        self.job = self.slurm.submit(self.cluster.folder, [*self.own, *more], words[1:], self.script)
        return []

    def is_over(self) -> bool:
        if time.monotonic() - self.looked_at > 2.0:
            self.looked_at, self.over = time.monotonic(), self.job.has_ended
        return self.over

    def end(self) -> list[int | None]:
        super().end()
        return list(self.job.codes)

    def log(self) -> str:
        ends = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.slurm.folder.glob("slurm*.log"))]
        return "\n".join([*ends, super().log(), "--- job", self.slurm.command("scontrol", "show", "job"), self.job.log])

    def orphans(self, alive: Sequence[str]) -> int:
        """Counted when every host is on the network again: a slurmstepd ends when it has told the controller."""
        began = time.monotonic()
        for name in alive:
            self.cluster.mend(name)
        while time.monotonic() - began < _REPORTS_S and any(map(self._has_step, alive)):
            time.sleep(0.5)
        return super().orphans(alive)

    def _has_step(self, name: str) -> bool:
        return any(line.startswith("slurmstepd") for line in self.cluster.processes(name))

    def is_the_runs(self, command_line: str) -> bool:
        return super().is_the_runs(command_line) and not command_line.startswith(_DAEMONS)


class LimitTrial(SlurmTrial):
    """Long enough that Slurm, which looks every half minute and may be a minute early, ends it once."""

    steps, own = 320, ("--time_limit", "00:03:00", "--grace_s", "60")


class ShrinkTrial(SlurmTrial):
    """Without a host to spare, but allowed to go on with one."""

    num_hosts, own = 3, ("--engine_args=--nodes=1-2",)


def _reach_limit(trial: Trial, _: str) -> None:
    trial.wait_for("asked to stop", lambda: trial.rows("summary"))


def kill_program(trial: Trial, host: str, program: str) -> None:
    """The oldest process on a host whose command line matches."""
    found = trial.cluster.run(host, ["pgrep", "--oldest", "--full", program]).stdout.split()
    assert found, trial.cluster.processes(host)
    trial.cluster.run(host, ["kill", "-KILL", *found])


def _kill_runner(trial: Trial, _: str) -> None:
    """What the batch script waits for, on the first host. A child of srun sees it and kills the ranks."""
    kill_program(trial, trial.cluster.names[0], "^srun ")


def _kill_launcher(trial: Trial, host: str) -> None:
    """The parent of the rank on the second host."""
    kill_program(trial, host, "^slurmstepd: ")


def _crash_first(trial: Trial, _: str) -> None:
    """The host of rank 0, and of the batch script."""
    host_faults.FAULTS["crashed_host"](trial, trial.cluster.names[0])


FAULTS: dict[str, tuple[type[SlurmTrial], Strike]] = {
    "time_limit": (LimitTrial, _reach_limit),
    "killed_rank": (SlurmTrial, host_faults.FAULTS["killed_rank"]),
    "killed_launcher": (SlurmTrial, _kill_launcher),
    "killed_runner": (SlurmTrial, _kill_runner),
    "crashed_host": (SlurmTrial, host_faults.FAULTS["crashed_host"]),
    "crashed_first_host": (SlurmTrial, _crash_first),
    "crashed_host_no_other": (ShrinkTrial, host_faults.FAULTS["crashed_host"]),
    "cut_cable": (SlurmTrial, host_faults.FAULTS["cut_cable"]),
    "hung_rank": (SlurmTrial, host_faults.FAULTS["hung_rank"]),
    "stopped_rank": (SlurmTrial, host_faults.FAULTS["stopped_rank"]),
}


def measure(fault: str, folder: Path, reference: Sequence[float]) -> host_faults.Row:
    """One run, one fault, one row. reference: losses of LimitTrial.steps steps."""
    kind, strike = FAULTS[fault]
    return host_faults.measure("Slurm", fault, folder, reference[: kind.steps], kind, strike)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--keep", type=Path, help="folder for runs and logs (default: a temporary one)")
    parser.add_argument(
        "--requeue_wait_s", type=int, default=120, help="Slurm's cred_expire (default: 120, as Slurm's)"
    )
    parser.add_argument("--slurmd_timeout_s", type=int, default=30, help="SlurmdTimeout (default: 30; Slurm's is 300)")
    args = parser.parse_args()
    SlurmTrial.settings.update(requeue_wait_s=args.requeue_wait_s, slurmd_timeout_s=args.slurmd_timeout_s)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the hosts are taken down all the same
    if reason := why_not(*PROGRAMS):
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        reference = host_faults.uninterrupted(folder / "reference", host_faults.CONFIG, LimitTrial.steps)
        return host_faults.report(measure(fault, folder / fault, reference) for fault in args.faults)


if __name__ == "__main__":
    sys.exit(main())
