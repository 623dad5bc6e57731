"""Kill, corrupt and starve a training run round after round, and resume it after each.

    python -m tests.torture --rounds 200 --seed 1           # the figures in docs/checkpoints.md
    python -m tests.torture --rounds 12                     # what CI runs

Each round starts the real entry (the same command every time), does one harm to it or to its files, and then looks at
what is left. Imports are paid once: this process loads the libraries and forks a launcher for each start, which forks
the ranks. Runs lie on a small tmpfs where one may be mounted, so that the disk can be filled. Counted as failures:

    unloadable      a whole checkpoint was there and the next start did not go on from the newest of them
    silent_restart  a start began anew although there were checkpoints
    wrong_bits      losses or the last checkpoint differ from those of the uninterrupted run
    hang            a start that neither ended nor was killed within its time
    shm             files in /dev/shm after the next start
"""

import argparse
import atexit
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.parallel import free_port
from tests import checkpoints as ck
from tests.launch import environment

SIDE = Path(tempfile.mkdtemp(prefix="torture_side_"))  # what must not fill up: logs and process ids
STEPS, SAVE_EVERY, TIMEOUT_S = 24, 2, 60.0
_SCHEDULE = {"type": "WarmupCosineLR", "params": {"total_num_steps": STEPS, "warmup_num_steps": 4}}
LAYOUTS = {
    "zero2-1": (1, ck.config(2, "bf16", scheduler=_SCHEDULE)),
    "zero2-2": (2, ck.config(2, "bf16", scheduler=_SCHEDULE)),
    "zero3-2": (2, ck.config(3, scheduler=_SCHEDULE)),
}
KILLS = ("kill_rank", "kill_rank_in_save", "kill_launcher", "kill_launcher_in_save")
HARMS = ("flip", "truncate", "remove", "remove_latest", "remove_manifest", "flip_manifest", "flip_latest")


