"""Train under Ray: one worker a rank, held by Ray Train's TorchTrainer and started again by its failure policy.

    python -m dstrain.launch.clusters.ray_driver --num_workers 8 --max_restarts 3 -- dstrain/train.py FLAGS

A worker starts our program as a process of its own instead of calling `main` in its thread: signals need a main
thread, the exit code stays the run's, and whatever a crash leaves (memory, a device, ports) goes with the process.
Ray's policy starts again after every error, so codes that no start can mend are returned, not raised.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dstrain.errors import ExitCode, UserError
from dstrain.launch.supervise import FINAL, say
from dstrain.launch.sweep import sweep
from dstrain.launch.words import find_run_folder, flag_value
from dstrain.launch.worlds import stored_global_batch, usable_worlds
from dstrain.monitor.metrics import append_missing_summary, read_metrics
from dstrain.parallel import free_port
from dstrain.run_lock import RunLock

OLD_RANKS_S = 600.0  # ranks that lost their worker save, then end
CUT_OFF_S = 60.0  # Ray ends a worker whose rank has failed at once, if it can reach it
_TELL_AFTER_S = 10.0
LOOK_S = 60.0  # how often Ray looks for hosts that came (back) or went


def run_rank(settings: dict[str, Any]) -> int:
    """In a Ray worker: run our program as this rank. Its exit code, where starting again cannot help.

    settings: words, folder and variables of the program, and how many ranks it wants. Raises RuntimeError for any
    other code, UserError where ranks of the start before do not end.
    """
    import torch.distributed as dist

    folder, rank = Path(settings["output_dir"]), dist.get_rank()
    nodes: list[str] = [""] * dist.get_world_size()
    if os.environ["LOCAL_RANK"] == "0":
        sweep(os.path.basename(settings["words"][0]), str(folder), OLD_RANKS_S)
    dist.all_gather_object(nodes, os.environ["NODE_RANK"])  # all hosts are swept behind this
    start = [_agree(folder, settings, len(nodes)) if rank == 0 else (0, 0)]
    dist.broadcast_object_list(start, src=0)
    port, ranks = start[0]
    if rank >= ranks:
        return int(ExitCode.FINISHED)  # degrees and batch have no use for it
    env = {**os.environ, **settings["env"], "MASTER_PORT": str(port)}  # the one it has is that of Ray's own group
    env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(nodes[:ranks].count(nodes[rank]))}
    words = [sys.executable, "-m", "dstrain.launch.clusters.ray_rank", *settings["words"]]
    code = subprocess.run(words, cwd=settings["cwd"], env=env, start_new_session=True).returncode
    if code not in FINAL:
        cut_off = threading.Timer(CUT_OFF_S, os._exit, (1,))
        cut_off.daemon = True
        cut_off.start()
        raise RuntimeError(f"rank {rank} ended with {code}")
    return code


def _agree(folder: Path, settings: dict[str, Any], workers: int) -> tuple[int, int]:
    """On rank 0: (port of the ranks, how many of the workers become ranks)."""
    RunLock(folder).wait_until_free(OLD_RANKS_S)
    append_missing_summary(folder, ExitCode.CRASH, "ended without a summary under Ray")
    if workers < settings["num_workers"] and stored_global_batch(folder) is None:
        say(f"{workers} of {settings['num_workers']} workers: a run that has not begun waits for all")
        while True:  # Ray begins again with more as soon as they are there
            time.sleep(LOOK_S)
    usable = usable_worlds(settings["words"][1:], folder, range(workers, 0, -1))
    return free_port(), next(usable, workers)  # where it can use none, it says itself why


def wait_for_all(bundles: list[dict[str, float]]) -> None:
    """Until the cluster has room for all workers at once. A run that has not begun needs them: its global batch may
    follow from their number."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(bundles)
    if not group.wait(_TELL_AFTER_S):
        say(f"waits until the Ray cluster has room for {len(bundles)} workers of {bundles[0]}")
    ray.get(group.ready())
    remove_placement_group(group)


def fit(args: argparse.Namespace, words: Sequence[str], folder: Path) -> int | None:
    """The exit code of rank 0; None where the last start failed."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    variables = dict(variable.split("=", 1) for variable in args.env)
    gpus = {"GPU": args.gpus_per_worker} if args.gpus_per_worker else {}
    resources = {"CPU": args.cpus_per_worker, **gpus}
    if stored_global_batch(folder) is None:
        wait_for_all([resources] * args.num_workers)
    fewest = next(usable_worlds(words[1:], folder, range(1, args.num_workers + 1)), args.num_workers)
    words = [os.path.abspath(words[0]), *words[1:]]
    if flag_value(words, "--output_dir") is None:  # by which a sweep knows the run's processes
        words += ["--output_dir", str(folder)]
    trainer = TorchTrainer(
        run_rank,
        train_loop_config={
            "words": words,
            "cwd": os.getcwd(),
            "env": variables,
            "output_dir": str(folder.resolve()),
            "num_workers": args.num_workers,
        },
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=(fewest, args.num_workers),
            elastic_resize_monitor_interval_s=LOOK_S,
            use_gpu=bool(gpus),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str((folder / "logs").resolve()),  # seen by all hosts, as Ray wants it
            failure_config=FailureConfig(max_failures=args.max_restarts),
        ),
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as error:
        say(str(error).strip().splitlines()[-1])
        return None


def exit_code_of(folder: Path) -> int:
    """What the run says of a start that did not end by agreement; a rank that was killed says nothing."""
    if not RunLock(folder).is_held:
        append_missing_summary(folder, ExitCode.CRASH, "ended without a summary under Ray")
    lines = read_metrics(folder)
    return lines[-1].get("exit_code") or ExitCode.CRASH if lines else ExitCode.CRASH


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and return the run's exit code. Raises UserError."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own, words = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(prog="python -m dstrain.launch.clusters.ray_driver", allow_abbrev=False)
    parser.add_argument("--num_workers", type=int, required=True, help="ranks")
    parser.add_argument("--max_restarts", type=int, default=3, help="start again so many times (default: 3)")
    parser.add_argument("--cpus_per_worker", type=int, default=1)
    parser.add_argument("--gpus_per_worker", type=int, default=1, help="0: train on CPUs (default: 1)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for every rank; repeatable")
    args = parser.parse_args(own)
    folder = find_run_folder(words)
    if find_spec("ray") is None:
        raise UserError("Ray is not installed: pip install 'dstrain[ray]'")
    RunLock(folder).wait_until_free()

    def stop(number: int, _: Any) -> None:
        """The ranks agree by the file; the next such signal ends this program, and its workers with it."""
        signal.signal(number, signal.SIG_DFL)
        (folder / "stop").touch()

    import ray

    # Ray's count of a cluster's hosts is up to 20 s old, and 60 s is how long it would wait for one that is gone.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    ray.init()  # a cluster that is there, or one of this host's; it takes the signals that come next
    for number in (signal.SIGTERM, signal.SIGUSR1):  # Ctrl-C is Ray's: it ends the workers, and the ranks save
        signal.signal(number, stop)
    code = fit(args, words, folder)
    return exit_code_of(folder) if code is None else code


if __name__ == "__main__":
    from dstrain.launch.clusters.ray_driver import main as start  # so that workers find `run_rank` by its module

    try:
        sys.exit(start())
    except UserError as error:
        print("\n".join(f"dstrain: error: {problem}" for problem in error.problems), file=sys.stderr)
        sys.exit(error.exit_code)
