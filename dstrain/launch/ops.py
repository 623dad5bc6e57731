"""Build DeepSpeed's C++ ops before a run needs them.

    python -m dstrain.launch.ops --deepspeed_config ds_configs/zero2.json   # what this file needs
    python -m dstrain.launch.ops                                            # every op that training uses here

DeepSpeed compiles an op when a rank first asks for it: minutes without a message, while the other ranks wait on a file
called `lock`. That file outlives a killed build, and then every later job waits for ever.
"""

import argparse
import contextlib
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from dstrain.errors import ExitCode, UserError

# Builder -> seconds that its build takes on two cores, as measured with deepspeed 0.19.8 and g++ 12 (CPU).
CPU_BUILDERS = {
    "ShareMemCommBuilder": 20,
    "FusedAdamBuilder": 45,
    "CPUAdamBuilder": 45,
    "CPUAdagradBuilder": 30,
    "CPULionBuilder": 45,
    "PinMemoryBuilder": 15,
    "AsyncIOBuilder": 75,
}
CUDA_BUILDERS = {
    "FusedAdamBuilder": 60,
    "CPUAdamBuilder": 60,
    "CPUAdagradBuilder": 40,
    "CPULionBuilder": 60,
    "FusedLionBuilder": 60,
    "FusedLambBuilder": 60,
    "PinMemoryBuilder": 20,
    "AsyncIOBuilder": 90,
}
# File systems that other hosts write too: their builders are not in this host's process table.
_SHARED_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "fuse.sshfs", "9p", "afs")
_FOREIGN_BUILD_S = 1800.0


@dataclass(frozen=True)
class BuiltOp:
    """One op that is ready to load; `seconds` is 0 if it was up to date."""

    name: str
    seconds: float


def required_builders(config: dict[str, Any], device: str) -> list[str]:
    """The op builders that a DeepSpeed configuration makes DeepSpeed load.

    config: the DeepSpeed JSON. device: "cpu" or "cuda". Follows `DeepSpeedEngine._configure_basic_optimizer`,
    `TorchBackend.__init__` and the tensor swappers of deepspeed 0.19.8.
    """
    zero = config.get("zero_optimization") or {}
    offloads = [(zero.get(key) or {}).get("device") for key in ("offload_optimizer", "offload_param")]
    on_cpu = offloads[0] in ("cpu", "nvme")
    optimizer = config.get("optimizer") or {}
    kind = str(optimizer.get("type", "AdamW")).lower()
    builders = ["ShareMemCommBuilder"] if device == "cpu" else []
    if kind in ("adam", "adamw", "muon") and not (optimizer.get("params") or {}).get("torch_adam"):
        builders.append("CPUAdamBuilder" if on_cpu else "FusedAdamBuilder")
    elif kind == "adagrad" and on_cpu:
        builders.append("CPUAdagradBuilder")
    elif kind == "lion":
        builders.append("CPULionBuilder" if on_cpu else "FusedLionBuilder")
    elif kind == "lamb":
        builders.append("FusedLambBuilder")
    if "nvme" in offloads:
        builders += ["PinMemoryBuilder", "AsyncIOBuilder"]
    return [name for name in builders if name in (CPU_BUILDERS if device == "cpu" else CUDA_BUILDERS)]


def extensions_root() -> Path:
    """The folder of all compiled ops of this environment (`TORCH_EXTENSIONS_DIR`, or PyTorch's default)."""
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root)
    cuda = torch.version.cuda
    accelerator = "cpu" if cuda is None else "cu" + cuda.replace(".", "")
    return Path(get_default_build_root()) / f"py{sys.version_info.major}{sys.version_info.minor}_{accelerator}"


def lock_holder(lock: Path) -> int | None:
    """The process on this host that builds under `lock`, or None.

    A builder keeps the lock file open until it is done (`torch.utils.file_baton.FileBaton`).
    """
    target = str(lock.resolve())
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if any(os.readlink(entry.path) == target for entry in os.scandir(f"/proc/{pid}/fd")):
                return int(pid)
        except OSError:  # it ended meanwhile, or belongs to another user
            continue
    return None


def _is_shared_between_hosts(path: Path) -> bool:
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    under = [(mount, kind) for mount, kind in mounts if path.resolve().is_relative_to(mount)]
    return max(under, default=("", ""), key=lambda item: len(item[0]))[1] in _SHARED_FILE_SYSTEMS


def stale_locks(root: Path) -> list[Path]:
    """The lock files of builds that no longer run.

    On a file system that other hosts see, a lock must also be older than half an hour.
    """
    stale = []
    for lock in sorted(root.glob("*/lock")):
        with contextlib.suppress(FileNotFoundError):  # its build has just ended
            age_s = time.time() - lock.stat().st_mtime
            if lock_holder(lock) is None and not (age_s < _FOREIGN_BUILD_S and _is_shared_between_hosts(lock)):
                stale.append(lock)
    return stale


def remove_stale_locks(root: Path | None = None, say: Callable[[str], None] = print) -> list[Path]:
    """Delete the `stale_locks`, and say so."""
    removed = stale_locks(extensions_root() if root is None else root)
    for lock in removed:
        lock.unlink(missing_ok=True)
        say(f"removed {lock}: the build that left it is gone")
    return removed


