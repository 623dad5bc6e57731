"""glibc's heap, set so that a rank on a CPU uses again what it has freed.

PyTorch asks for aligned memory. glibc (before 2.38) cuts what it does not need off both ends of such a block, and keeps
these crumbs for small objects, which then live between large tensors: a freed tensor's place no longer fits the next
one of its size. Without the caches for small blocks the crumbs join their neighbours again. 10 M Llama, 2 ranks, blocks
of 512, above the imports: ZeRO-2 927 -> 750 MiB, ZeRO-3 667 -> 600 MiB, at the same speed (docs/planner.md).

These are environment variables that glibc reads before Python begins: the process starts itself anew, with its pid,
files and arguments as they were.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_TUNABLES = {
    "glibc.malloc.tcache_count": 0,
    "glibc.malloc.mxfast": 0,
    # As high as glibc's own rule lets it rise, from the first step on.
    "glibc.malloc.mmap_threshold": 32 << 20,
    # What a step frees the next one needs: to give it back and to fault it in anew would be a tenth of a step.
    "glibc.malloc.trim_threshold": 1 << 40,
}
_ACCELERATORS = ("nvidia[0-9]*", "kfd", "dxg", "davinci[0-9]*")


def use_own_heap() -> None:
    """Start this process anew with the heap of a rank on a CPU. Nothing where it has it, where there is an accelerator,
    or where the user has set the heap."""
    environment = heap_environment(os.environ, Path("/dev"))
    if environment is not None and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def heap_environment(environment: Mapping[str, str], devices: Path) -> dict[str, str] | None:
    """The environment with the tunables; None where it is to stay as it is. devices: /dev, where accelerators show."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    accelerators = (path for pattern in _ACCELERATORS for path in devices.glob(pattern))
    on_cpu = environment.get("DS_ACCELERATOR", "cpu" if next(accelerators, None) is None else "") == "cpu"
    if not on_cpu or "glibc.malloc." in tunables or any(name.startswith("MALLOC_") for name in environment):
        return None
    own = ":".join(f"{name}={value}" for name, value in _TUNABLES.items())
    return {**environment, "GLIBC_TUNABLES": f"{tunables}:{own}" if tunables else own}
