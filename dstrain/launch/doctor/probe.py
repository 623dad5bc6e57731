"""What one host says of itself: one JSON object on stdout. `dstrain doctor` runs it on each host.

    echo '{"output_dir": "runs/a"}' | python -m dstrain.launch.doctor.probe

Where packages are missing it still answers, so nothing but the standard library is imported before they are known.
"""

import json
import os
import resource
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstrain.launch.doctor import devices
from dstrain.launch.doctor.interfaces import gloo_address, interfaces, nccl_interfaces
from dstrain.run_folder import code_sha256, missing_packages, package_versions

GIB = 2.0**30
_WRITTEN = bytes(1 << 16)
_SEEN_S = 3.0  # a network file system may show a new file a little later
_RANKS = ("dstrain/train.py", "deepspeed.launcher.launch")


def describe(
    output_dir: str | None = None,
    nvme_path: str | None = None,
    port: int | None = None,
    leave_token: bool = False,
    ops: bool = False,
    deepspeed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The facts. leave_token: leave a file in output_dir, for `seen`. port: whether it is free.

    ops: whether the ops that the configuration `deepspeed` needs (None: all that training uses) are built; that
    imports torch.
    """
    gpus, gpu_problem = devices.gpus()
    missing = missing_packages()
    facts = {
        "versions": package_versions(),
        "missing": missing,
        "code": code_sha256()[:12],
        "commit": _commit(),
        "cpu": devices.cpu(),
        "gpus": gpus,
        "gpu_problem": gpu_problem,
        "memory": _memory(),
        "shm": _space(Path("/dev/shm")),
        "disks": _disks(output_dir, nvme_path, leave_token),
        "network": _network(),
        "port_free": None if port is None else _is_free(port),
        "limits": {name: _limit(name) for name in ("NOFILE", "MEMLOCK")},
        "left": _left_behind(),
        "ops": None,
    }
    if ops and not missing:
        facts["ops"] = _ops(deepspeed, "cuda" if gpus and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu")
    return facts


def seen(files: dict[str, str]) -> list[str]:
    """Which hosts' files are here too. files: host -> path."""
    deadline = time.monotonic() + _SEEN_S
    while True:
        found = [host for host, path in files.items() if Path(path).exists()]
        if len(found) == len(files) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def _commit() -> str | None:
    folder = Path(__file__).parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _memory() -> dict[str, float]:
    from dstrain.monitor.limits import host_limit

    return {"free_gib": host_limit().gib}


def _space(path: Path) -> dict[str, Any]:
    """Of the file system below `path`, which need not be there yet."""
    folder = next(folder for folder in (path, *path.parents) if folder.exists())
    space = os.statvfs(folder)
    return {
        "path": str(path),
        "free_gib": space.f_bavail * space.f_frsize / GIB,
        "size_gib": space.f_blocks * space.f_frsize / GIB,
    }


def _disks(output_dir: str | None, nvme_path: str | None, leave_token: bool) -> dict[str, Any]:
    # tempfile.gettempdir() fails on a full disk instead of naming it
    wanted = {"output_dir": output_dir, "temp": os.environ.get("TMPDIR", "/tmp"), "nvme_path": nvme_path}
    found = {}
    for name, text in wanted.items():
        if text is not None:
            path = Path(text).absolute()
            found[name] = {**_space(path), **_try_to_write(path, keep=leave_token and name == "output_dir")}
    return found


def _try_to_write(path: Path, *, keep: bool) -> dict[str, Any]:
    """Into the first folder of the path that is there. token: the file, if it is to be kept."""
    folder = next(folder for folder in (path, *path.parents) if folder.is_dir())
    file = folder / f".dstrain-doctor-{secrets.token_hex(8)}"
    try:
        with open(file, "wb") as out:
            out.write(_WRITTEN)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        file.unlink(missing_ok=True)
        return {"problem": error.strerror, "token": None}
    if not keep:
        file.unlink()
    return {"problem": None, "token": str(file) if keep else None}


def _network() -> dict[str, Any]:
    names = {name: os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    own = {"name": socket.gethostname(), "gloo": gloo_address(), "nccl": nccl_interfaces()}
    return {**own, "interfaces": interfaces(), "wanted": names}


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True


def _limit(name: str) -> int | None:
    soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
    return None if soft == resource.RLIM_INFINITY else soft


def _left_behind() -> dict[str, Any]:
    """Processes of runs, and segments in /dev/shm that nobody maps, of this user."""
    from dstrain.launch.processes import shared_memory, unmapped

    segments = unmapped(shared_memory())
    return {
        "processes": _processes(),
        "segments": [str(path) for path in segments],
        "segments_gib": sum(path.stat().st_size for path in segments if path.exists()) / GIB,
    }


def _processes() -> list[int]:
    from dstrain.launch.processes import command_line

    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = command_line(int(entry.name))
            own = bool(words) and entry.stat().st_uid == os.getuid() and "python" in os.path.basename(words[0])
        except OSError:  # it ended meanwhile
            continue
        if own and any(word.endswith(_RANKS) for word in words[1:5]):
            found.append(int(entry.name))
    return sorted(found)


def _ops(deepspeed: dict[str, Any] | None, device: str) -> dict[str, Any]:
    from dstrain.distributed import use_own_programs
    from dstrain.launch.ops import (
        ask_cpu_once,
        every_builder,
        extensions_root,
        missing_for_builds,
        required_builders,
        stale_locks,
        unbuilt,
    )

    use_own_programs()
    ask_cpu_once()
    root = extensions_root()
    builders = every_builder(device) if deepspeed is None else required_builders(deepspeed, device)
    to_build: Sequence[str] = unbuilt(builders, root)
    return {
        "folder": str(root),
        "builders": builders,
        "unbuilt": to_build,
        "problems": missing_for_builds(to_build) if to_build else [],
        "stale_locks": [str(lock) for lock in stale_locks(root)],
    }


if __name__ == "__main__":
    order = json.load(sys.stdin)
    print(json.dumps({"seen": seen(order["files"])} if "files" in order else describe(**order)))
