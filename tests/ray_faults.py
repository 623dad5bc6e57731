"""The faults of `tests.host_faults` under Ray: a cluster of two hosts, and `dstrain launch --to ray` on the first.

    python -m tests.ray_faults                                    # the rows of docs/clusters/faults.md
    python -m tests.ray_faults --faults crashed_host --system_config '{"health_check_period_ms": 2000}'
    python -m tests.ray_faults --there_and_back                   # 2 hosts -> 1 -> 2

Ray's own processes (`ray start`) are the cluster's and stay; the driver, the workers of Ray Train and the ranks are
the run's. The ranks are those of `tests.paced`, so the driver is started itself: `dstrain launch` takes train.py alone.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests import host_faults
from tests.cluster import build_cluster, why_not
from tests.host_faults import Strike, Trial
from tests.launch import BIN

_DRIVER = "dstrain.launch.clusters.ray_driver"
_OF_THE_RUN = (_DRIVER, "ray_rank", "paced.py", "RayTrainWorker", "TrainController")
_MEMORY = str(200 * 2**20)


class RayTrial(Trial):
    """Its hosts are a Ray cluster with room for one worker each; the first host is the head. Ray takes its time."""

    patience_s = 400.0
    system_config = "{}"  # of the head

    def launch(self, words: Sequence[str], more: Sequence[str]) -> list[subprocess.Popen]:
        for name in self.cluster.names:
            self.join(name)
        driver = [sys.executable, "-m", _DRIVER, "--num_workers", "2", "--gpus_per_worker", "0", "--", *words]
        supervised = [str(BIN / "dstrain"), "launch", "--max_restarts", "3", "--backoff", "0.5", "--"]
        return [self.start(self.cluster.names[0], ["env", f"RAY_ADDRESS={self._gcs}", *supervised, *driver], "launch")]

    @property
    def _gcs(self) -> str:
        return f"{self.cluster.address(self.cluster.names[0])}:6379"

    def join(self, name: str) -> None:
        """Start Ray on a host."""
        head = ["--head", "--port", "6379", "--include-dashboard", "false", "--system-config", self.system_config]
        place = head if name == self.cluster.names[0] else ["--address", self._gcs]
        command = [
            str(BIN / "ray"),
            "start",
            *place,
            "--node-ip-address",
            self.cluster.address(name),
            "--num-cpus",
            "1",
        ]
        command += ["--temp-dir", "/mnt/ray", "--object-store-memory", _MEMORY, "--disable-usage-stats"]
        done = self.start(name, command, f"{name}.ray")
        assert done.wait(90) == 0, self.log()

    def is_the_runs(self, command_line: str) -> bool:
        return super().is_the_runs(command_line) and any(word in command_line for word in _OF_THE_RUN)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _kill_worker(trial: Trial, host: str) -> None:
    os.kill(_parent(_parent(trial.on_host(host, "rank")[0])), signal.SIGKILL)


def _kill_driver(trial: Trial, _: str) -> None:
    for entry in Path("/proc").glob("[0-9]*"):
        words = (entry / "cmdline").read_bytes().split(b"\0") if (entry / "cmdline").exists() else []
        if words[1:3] == [b"-m", _DRIVER.encode()] and str(trial.folder).encode() in words:
            os.kill(int(entry.name), signal.SIGKILL)


FAULTS: dict[str, Strike] = {
    **{name: strike for name, strike in host_faults.FAULTS.items() if name not in ("killed_launcher", "killed_runner")},
    "killed_worker": _kill_worker,
    "killed_launcher": _kill_driver,
}


def measure(fault: str, folder: Path, reference: Sequence[float]) -> host_faults.Row:
    """One run, one fault, one row."""
    return host_faults.measure("Ray", fault, folder, reference, RayTrial, FAULTS[fault])


def there_and_back(folder: Path) -> host_faults.Return:
    """The second host crashes and boots again, and Ray takes it back while the run goes on."""
    steps = 400
    reference = host_faults.uninterrupted(folder / "reference", host_faults.CONFIG, steps)
    with build_cluster(folder / "cluster") as cluster:
        trial = RayTrial(cluster, "Ray", steps=steps)
        try:
            worlds, lost = [], 0
            for start in range(3):
                trial.wait_for("resumed", lambda count=start: len(trial.resumes()) >= count)  # type: ignore[misc]
                before = trial.step()
                trial.wait_for("training", lambda at=before + 8: trial.step() >= at)  # type: ignore[misc]
                worlds.append(sum(role == "rank" for role in trial.processes().values()))
                if start == 0:
                    highest = trial.step()
                    cluster.crash("node2")
                    trial.wait_for("resumed", trial.resumes)
                    lost = highest - trial.resumes()[0]["step"]
                    cluster.boot("node2")
                    trial.join("node2")
            assert trial.end() == [0], trial.log()
            return host_faults.Return("zero1 under Ray", worlds, lost, host_faults.difference(trial, reference))
        finally:
            trial.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--keep", type=Path, help="folder for runs and logs (default: a temporary one)")
    parser.add_argument("--system_config", default="{}", help="of the head's `ray start`: a JSON object")
    parser.add_argument("--there_and_back", action="store_true", help="instead: 2 hosts, 1, and 2 again")
    args = parser.parse_args()
    RayTrial.system_config = args.system_config
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the hosts are taken down all the same
    if reason := why_not(str(BIN / "ray")):
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        if args.there_and_back:
            print(there_and_back(folder))
            return 0
        reference = host_faults.uninterrupted(folder / "reference", host_faults.CONFIG)
        return host_faults.report(measure(fault, folder / fault, reference) for fault in args.faults)


if __name__ == "__main__":
    sys.exit(main())
