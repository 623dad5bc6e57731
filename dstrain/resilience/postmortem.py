"""`dstrain postmortem RUN`: why a run ended, from what it left behind, in a page.

    dstrain postmortem runs/a
    dstrain postmortem runs/a --json

It reads files only (metrics.jsonl, run.json, logs/) and, where this machine lets it, the kernel's own account of
processes killed for memory. It needs neither torch nor the machine that the run was on.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dstrain.errors import ExitCode, UserError
from dstrain.monitor.cgroup import memory_group, memory_limit_mib
from dstrain.monitor.metrics import read_metrics
from dstrain.resilience.recorder import read_ring

_SHOWN_STEPS = 5
_ADVICE = {
    ExitCode.FINISHED: "Nothing to do: the run is finished.",
    ExitCode.USER_ERROR: "Mend what the line says, then start again: the run goes on from its newest checkpoint.",
    ExitCode.STOPPED: "Start the same command again: it goes on where it stopped.",
    ExitCode.HUNG: "See the stacks: ranks that stand in different places wait for each other. Starting again goes on "
    "from the newest checkpoint; if it hangs at the same step again, the code or the data is at fault, else a machine.",
    ExitCode.NON_FINITE: "No bad state was saved. Look at the samples named above; then start again with a lower "
    "learning rate, gradient clipping or bf16, or with --skip_nonfinite K to leave such batches out.",
    ExitCode.VERIFY_FAILED: "The configuration does not give the numbers of plain torch: see `dstrain verify`.",
}
_ADVICE_KILLED = (
    "Lower train_micro_batch_size_per_gpu, turn on --gradient_checkpointing, or take more ranks or a higher stage. "
    "Then start again: the run goes on from its newest checkpoint."
)
_ADVICE_CRASH = (
    "Start again: the run goes on from its newest checkpoint. If it ends the same way, the traceback is the lead."
)


@dataclass
class Rank:
    """What the black box of a rank says."""

    rank: int
    pid: int
    host: str
    alive: bool
    steps: list[dict[str, Any]]
    memory_group: str | None = None  # and how many it had killed for memory when the run began
    oom_kills: int | None = None


@dataclass
class Report:
    """The facts and the verdict; `write` makes a page of them."""

    run: str
    exit_code: int | None
    verdict: str
    reason: str
    advice: str
    step: int
    total_steps: int | None
    evidence: list[str] = field(default_factory=list)
    ranks: list[Rank] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[dict[str, Any]] = field(default_factory=list)

    def write(self) -> str:
        of = f" of {self.total_steps}" if self.total_steps else ""
        code = "none written" if self.exit_code is None else str(self.exit_code)
        lines = [f"{self.run}: {self.verdict}", "", f"exit code  {code}", f"reason     {self.reason}"]
        lines += [f"progress   step {self.step}{of}", ""]
        lines += [f"- {text}" for text in self.evidence] + [""] * bool(self.evidence)
        for rank in self.ranks:
            lines.append(
                f"rank {rank.rank} (process {rank.pid} on {rank.host}{', still running' if rank.alive else ''})"
            )
            lines += [f"  {_step_line(step)}" for step in rank.steps[-_SHOWN_STEPS:]]
        for name, rows in (("last events", self.events[-8:]), ("starts", self.restarts[-8:])):
            if rows:
                lines += ["", name] + [f"  {_row(row)}" for row in rows]
        return "\n".join([*lines, "", f"What to do: {self.advice}"])


def _step_line(step: dict[str, Any]) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(step["time"]))
    known = "" if step.get("loss_of_step", step["step"]) == step["step"] else f" (of step {step['loss_of_step']})"
    text = f"{when} step {step['step']}: loss {step.get('loss', '?')}{known}, grad norm {step.get('grad_norm', '?')}"
    text += f", {step['step_time_s']:.3g} s, {step['rss_mib']:,} MiB, samples {step['ids']}"
    return text + (" (left out)" if step.get("skipped") else "")


def _row(row: dict[str, Any]) -> str:
    if "name" in row:
        return f"step {row['step']}: {row['name']}: {row['text'][:300]}"
    return f"start {row['start']}: exit code {row['exit_code']} after {row['steps']} steps: {row['reason'][:200]}"


def examine(folder: Path) -> Report:
    """Read everything that `folder` holds. Raises UserError when it holds no run."""
    if not (folder / "run.json").exists():
        raise UserError(f"{folder} holds no run (no run.json): name a run folder")
    lines = read_metrics(folder)
    summary = lines[-1] if lines and lines[-1]["kind"] == "summary" else None
    ranks = _read_ranks(folder)
    step = max(
        [line["step"] for line in lines if line.get("step")] + [r.steps[-1]["step"] for r in ranks if r.steps] + [0]
    )
    total = json.loads((folder / "run.json").read_text()).get("total_steps")
    report = Report(str(folder), None, "", "", "", step, total, ranks=ranks)
    report.events = [line for line in lines if line["kind"] == "event"]
    report.restarts = _read_jsonl(folder / "logs" / "restarts.jsonl")
    if summary is not None:
        report.exit_code, report.reason = summary["exit_code"], summary["reason"]
    _judge(report, folder)
    return report


def _judge(report: Report, folder: Path) -> None:
    code = report.exit_code
    memory = _memory_evidence(report.ranks)
    killed = code is None or code in (ExitCode.CRASH, 137, -9)
    if code is None and any(rank.alive for rank in report.ranks):
        report.verdict, report.reason, report.advice = "it is still running", "no summary yet", "Wait."
    elif killed and memory:
        report.verdict, report.advice = "a rank was killed because memory ran out", _ADVICE_KILLED
        report.reason = report.reason or "killed before it could write a summary"
        report.evidence += memory
    elif code is None:
        report.verdict = "it was killed (SIGKILL or the end of its machine) before it could write a summary"
        report.reason, report.advice = "nothing was written", _ADVICE_CRASH
    else:
        report.verdict = _verdict(code, report.reason)
        report.advice = _ADVICE.get(code, _ADVICE_CRASH)  # type: ignore[call-overload]
    if code == ExitCode.HUNG:
        report.evidence += _hang_evidence(folder)
    if code == ExitCode.CRASH:
        report.evidence += _tracebacks(folder)
    report.evidence += _memory_trend(report.ranks) + _disk_evidence(folder)


def _verdict(code: int, reason: str) -> str:
    names = {
        ExitCode.FINISHED: "it finished",
        ExitCode.CRASH: "it crashed",
        ExitCode.USER_ERROR: "the disk was full" if "free" in reason or "No space" in reason else "the user's mistake",
        ExitCode.STOPPED: "it was stopped on request, after saving",
        ExitCode.HUNG: "it made no progress and the watchdog ended it",
        ExitCode.NON_FINITE: "a loss or gradient was not a number",
        ExitCode.VERIFY_FAILED: "`verify` found a difference",
    }
    return names.get(code, f"it ended by signal {code - 128}" if code > 128 else "it crashed")  # type: ignore[call-overload]


def _read_ranks(folder: Path) -> list[Rank]:
    ranks = []
    for path in folder.glob("logs/steps_rank_*.ring"):
        header, steps = read_ring(path)
        here = header.get("host") == socket.gethostname()
        alive = here and _is_this_run(header.get("pid", -1), header.get("time", 0.0))
        process = header.get("rank", -1), header.get("pid", -1), header.get("host", "?")
        group = (header.get("memory_group"), header.get("oom_kills")) if here else (None, None)
        ranks.append(Rank(*process, alive, steps, *group))
    return sorted(ranks, key=lambda rank: rank.rank)


def _is_this_run(pid: int, opened: float) -> bool:
    """Whether process `pid` was there when the black box was opened: another may have its number now."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return False
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return fields[0] != "Z" and boot + int(fields[19]) / os.sysconf("SC_CLK_TCK") < opened + 1.0


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _memory_evidence(ranks: list[Rank]) -> list[str]:
    """What the kernel says of the ranks' processes, or their control group of its own; nothing on another machine."""
    ours = {rank.pid: rank.rank for rank in ranks if rank.host == socket.gethostname()}
    found = []
    for line in _kernel_log():
        match = re.search(r"(?:Out of memory|Memory cgroup out of memory): Killed process (\d+).*", line)
        if match and int(match[1]) in ours:
            found.append(f"kernel, of rank {ours[int(match[1])]}: {match[0][:200]}")
    group = memory_group()
    if found or group is None or group.oom_kills is None:
        return found
    before = [rank.oom_kills for rank in ranks if rank.memory_group == str(group.folder) and rank.oom_kills is not None]
    kills = group.oom_kills - min(before, default=group.oom_kills)
    if kills > 0:
        found.append(f"the control group {group.folder} has killed {kills} processes for memory since the start")
    return found


