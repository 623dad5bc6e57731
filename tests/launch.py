"""Start the real entry, or any script, in real processes, and read what it left.

    result = train(tmp_path / "run", "--max_steps", "3", ranks=2).check()
    result.losses()                                   # of metrics.jsonl, never of the console
    values = run_workers("tests.distributed.test_x:work", 2, 1.5)    # work(1.5) in two gloo processes

Every process gets one thread, no network and, unless asked otherwise, no GPU. All ranks of a session share one port.
Whatever a run leaves behind (processes, /dev/shm files) is found by a mark in its environment and removed.
"""

import importlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.parallel import free_port

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "dstrain" / "train.py"
BIN = Path(sys.executable).parent
LAUNCHERS = ("python", "torchrun", "deepspeed", "accelerate")
# With the byte-level tokenizer: seconds a run.
TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_MARK = "DSTRAIN_TEST_RUN"
_SHM = Path("/dev/shm")


# One port for all runs of a session: DeepSpeed leaves 66 MiB in /dev/shm for every (port, rank) of a killed run.
PORT = free_port()


@dataclass(frozen=True)
class Result:
    """What one started program left; `seconds` is wall time."""

    command: list[str]
    exit_code: int
    stdout: str
    stderr: str
    run_dir: Path
    seconds: float
    timed_out: bool = False

    def check(self, exit_code: int = 0) -> "Result":
        """Assert the exit code; the failure shows the ends of both outputs."""
        assert self.exit_code == exit_code and not self.timed_out, (
            f"exit code {self.exit_code} (expected {exit_code}{', timed out' if self.timed_out else ''}) after "
            f"{self.seconds:.0f} s: {' '.join(self.command)}\n--- stdout\n{self.stdout[-3000:]}\n"
            f"--- stderr\n{self.stderr[-6000:]}"
        )
        return self

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, or those of one kind. Fails on a line that is not strict JSON."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line, parse_constant=_refuse_constant) for line in lines]
        return [row for row in rows if kind is None or row["kind"] == kind]

    def losses(self) -> list[float]:
        """The training losses, one per line of metrics.jsonl."""
        return [row["loss"] for row in self.metrics("train")]

    def run_json(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "run.json").read_text(), parse_constant=_refuse_constant)


def _refuse_constant(name: str):
    raise AssertionError(f"{name} in strict JSON")


def command_for(launcher: str, ranks: int, script: Path | str, launcher_args: Sequence[str] = ()) -> list[str]:
    """The command line up to the script's own flags."""
    port = str(PORT)
    heads = {
        "python": [sys.executable],
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port],
        "accelerate": [
            *(str(BIN / "accelerate"), "launch", "--num_processes", str(ranks), "--main_process_port", port),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        ],
    }
    assert launcher != "python" or ranks == 1, "plain python starts one process"
    return [*heads[launcher], *launcher_args, str(script)]


def environment(device: str = "cpu", **extra: str) -> dict[str, str]:
    """A rank's environment: one thread, this environment's programs, no hub, no stale launcher variables."""
    launcher_names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in launcher_names and not k.startswith("ACCELERATE_")}
    env |= {
        "PATH": f"{BIN}{os.pathsep}{env.get('PATH', os.defpath)}",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return env | extra


def train(run_dir: Path, *flags: str, script: Path | str = TRAIN, **options: Any) -> Result:
    """`dstrain/train.py --output_dir run_dir flags...`; options as `run` takes them."""
    return run(script, "--output_dir", str(run_dir), *map(str, flags), run_dir=run_dir, **options)


def run(
    script: Path | str,
    *flags: str,
    launcher: str = "python",
    ranks: int = 1,
    launcher_args: Sequence[str] = (),
    run_dir: Path | None = None,
    device: str = "cpu",
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
    timeout_s: float = 240.0,
) -> Result:
    """Start `script` through a launcher and wait for it. Never raises for a failed program: see `Result.check`."""
    command = [*command_for(launcher, ranks, script, launcher_args), *flags]
    return run_command(command, run_dir=run_dir, device=device, env=env, cwd=cwd, timeout_s=timeout_s)


def run_command(
    command: Sequence[str],
    *,
    run_dir: Path | None = None,
    device: str = "cpu",
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
    timeout_s: float = 240.0,
) -> Result:
    """Start any command in its own session; at the end, nothing of it is left running."""
    mark, start = uuid.uuid4().hex, time.monotonic()
    buffers = set(_shm_buffers())
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=cwd,
            env=environment(device, **(env or {}), **{_MARK: mark}),
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            kill_marked(mark)
            process.wait()
            for path in set(_shm_buffers()) - buffers:
                path.unlink(missing_ok=True)
        seconds = time.monotonic() - start
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    where = Path(cwd) if run_dir is None else Path(run_dir)
    return Result(list(command), process.returncode, texts[0], texts[1], where, seconds, timed_out)


def _shm_buffers() -> list[Path]:
    return list(_SHM.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{PORT}_*"))


def children_cpu_s() -> float:
    """Processor seconds of this process's ended children: the wall clock of a busy machine says little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def marked_processes(mark: str) -> list[int]:
    """The processes that carry a run's mark in their environment."""
    found, wanted = [], f"{_MARK}={mark}".encode()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(int(pid))
        except OSError:
            continue
    return found


def kill_marked(mark: str) -> None:
    """End what a run left: a launcher that dies leaves its ranks as orphans."""
    for _ in range(20):
        if not (pids := marked_processes(mark)):
            return
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def run_workers(target: str, world_size: int, *args: Any, timeout_s: float = 120.0, group: str = "gloo") -> list[Any]:
    """`module:function(*args)` in `world_size` processes of one group; returns each rank's value, pickled across.

    group: "gloo" initialises torch.distributed alone, "dstrain" goes through `dstrain.distributed.init_distributed`.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work.pickle"
        work.write_bytes(pickle.dumps((target, group, args)))
        head = command_for("torchrun", world_size, "-m", ("--no_python", sys.executable))
        result = run_command([*head, "tests.launch", str(work)], timeout_s=timeout_s).check()
        assert result.exit_code == 0
        return [pickle.loads(Path(f"{work}.{rank}").read_bytes()) for rank in range(world_size)]


def _worker(work: str) -> None:
    import torch.distributed as dist

    target, group, args = pickle.loads(Path(work).read_bytes())
    if group == "gloo":
        dist.init_process_group("gloo")
    else:
        importlib.import_module("dstrain.distributed").init_distributed()
    module, _, name = target.partition(":")
    value = getattr(importlib.import_module(module), name)(*args)
    Path(f"{work}.{dist.get_rank()}").write_bytes(pickle.dumps(value))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _worker(sys.argv[1])