def missing_for_builds(builders: Iterable[str]) -> list[str]:
    """One line per system package that building `builders` needs and this machine lacks."""
    problems = []
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        problems.append(f"no C++ compiler ({compiler}) to build DeepSpeed's ops: apt-get install g++")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        problems.append("no Python.h to build DeepSpeed's ops: apt-get install python3-dev")
    if shutil.which("ninja") is None:
        problems.append("no `ninja` to build DeepSpeed's ops: pip install ninja")
    if not problems and "AsyncIOBuilder" in builders and not _builder("AsyncIOBuilder").is_compatible(verbose=False):
        problems.append("no libaio, which NVMe offload needs: apt-get install libaio-dev")
    return problems


def _builder(name: str):
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(name)
    assert builder is not None, f"deepspeed has no {name}"
    return builder


def ask_cpu_once() -> None:
    """DeepSpeed asks py-cpuinfo twice for each op that it loads, and each question starts a Python: a second.

    https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/op_builder/builder.py, `cpu_arch` and `simd_width`; to be
    removed when they keep the answer.
    """
    import cpuinfo

    if not hasattr(cpuinfo.get_cpu_info, "cache_info"):
        cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)


def is_built(op: str, root: Path) -> bool:
    """Whether `op` was compiled from this environment's own sources; another environment's are compiled anew."""
    import deepspeed

    recipe = root / op / "build.ninja"
    sources = str(Path(deepspeed.__file__).parent)
    return (root / op / f"{op}.so").exists() and recipe.exists() and sources in recipe.read_text()


def unbuilt(builders: Iterable[str], root: Path) -> list[str]:
    return [name for name in builders if not is_built(_builder(name).name, root)]


def every_builder(device: str) -> list[str]:
    """All that training uses here; without libaio, without those of NVMe offload."""
    builders = list(CUDA_BUILDERS if device == "cuda" else CPU_BUILDERS)
    if not _builder("AsyncIOBuilder").is_compatible(verbose=False):
        builders = [name for name in builders if name not in ("PinMemoryBuilder", "AsyncIOBuilder")]
    return builders


def build_ops(builders: Iterable[str], say: Callable[[str], None] = print) -> list[BuiltOp]:
    """Compile what is missing of `builders`, one after another in this process. Returns all of them.

    Raises UserError for a missing system package or a failed build.
    """
    import torch

    from dstrain.distributed import use_own_programs

    builders, root = list(builders), extensions_root()
    use_own_programs()
    ask_cpu_once()
    remove_stale_locks(root, say)
    to_build = unbuilt(builders, root)
    if to_build and (problems := missing_for_builds(to_build)):
        raise UserError(problems)
    usual_s = CUDA_BUILDERS if torch.cuda.is_available() else CPU_BUILDERS
    built = []
    for name in builders:
        builder = _builder(name)
        library = root / builder.name / f"{builder.name}.so"
        before = library.stat().st_mtime_ns if library.exists() else None
        if name in to_build:
            lock = root / builder.name / "lock"
            if lock.exists() and (pid := lock_holder(lock)) is not None:
                say(f"{builder.name}: process {pid} is building it, waiting")
            say(f"building {builder.name} (once; about {usual_s[name]} s on two cores) into {root / builder.name}")
        start = time.monotonic()
        try:
            _load(builder)
        except (RuntimeError, ImportError, OSError) as error:
            raise UserError(f"DeepSpeed's op {builder.name} does not build: {_last_error(str(error))}") from error
        unchanged = library.exists() and library.stat().st_mtime_ns == before
        seconds = 0.0 if unchanged else time.monotonic() - start
        if not unchanged:
            say(f"built {builder.name} in {seconds:.0f} s")
        built.append(BuiltOp(builder.name, seconds))
    return built


def _load(builder: Any) -> None:
    try:
        builder.load(verbose=False)
    except FileNotFoundError:  # a container or host that sees this file, but not this process, took its lock for stale
        builder.load(verbose=False)


def _last_error(output: str) -> str:
    """The compiler's own line out of a build's output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line.lower()), lines[-1] if lines else "no output")[:400]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dstrain.launch.ops", description="Build DeepSpeed's C++ ops.")
    parser.add_argument(
        "--deepspeed_config", action="append", help="build what this file needs; repeatable (default: every op)"
    )
    args = parser.parse_args(argv)
    try:
        import torch

        from dstrain.config import load_config

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.deepspeed_config is not None:
            needed = [required_builders(load_config(path), device) for path in args.deepspeed_config]
            builders = list(dict.fromkeys(chain.from_iterable(needed)))
        else:
            builders = every_builder(device)
            if "AsyncIOBuilder" not in builders:
                print("left out async_io (NVMe offload): no libaio: apt-get install libaio-dev")
        ops = build_ops(builders)
    except UserError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return ExitCode.USER_ERROR
    spent = sum(op.seconds for op in ops)
    print(f"{len(ops)} ops ready ({', '.join(op.name for op in ops)})" + (f", built in {spent:.0f} s" if spent else ""))
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