@dataclass
class Start:
    """One launcher with its ranks, forked."""

    launcher: int
    folder: Path
    pids_file: Path
    code: int | None = None
    began: float = field(default_factory=time.monotonic)

    def ranks(self) -> list[int]:
        text = self.pids_file.read_text() if self.pids_file.exists() else ""
        return [int(pid) for pid in text.split()]

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.launcher, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def kill_all(self) -> None:
        for pid in self.ranks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _rank(rank: int, world: int, port: int, argv: list[str], log: Path) -> None:
    """In a forked process: become a rank and never return."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 1
    try:
        from dstrain.train import main

        code = main(argv)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _launch(world: int, argv: list[str], pids_file: Path, log: Path) -> None:
    """In a forked process: start the ranks, end them all when one fails, pass the code on. Never returns."""
    os.setsid()
    port, ranks = free_port(), {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _rank(rank, world, port, argv, log)
        ranks[pid] = rank
    pids_file.write_text(" ".join(map(str, ranks)))
    worst = 0
    while ranks:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        ranks.pop(pid, None)
        if code != 0 and worst == 0:
            worst = code if code > 0 else 128 - code
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    os._exit(worst)


def start(folder: Path, world: int, argv: list[str]) -> Start:
    pids_file = SIDE / f"{folder.name}.pids"
    pids_file.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            _launch(world, argv, pids_file, log_of(folder))
        finally:
            os._exit(99)  # whatever happened: a child never goes on with its parent's work
    return Start(pid, folder, pids_file)


def log_of(folder: Path) -> Path:
    return SIDE / f"{folder.name}.log"


def wait(process: Start) -> int | None:
    """Until it ends; None when it hangs (it is then killed)."""
    while time.monotonic() - process.began < TIMEOUT_S:
        code = process.poll()
        if code is not None:
            return code
        time.sleep(0.02)
    process.kill_all()
    os.kill(process.launcher, signal.SIGKILL)
    os.waitpid(process.launcher, 0)
    return None


def kill(process: Start, kind: str, draw: random.Random, typical_s: float) -> bool:
    """SIGKILL a rank or the launcher at a random moment, or inside a save. False: the run ended before."""
    in_save, due = kind.endswith("in_save"), time.monotonic() + draw.uniform(0.1, typical_s)
    saves_to_pass = draw.randrange(STEPS // SAVE_EVERY)
    checkpoints = process.folder / "checkpoints"
    stale, seen = {p.name for p in checkpoints.glob(".step_*.tmp")}, set()
    while time.monotonic() - process.began < TIMEOUT_S:
        if process.poll() is not None:
            return False
        if in_save:
            seen |= {p.name for p in checkpoints.glob(".step_*.tmp")} - stale
        if process.ranks() and (len(seen) > saves_to_pass if in_save else time.monotonic() > due):
            time.sleep(draw.uniform(0, 0.004) if in_save else 0)
            victim = draw.choice(process.ranks()) if "rank" in kind else process.launcher
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            return True
        time.sleep(0.0005 if in_save else 0.01)
    return False


def harm(folder: Path, kind: str, draw: random.Random) -> str:
    """Damage what lies on the disk, as rot and careless hands do. Returns what was done."""
    checkpoints = folder / "checkpoints"
    found = sorted(checkpoints.glob("step_*[0-9]"))
    if not found:
        return "nothing to harm"
    victim = found[-1] if draw.random() < 0.8 else draw.choice(found)
    named = {"manifest": victim / "manifest.json", "latest": checkpoints / "latest"}
    path = named.get(kind.partition("_")[2]) or draw.choice([p for p in victim.rglob("*") if p.is_file()])
    if not path.exists():
        return "nothing to harm"
    raw = path.read_bytes()
    position = draw.randrange(len(raw))
    if kind.startswith("flip"):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ (1 << draw.randrange(8))]) + raw[position + 1 :])
    elif kind == "truncate":
        path.write_bytes(raw[:position])
    else:
        path.unlink()
    return f"{kind} {path.relative_to(folder)} at {position}"


def whole_checkpoints(folder: Path) -> tuple[list[int], int]:
    """(steps of those that are whole, number of all), by reading every byte."""
    from dstrain.checkpoint.manifest import checkpoint_step, find_problems, list_folders

    folders = list_folders(folder / "checkpoints")
    return [checkpoint_step(p) for p in folders if not find_problems(p)], len(folders)


def resumed_at(folder: Path) -> int | None:
    """The step at which the last attempt went on; None when it began anew or wrote nothing."""
    try:
        lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    except OSError:
        return None
    steps = [line["step"] for line in lines if line["kind"] == "event" and line["name"] == "resume"]
    return steps[-1] if steps else None


def losses(folder: Path) -> list[float]:
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def shm_files() -> set[str]:
    return {p.name for p in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")}


@contextlib.contextmanager
def small_disk(size_mib: int) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is a file system of its own that can be filled)."""
    folder = Path(tempfile.mkdtemp(prefix="torture_"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield folder, mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


class Torture:
    """Rounds of harm, one run after the other, and the count of what went wrong."""

    def __init__(self, folder: Path, can_fill: bool, seed: int, layouts: list[str]):
        self.folder, self.can_fill, self.draw, self.layouts = folder, can_fill, random.Random(seed), layouts
        self.counts, self.failures, self.runs = Counter(), [], 0
        self.expected: dict[str, tuple[list[float], dict[str, str], float]] = {}

    def argv(self, folder: Path, layout: str) -> list[str]:
        flags = ck.flags(self.folder / layout, LAYOUTS[layout][1], {"attention_dropout": 0.1})
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        given |= {"--max_steps": str(STEPS), "--save_steps": str(SAVE_EVERY), "--save_total_limit": "3"}
        return [word for pair in given.items() for word in pair] + ["--output_dir", str(folder)]

    def reference(self, layout: str) -> tuple[list[float], dict[str, str], float]:
        """Losses, files of the last checkpoint and seconds of the uninterrupted run."""
        if layout not in self.expected:
            folder = self.folder / f"reference_{layout}"
            began = time.monotonic()
            code = wait(start(folder, LAYOUTS[layout][0], self.argv(folder, layout)))
            assert code == 0, log_of(folder).read_text()[-4000:]
            self.expected[layout] = losses(folder), ck.state_files(folder, STEPS), time.monotonic() - began
            shutil.rmtree(folder)
        return self.expected[layout]

    def fail(self, kind: str, text: str, folder: Path) -> None:
        tail = log_of(folder).read_text(errors="replace")[-3000:] if log_of(folder).exists() else ""
        self.counts[kind] += 1
        self.failures.append({"kind": kind, "text": text, "log": tail})

    def rounds(self, number: int, max_seconds: float) -> int:
        """Do `number` rounds, or fewer when the time is over; returns how many."""
        done, end = 0, time.monotonic() + max_seconds
        while done < number:
            layout = self.draw.choice(self.layouts)
            self.reference(layout)
            self.runs += 1
            folder, ended = self.folder / f"run_{self.runs}", False
            while done < number and not ended:
                number = done + 1 if time.monotonic() > end else number
                done += 1
                ended = self.one_round(folder, layout)
            if not ended:
                self.attempt(folder, layout, None)
            self.check_result(folder, layout)
            shutil.rmtree(folder, ignore_errors=True)
        return done

    def one_round(self, folder: Path, layout: str) -> bool:
        """One start with one harm; True when the run came to its end or cannot go on."""
        kind = self.draw.choice(KILLS * 2 + HARMS + (("full_disk",) if self.can_fill else ()))
        self.counts[kind] += 1
        if kind == "full_disk":
            with self._full_disk():
                return self.attempt(folder, layout, None, full=True)
        ended = self.attempt(folder, layout, kind if kind in KILLS else self.draw.choice(KILLS))
        if kind in HARMS and not ended:
            harm(folder, kind, self.draw)
        return ended

    @contextlib.contextmanager
    def _full_disk(self) -> Iterator[None]:
        ballast = self.folder / "ballast"
        free = shutil.disk_usage(self.folder).free
        with open(ballast, "wb") as file:
            file.write(b"\0" * max(0, free - self.draw.randrange(100_000, 1_500_000)))
        yield
        ballast.unlink()

    def attempt(self, folder: Path, layout: str, fault: str | None, full: bool = False) -> bool:
        """One start of the same command; True when the run has ended."""
        whole, present = whole_checkpoints(folder)
        before = resumed_at(folder) if folder.exists() else None
        process = start(folder, LAYOUTS[layout][0], self.argv(folder, layout))
        hit = kill(process, fault, self.draw, self.reference(layout)[2]) if fault else False
        code = wait(process)
        process.kill_all()  # ranks of a launcher that was killed
        self.check_start(folder, whole, present, before, code, hit, full)
        if shm_files():
            time.sleep(0.5)
        return code == 0 or (code == 2 and not full and not whole and present > 0)

    def check_start(
        self, folder: Path, whole: list[int], present: int, before: int | None, code: int | None, hit: bool, full: bool
    ) -> None:
        after = resumed_at(folder)
        if code is None:
            self.fail("hang", f"no end within {TIMEOUT_S} s", folder)
        elif code == 2 and not whole and present:
            self.counts["refused beside damaged checkpoints only"] += 1
        elif full:
            self.counts[f"full disk: exit {code}"] += 1
            if code not in (0, 2):
                self.fail("unloadable", f"exit code {code} on a full disk", folder)
        elif code != 0 and not hit:
            self.fail("unloadable", f"exit code {code} without a kill; whole {whole} of {present}", folder)
        elif code == 0 and whole and after != max(whole):
            kind = "silent_restart" if after is None or after == before else "unloadable"
            self.fail(kind, f"went on from {after}, newest whole {max(whole)}", folder)

    def check_result(self, folder: Path, layout: str) -> None:
        """At its end a run has the losses and the very files of the uninterrupted one."""
        _, present = whole_checkpoints(folder)
        if present and not whole_checkpoints(folder)[0]:
            return  # refused, and rightly so
        expected = self.reference(layout)
        found = losses(folder)
        steps = [i + 1 for i, pair in enumerate(zip(found, expected[0], strict=False)) if pair[0] != pair[1]]
        files = ck.state_files(folder, STEPS)
        other = [name for name in expected[1] if files.get(name) != expected[1][name]]
        if steps or other or len(found) != STEPS:
            text = f"{layout}: {len(found)} of {STEPS} steps, losses differ at {steps}, files differ: {other}"
            self.fail("wrong_bits", text, folder)
        self.counts["runs brought to their end"] += 1
        for name in shm_files():
            self.fail("shm", name, folder)


def preload() -> None:
    """What every rank imports, once, before any fork. Nothing there starts a thread."""
    os.environ.update(environment())
    importlib.import_module("tests.preload")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_seconds", type=float, default=float("inf"))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    args = parser.parse_args()
    began = time.monotonic()
    preload()
    with small_disk(64) as (folder, can_fill):
        atexit.register(shutil.rmtree, SIDE, ignore_errors=True)
        torture = Torture(folder, can_fill, args.seed, args.layouts)
        done = torture.rounds(args.rounds, args.max_seconds)
    kinds = ("unloadable", "silent_restart", "wrong_bits", "hang", "shm")
    result: dict[str, Any] = {
        "rounds": done,
        "seconds": round(time.monotonic() - began, 1),
        "failures": {kind: torture.counts.pop(kind, 0) for kind in kinds},
        "counts": dict(sorted(torture.counts.items())),
    }
    for failure in torture.failures:
        print(json.dumps(failure, indent=1), file=sys.stderr)
    print(json.dumps(result))
    return int(any(result["failures"].values()))


if __name__ == "__main__":
    sys.exit(main())
