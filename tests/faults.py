"""Runs of the trainer in which something goes wrong at a chosen step.

    with start(tmp_path, "hang@3:1", "--hang_timeout", "5", ranks=2) as run:      # rank 1 hangs in its third step
        assert run.wait() == [76, 76]
    python tests/faults.py --faults=kill@3:1 --deepspeed_config ...               # the same, for a launcher

Faults, each `KIND@STEP:RANK`, several with commas: nan (the loss), hang (sleeps), spin (C code that holds the
interpreter lock), kill (SIGKILL), stop (SIGSTOP), raise, TERM, INT and USR1 (a signal to itself), evalTERM (the same in
the second batch of an evaluation).
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from tests import forked
from tests.distributed import parity
from tests.launch import ROOT

SCRIPT = ROOT / "tests" / "faults.py"
CONFIG = parity.SGD | {"optimizer": {"type": "SGD", "params": {"lr": 0.01}}}


def install(faults: str, rank: int) -> None:
    """Patch the engine of this process."""
    from dstrain import engine, pipe_engine
    from dstrain.models import pipeline_module

    mine = {}
    for fault in filter(None, faults.split(",")):
        kind, _, place = fault.partition("@")
        step, _, of_rank = place.partition(":")
        if int(of_rank or 0) == rank:
            mine[int(step)] = kind
    count = {"train": 0, "eval": 0}

    def faulty_train_batch(train_batch: Any, self: Any, batches: Any) -> Any:
        count["train"] += 1
        strike(mine.get(count["train"], ""))
        return train_batch(self, batches)

    def faulty_token_loss(token_loss: Any, *args: Any) -> Any:
        loss, tokens = token_loss(*args)
        return (loss * float("nan") if mine.get(count["train"]) == "nan" and loss.requires_grad else loss), tokens

    def faulty_eval_batch(eval_batch: Any, self: Any, batches: Any) -> Any:
        count["eval"] += 1
        if mine.get(count["train"], "").startswith("eval") and count["eval"] == 2:
            strike(mine[count["train"]].removeprefix("eval"))
        return eval_batch(self, batches)

    for kind in (engine.ZeroEngine, pipe_engine.PipeEngine):
        kind.train_batch = in_place_of(faulty_train_batch, kind.train_batch)
        kind.eval_batch = in_place_of(faulty_eval_batch, kind.eval_batch)
    for module in (engine, pipeline_module):
        module.token_loss = partial(faulty_token_loss, module.token_loss)


def in_place_of(function: Any, method: Any) -> Any:
    """`method` of a class, with `function(method, self, ...)` in its place."""
    return lambda self, *args: function(method, self, *args)


def strike(kind: str) -> None:
    if kind == "hang":
        time.sleep(600)
    elif kind == "spin":
        ctypes.PyDLL(None).sleep(600)
    elif kind == "raise":
        raise RuntimeError("a fault on purpose")
    elif kind in ("TERM", "INT", "USR1", "kill", "stop"):
        os.kill(os.getpid(), getattr(signal, "SIG" + kind.upper()))


class FaultyRun:
    """Ranks under way. Leaving the context ends what is left of them."""

    def __init__(self, folder: Path, processes: Sequence[Any]):
        self.folder = folder / "run"
        self.inputs = folder
        self.processes = processes

    def __enter__(self) -> "FaultyRun":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, timeout_s: float = 60.0) -> list[int | None]:
        """The exit codes of the ranks; None for one that still runs."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def wait_for_step(self, step: int, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if any(line["step"] >= step for line in self.metrics("train")):
                return
            time.sleep(0.02)
        raise AssertionError(f"no step {step} in {timeout_s} s\n{self.stderr(0)}")

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if kind is None or row["kind"] == kind]

    def events(self, name: str) -> list[str]:
        return [line["text"] for line in self.metrics("event") if line["name"] == name]

    def stderr(self, rank: int) -> str:
        path = self.inputs / f"rank{rank}.err"
        return path.read_text() if path.exists() else ""


def flags(folder: Path, config: dict[str, Any] = CONFIG, model: dict[str, Any] = parity.LLAMA) -> list[str]:
    """The inputs of a run, written into `folder`, and the flags that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(model))
    (folder / "ds.json").write_text(json.dumps(config))
    return [
        *("--deepspeed_config", str(folder / "ds.json"), "--config_name", str(folder / "model.json")),
        *("--output_dir", str(folder / "run"), "--report_to", "none", "--block_size", "64", "--max_eval_batches", "5"),
    ]


def start(
    folder: Path,
    faults: str = "",
    *more: str,
    ranks: int = 1,
    config: dict[str, Any] = CONFIG,
    model: dict[str, Any] = parity.LLAMA,
) -> FaultyRun:
    """Start ranks from a warm fork server, in `folder`, whose run is in `folder/run`."""
    argv = [*flags(folder, config, model), *more]
    return FaultyRun(folder, forked.start(argv, ranks, folder, partial(install, faults)))


if __name__ == "__main__":
    from dstrain.resilience.exits import ignore_stop_signals
    from dstrain.train import main

    chosen = [word for word in sys.argv[1:] if word.startswith("--faults=")]
    install(",".join(word.removeprefix("--faults=") for word in chosen), int(os.environ.get("RANK", 0)))
    exit_code = main([word for word in sys.argv[1:] if word not in chosen])
    ignore_stop_signals()
    sys.exit(exit_code)
