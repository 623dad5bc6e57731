"""Lose a rank, a launcher, a host or a cable of a run over two hosts, and measure what becomes of it.

    python -m tests.host_faults > docs/clusters/faults.md                     # the table, about ten minutes
    python -m tests.host_faults --ways pdsh --faults crashed_host --keep /tmp/faults
    python -m tests.host_faults --there_and_back                              # 2 hosts -> 1 -> 2, per layout

The hosts are namespaces of this machine (`tests.cluster`), with a rank each and a run folder that both see. A host
crashes as by a power cut: it sends nothing more. Nobody helps the run after the fault. On each host stands a process
of somebody else's run of the same Python, which must survive.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.launch import sweep
from dstrain.launch.ops import extensions_root
from tests import faults as inputs
from tests import forked
from tests.cluster import Cluster, build_cluster, why_not
from tests.distributed import parity
from tests.launch import BIN, ROOT

SCRIPT = ROOT / "tests" / "paced.py"
STEPS, SAVE_EVERY, STRIKE_AT = 30, 4, 10
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TORCH_EXTENSIONS_DIR": str(extensions_root()),
    "PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
}
CONFIG = parity.ADAMW | parity.zero(1)
_STRANGER = ["-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "paced.py", "--output_dir", "/somewhere/else"]


class Trial:
    """One run over the hosts of a cluster, under way. way: "pdsh" (with the supervisor) or "torchrun"."""

    num_hosts, script, patience_s = 2, SCRIPT, 180.0

    def __init__(self, cluster: Cluster, way: str, config: dict[str, Any] = CONFIG, *more: str, steps: int = STEPS):
        self.cluster, self.way = cluster, way
        self.inputs = cluster.folder / "inputs"
        self.folder = self.inputs / "run"
        flags = inputs.flags(self.inputs, config)
        flags += ["--max_steps", str(steps), "--save_steps", str(SAVE_EVERY), "--save_total_limit", "2"]
        words = [str(self.script), *flags]
        environment = "".join(f"{name}={value}\n" for name, value in ENVIRONMENT.items())
        (cluster.folder / "home" / ".deepspeed_env").write_text(environment)
        self.strangers = [self.start(name, [sys.executable, "-c", _SLEEP, *_STRANGER]) for name in cluster.names]
        self.launchers = self.launch(words, more)

    def launch(self, words: Sequence[str], more: Sequence[str]) -> list[subprocess.Popen]:
        """Start the script; the launchers whose end is the end of the run. more: flags of the supervisor."""
        names = self.cluster.names
        if self.way == "pdsh":
            launch = [str(BIN / "dstrain"), "launch", "--max_restarts", "3", "--backoff", "0.5", *more, "--"]
            deepspeed = [str(BIN / "deepspeed"), "--hostfile", str(self.cluster.hostfile())]
            return [self.start(names[0], [*launch, *deepspeed, *words], "launch")]
        for name in names:  # else the agent of a host that is cut off waits a quarter of an hour for its store
            self.cluster.run(name, ["sh", "-c", "echo 6 > /proc/sys/net/ipv4/tcp_retries2"])
        head = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", str(BIN / "torchrun")]
        head += ["--nnodes", f"1:{len(names)}", "--nproc_per_node", "1", "--max-restarts", "10"]
        head += ["--rdzv-backend", "c10d", "--rdzv-id", "x", "--rdzv-endpoint", f"{names[0]}:29400"]
        return [self.start(name, [*head, *words], name) for name in names]

    def start(self, host: str, command: Sequence[str], log: str | None = None) -> subprocess.Popen:
        out = os.open(self.cluster.folder / f"{log}.log" if log else os.devnull, os.O_WRONLY | os.O_CREAT, 0o644)
        inside = self.cluster.command(host, command, ENVIRONMENT | {"PYTHONPATH": str(ROOT)})
        try:
            return subprocess.Popen(inside, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        finally:
            os.close(out)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [row for row in map(json.loads, filter(None, lines)) if row["kind"] == kind]

    def step(self) -> int:
        return max((row["step"] for row in self.rows("train")), default=0)

    def resumes(self) -> list[dict[str, Any]]:
        return [row for row in self.rows("event") if row["name"] == "resume"]

    def processes(self) -> dict[int, str]:
        """Of the run, on all hosts: process id as seen from outside -> role."""
        return sweep.find(self.script.name, self.folder.resolve())

    def on_host(self, host: str, role: str) -> list[int]:
        space = os.readlink(f"/proc/{self.cluster.inits[host]}/ns/pid")
        found = [pid for pid, its_role in self.processes().items() if its_role == role]
        return [pid for pid in found if os.readlink(f"/proc/{pid}/ns/pid") == space]

    def wait_for(self, what: str, reached: Callable[[], Any]) -> float:
        """Seconds until `reached`; fails, with the ends of the logs, after patience_s."""
        began = time.monotonic()
        while not reached():
            over = what != "ended" and self.is_over()
            if time.monotonic() - began > self.patience_s or (over and not reached()):
                raise AssertionError(f"not {what} within {self.patience_s:.0f} s\n{self.log()[-9000:]}")
            time.sleep(0.05)
        return time.monotonic() - began

    def is_over(self) -> bool:
        """Whether nothing will start the run again."""
        return all(launcher.poll() is not None for launcher in self.launchers)

    def log(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(self.cluster.folder.glob("*.log")))

    def end(self) -> list[int | None]:
        """What the launchers returned."""
        self.wait_for("ended", self.is_over)
        return [launcher.returncode for launcher in self.launchers]

    def orphans(self, alive: Sequence[str]) -> int:
        """Processes and segments that the run has left on these hosts, five seconds after it ended."""
        time.sleep(5.0)
        left = len(self.processes())
        for name in alive:
            left += sum(map(self.is_the_runs, self.cluster.processes(name)))
            left += len(self.cluster.run(name, ["ls", "/dev/shm"]).stdout.split())
        return left

    def is_the_runs(self, command_line: str) -> bool:
        """Whether a process that is found on a host afterwards is one too many."""
        return _SLEEP not in command_line

    def close(self) -> None:
        for process in (*self.launchers, *self.strangers):
            process.kill()
            process.wait()


_SLEEP = "import time; time.sleep(3600)"


@dataclass(frozen=True)
class Row:
    """What one fault came to; times in seconds after the fault. code: of the start that it ended, by its summary.

    None where no rank was left to write one.
    """

    way: str
    fault: str
    noticed_s: float
    code: int | None
    next_step_s: float
    steps_lost: int
    orphans: int
    strangers_killed: int
    difference: float  # of losses to the uninterrupted run, the largest relative one
    hosts_after: int

    @property
    def good(self) -> bool:
        # a process that is stopped is killed by its launcher, half a minute after the others have noticed and ended
        bar_s = 100 if self.fault == "stopped_rank" else 60
        return self.noticed_s <= bar_s and not self.orphans and not self.strangers_killed and self.difference <= 1e-5


def _kill_rank(trial: Trial, host: str) -> None:
    os.kill(trial.on_host(host, "rank")[0], signal.SIGKILL)


def _kill_launcher(trial: Trial, host: str) -> None:
    if trial.way == "pdsh":
        os.kill(trial.on_host(host, "launcher")[0], signal.SIGKILL)
    else:
        parent = Path(f"/proc/{trial.on_host(host, 'rank')[0]}/stat").read_text().rsplit(")", 1)[1].split()[1]
        os.kill(int(parent), signal.SIGKILL)


def _kill_runner(trial: Trial, host: str) -> None:
    """The `deepspeed` process that the supervisor started."""
    for entry in Path("/proc").glob("[0-9]*"):
        words = (entry / "cmdline").read_bytes().split(b"\0") if (entry / "cmdline").exists() else []
        if len(words) > 1 and words[1].endswith(b"/deepspeed") and str(trial.folder).encode() in words:
            os.kill(int(entry.name), signal.SIGKILL)


def _crash(trial: Trial, host: str) -> None:
    trial.cluster.cut(host)  # a power cut says no goodbye
    trial.cluster.crash(host)


def _cut(trial: Trial, host: str) -> None:
    trial.cluster.cut(host)


def _hang(trial: Trial, host: str) -> None:
    (trial.folder / "hang_1").touch()


def _stop(trial: Trial, host: str) -> None:
    """It cannot react to anything any more, not even to SIGTERM."""
    os.kill(trial.on_host(host, "rank")[0], signal.SIGSTOP)


Strike = Callable[[Trial, str], None]
FAULTS: dict[str, Strike] = {
    "killed_rank": _kill_rank,
    "killed_launcher": _kill_launcher,
    "killed_runner": _kill_runner,
    "crashed_host": _crash,
    "cut_cable": _cut,
    "hung_rank": _hang,
    "stopped_rank": _stop,
}
WAYS = ("pdsh", "torchrun")
LEFT_OUT = {
    ("torchrun", "killed_runner"): "torchrun has no runner beside its agents",
}
# Layout on two hosts -> (its configuration, the one for a single host).
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "zero1": (CONFIG, None),
    "zero3": (parity.ADAMW | parity.zero(3), None),
    "pipeline_to_zero": (parity.ADAMW | parity.zero(1) | {"pipeline": {"stages": 2}}, CONFIG),
}


def measure(
    way: str,
    fault: str,
    folder: Path,
    reference: Sequence[float],
    kind: type[Trial] = Trial,
    strike: Strike | None = None,
) -> Row:
    """One run, one fault on the second host, one row. strike: what brings the fault about, if not FAULTS has it."""
    with build_cluster(folder, kind.num_hosts) as cluster:
        trial, victim = kind(cluster, way), cluster.names[1]
        try:
            trial.wait_for("training", lambda: trial.step() >= STRIKE_AT)
            before, highest = trial.processes(), trial.step()
            (strike or FAULTS[fault])(trial, victim)
            struck = time.monotonic()
            trial.wait_for("noticed", lambda: not before.keys() & trial.processes().keys())
            noticed_s = time.monotonic() - struck
            highest = max(highest, trial.step()) if not trial.resumes() else highest
            code = (trial.rows("summary") or [{"exit_code": None}])[-1]["exit_code"]
            (trial.folder / "hang_1").unlink(missing_ok=True)
            trial.wait_for("resumed", trial.resumes)
            resumed = trial.resumes()[-1]["step"]
            trial.wait_for("training again", lambda: trial.step() > resumed)
            next_step_s = time.monotonic() - struck
            hosts = len({pid for pid, role in trial.processes().items() if role == "rank"})
            codes = trial.end()
            assert 0 in codes, f"{way} {fault}: {codes}"
            alive = [name for name in cluster.names if name in cluster.inits]
            killed = sum(
                p.poll() is not None for n, p in zip(cluster.names, trial.strangers, strict=True) if n in alive
            )
            return Row(
                way, fault, noticed_s, code, next_step_s, highest - resumed, trial.orphans(alive), killed,
                difference(trial, reference), hosts,
            )  # fmt: skip
        finally:
            trial.close()


@dataclass(frozen=True)
class Return:
    """A run whose second host crashed and came back. worlds: ranks of its starts. difference: as of a row."""

    layout: str
    worlds: list[int]
    steps_lost: int
    difference: float


def there_and_back(layout: str, folder: Path) -> Return:
    """Two hosts; one crashes and boots again; a killed rank brings about the restart that takes it back."""
    config, smaller = LAYOUTS[layout]
    reference = uninterrupted(folder / "reference", CONFIG)
    more: list[str] = []
    if smaller is not None:
        (folder / "smaller.json").write_text(json.dumps(smaller))
        more = ["--smaller_config", str(folder / "smaller.json")]
    with build_cluster(folder / "cluster") as cluster:
        trial = Trial(cluster, "pdsh", config, *more)
        try:
            worlds, lost = [], 0
            for number, fault in enumerate((lambda: cluster.crash("node2"), lambda: _kill_rank(trial, "node1"), None)):
                trial.wait_for("training", lambda at=10 * number + 6: trial.step() >= at)  # type: ignore[misc]
                worlds.append(sum(role == "rank" for role in trial.processes().values()))
                highest = trial.step()
                if fault is not None:
                    fault()
                    trial.wait_for("resumed", lambda count=number: len(trial.resumes()) > count)  # type: ignore[misc]
                    lost += highest - trial.resumes()[-1]["step"]
                if number == 0:
                    cluster.boot("node2")
            assert trial.end() == [0], trial.log()
            return Return(layout, worlds, lost, difference(trial, reference))
        finally:
            trial.close()


def difference(trial: Trial, reference: Sequence[float]) -> float:
    losses = [row["loss"] for row in trial.rows("train")]
    assert len(losses) == len(reference), f"{len(losses)} steps, not {len(reference)}"
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def uninterrupted(folder: Path, config: dict[str, Any], steps: int = STEPS) -> list[float]:
    """The losses of the same run in one process that nothing happens to."""
    flags = [*inputs.flags(folder, config), "--max_steps", str(steps)]
    at = flags.index("--output_dir")
    return forked.train(folder / "run", *flags[:at], *flags[at + 2 :]).check().losses()


def as_table(rows: Sequence[Row]) -> str:
    head = ["way", "fault", "all ended after", "exit code of that start", "next step after", "steps lost"]
    head += ["goes on with ranks", "left over", "strangers killed", "largest difference of losses"]
    lines = [" | ".join(head), " | ".join(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for row in rows:
        cells = [row.way, row.fault.replace("_", " "), f"{row.noticed_s:.1f} s", row.code or "none"]
        cells += [f"{row.next_step_s:.1f} s", row.steps_lost, row.hosts_after, row.orphans, row.strangers_killed]
        lines.append(" | ".join(map(str, [*cells, f"{row.difference:.1e}"])))
    return "\n".join(f"| {line} |" for line in lines)


def report(rows: Iterable[Row]) -> int:
    """Print each row when it is there, then all as a table; an exit code."""
    found = []
    for row in rows:
        found.append(row)
        print(row, file=sys.stderr, flush=True)
    print(as_table(found))
    return 0 if all(row.good for row in found) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--keep", type=Path, help="folder for runs and logs (default: a temporary one)")
    parser.add_argument("--there_and_back", nargs="*", choices=LAYOUTS, help="instead: 2 hosts, 1, and 2 again")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the hosts are taken down all the same
    if reason := why_not("pdsh"):
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        if args.there_and_back is not None:
            for layout in args.there_and_back or LAYOUTS:
                print(there_and_back(layout, folder / layout), flush=True)
            return 0
        reference = uninterrupted(folder / "reference", CONFIG)
        cases = [(way, fault) for way in args.ways for fault in args.faults if (way, fault) not in LEFT_OUT]
        return report(measure(way, fault, folder / f"{way}_{fault}", reference) for way, fault in cases)


if __name__ == "__main__":
    sys.exit(main())
