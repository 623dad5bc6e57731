"""metrics.jsonl: what a run measured, one strict JSON object a line, written by one rank."""

import json
import math
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"

# The contract of docs and checks: exactly these fields, in this order. Units are in the names.
FIELDS: dict[str, tuple[str, ...]] = {
    "train": (
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_processed",
        "tokens_total",
        "step_time_s",
        "tokens_per_second",
        "tokens_per_second_per_device",
        "model_tflops_per_second_per_device",
        "mfu",
        "peak_device_memory_gib",
        "host_memory_gib",
        "data_time_s",
    ),
    "eval": ("step", "loss", "perplexity", "tokens"),
    "save": ("step", "bytes", "stall_s", "total_s"),
    "event": ("step", "name", "text"),
    "summary": (
        "exit_code",
        "reason",
        "steps",
        "median_step_time_s",
        "median_tokens_per_second",
        "median_tokens_per_second_per_device",
        "median_model_tflops_per_second_per_device",
        "median_mfu",
        "median_data_time_s",
    ),
}
MEDIANS = tuple(name for name in FIELDS["summary"] if name.startswith("median_"))


class MetricsWriter:
    """Appends lines to `run_dir/metrics.jsonl`; the file is made by the first line.

    A non-finite value is written as null and followed by an event `non_finite` that names it. Each line is one
    system call, so a reader or a kill sees whole lines; a line that the disk refuses is taken back and the OSError
    passes on. Any thread may write. With enabled=False (every rank but one) nothing is written.
    """

    def __init__(self, run_dir: str | os.PathLike, enabled: bool = True):
        self._path = Path(run_dir) / METRICS_FILE
        self._enabled = enabled
        self._fd: int | None = None
        # Reentrant: a signal handler may write an event while its own thread is inside `write`.
        self._lock = threading.RLock()

    def write(self, kind: str, **fields: Any) -> None:
        """One line of `kind` with exactly the fields of `FIELDS[kind]`; None is written as null."""
        if not self._enabled:
            return
        assert set(fields) == set(FIELDS[kind]), f"{kind}: fields differ: {set(fields) ^ set(FIELDS[kind])}"
        line = {"kind": kind, **{name: fields[name] for name in FIELDS[kind]}}
        bad = {name: value for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
        text = json.dumps({**line, **dict.fromkeys(bad)}, allow_nan=False) + "\n"
        if bad:
            step = line.get("step", line.get("steps"))
            words = f"{kind} line: " + ", ".join(f"{name} is {value}" for name, value in bad.items())
            event = {"kind": "event", "step": step, "name": "non_finite", "text": words}
            text += json.dumps(event, allow_nan=False) + "\n"
        self._append(text.encode())

    def _append(self, data: bytes) -> None:
        with self._lock:
            if self._fd is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                _drop_half_line(self._path)
                self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            size = os.fstat(self._fd).st_size
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError:
                os.ftruncate(self._fd, size)
                raise

    def close(self) -> None:
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None


def _drop_half_line(path: Path) -> None:
    """Cut what a killed writer left after the last newline."""
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl (or of the run folder that holds one); none where there is no file.

    A last line without its newline (a killed writer) is left out; any other broken line raises ValueError with its
    number.
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(json.loads(text, parse_constant=_refuse_constant))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return lines


def truncate_to_step(run_dir: str | os.PathLike, step: int, open_steps: int = 0) -> dict[str, Any] | None:
    """Take the file back to a restored step; the caller then appends its event `resume`. Rank zero only.

    Kept are lines whose step is at most `step`. Summaries go: one closes the file, and this run goes on. `open_steps`
    is the number of steps in the restored window (`Monitor.load_state_dict` returns it): a train line that a stop
    wrote for a part of that window goes too, since the whole window is written later.

    Returns the last summary that was dropped, or None: how the run before ended. The file is replaced in one rename.
    """
    lines = read_metrics(run_dir)
    last_step = {"train": step - open_steps}
    kept = [x for x in lines if x["kind"] != "summary" and x["step"] <= last_step.get(x["kind"], step)]
    path = Path(run_dir) / METRICS_FILE
    if path.exists():
        scratch = path.with_suffix(".jsonl.new")
        with open(scratch, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    return next((line for line in reversed(lines) if line["kind"] == "summary"), None)


def median_fields(train_lines: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """The `median_*` fields of a summary: over the train lines of one attempt, nulls left out."""
    import statistics

    train_lines = list(train_lines)
    columns = {name: [x[name.removeprefix("median_")] for x in train_lines] for name in MEDIANS}
    finite = {name: [v for v in column if v is not None and math.isfinite(v)] for name, column in columns.items()}
    return {name: statistics.median(values) if values else None for name, values in finite.items()}


def append_missing_summary(run_dir: str | os.PathLike, exit_code: int, reason: str) -> bool:
    """Close the file of a run that could not (SIGKILL). True if a summary was missing and is now there."""
    lines = read_metrics(run_dir)
    if not lines or lines[-1]["kind"] == "summary":
        return False
    resumed = max((i for i, x in enumerate(lines) if x["kind"] == "event" and x["name"] == "resume"), default=0)
    train = [x for x in lines[resumed:] if x["kind"] == "train"]
    steps = max((x["step"] for x in lines if x.get("step") is not None), default=0)
    writer = MetricsWriter(run_dir)
    writer.write("summary", exit_code=exit_code, reason=reason, steps=steps, **median_fields(train))
    writer.close()
    return True
