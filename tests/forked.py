"""Ranks of the real entry without their imports: each is forked from a server that has torch and DeepSpeed imported.

    result = train(tmp_path / "run", "--max_steps", "3", ranks=2).check()     # as tests.launch.train, in two seconds

Every run starts in fresh processes all the same. Launchers are not part of it: `tests.launch` starts those.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from tests.launch import PORT, Result, environment


def train(run_dir: Path, *flags: str, ranks: int = 1, timeout_s: float = 120.0) -> Result:
    """`dstrain.train.main` in `ranks` processes; stdout and stderr of rank 0, and the first exit code that is not 0."""
    argv = ["--output_dir", str(run_dir), *map(str, flags)]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        processes = start(argv, ranks, Path(folder))
        timed_out = not finish(processes, timeout_s)
        out, err = (Path(folder, f"rank0.{name}").read_text(errors="replace") for name in ("out", "err"))
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    command = [f"{ranks} forked ranks:", *argv]
    return Result(command, code, out, err, Path(run_dir), time.monotonic() - begin, timed_out)


def start(
    argv: Sequence[str], ranks: int, folder: Path, before: Callable[[int], None] | None = None
) -> list[BaseProcess]:
    """Ranks of train.py that write rank<N>.out and .err into `folder`. before: called with the rank in each, first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with mock.patch.dict(os.environ, environment(), clear=True):
        work = [(list(argv), rank, ranks, str(folder), PORT, before) for rank in range(ranks)]
        processes: list[BaseProcess] = [context.Process(target=_rank, args=args, daemon=True) for args in work]
        for process in processes:
            process.start()
    return processes


def finish(processes: Sequence[BaseProcess], timeout_s: float) -> bool:
    """Wait for all, then end what is left. Whether all had ended by themselves."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    in_time = not any(process.is_alive() for process in processes)
    for process in processes:
        process.kill()
        process.join()
    return in_time


def _rank(
    argv: list[str], rank: int, world_size: int, folder: str, port: int, before: Callable[[int], None] | None
) -> None:
    """One rank, as a launcher would start it."""
    for name, fd in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{folder}/rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from dstrain.train import main

    try:
        if before is not None:
            before(rank)
        code = main(argv)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