def _kernel_log() -> list[str]:
    if shutil.which("dmesg") is None:
        return []
    done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", check=False, timeout=10)
    return done.stdout.splitlines() if done.returncode == 0 else []


def _memory_trend(ranks: list[Rank]) -> list[str]:
    """Resident sets against what this machine or its control group has."""
    last = {rank.rank: rank.steps[-1]["rss_mib"] for rank in ranks if rank.steps and rank.host == socket.gethostname()}
    if not last:
        return []
    limit, name = memory_limit_mib()
    growth = max(rank.steps[-1]["rss_mib"] - rank.steps[0]["rss_mib"] for rank in ranks if rank.steps)
    text = f"ranks on this host held {sum(last.values()):,} MiB at their last step; {name} is {limit:,} MiB"
    return [f"{text}; a rank grew by {growth:,} MiB over the steps on record"]


def _hang_evidence(folder: Path) -> list[str]:
    """Where the main thread of each rank stood."""
    found = []
    for path in sorted(folder.glob("logs/hang_rank_*.txt")):
        last = path.read_text(errors="replace").rsplit("\n--- ", 1)[-1]
        doing = next((line for line in last.splitlines() if line.startswith("this rank: ")), "")
        # The main thread is the last one that faulthandler prints; its innermost frames come first.
        frames = [line.strip() for line in last.rsplit("hread 0x", 1)[-1].splitlines() if line.startswith("  File")]
        where = " < ".join(frames[:2])
        found.append(f"{path.name}: {doing.removeprefix('this rank: ')}, in {where}")
    return found


def _tracebacks(folder: Path) -> list[str]:
    """The last line of the last traceback of each rank's log."""
    found = []
    for path in sorted(folder.glob("logs/rank_*.log")):
        text = path.read_text(errors="replace").rsplit("\n--- started ", 1)[-1]
        if "Traceback (most recent call last)" in text:
            tail = text.rsplit("Traceback (most recent call last)", 1)[1].splitlines()
            error = next((line for line in tail[1:] if line and not line.startswith(" ")), "")
            found.append(f"{path.name}: {error[:300]}")
    return found


def _disk_evidence(folder: Path) -> list[str]:
    free = shutil.disk_usage(folder).free / 2**30
    names = sorted(p.name for p in folder.glob("checkpoints/step_*") if (p / "manifest.json").exists())
    there = f"newest of {len(names)} checkpoints: {names[-1]}" if names else "no checkpoint"
    return [f"{there}; {free:,.1f} GiB free on its disk now"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder (--output_dir)")
    parser.add_argument("--json", action="store_true", help="the facts as one JSON object")


def run(args: argparse.Namespace) -> int:
    report = examine(Path(args.run))
    print(json.dumps(asdict(report)) if args.json else report.write())
    return int(ExitCode.FINISHED)
