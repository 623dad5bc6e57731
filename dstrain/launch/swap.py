"""A folder of its own for what each rank swaps to NVMe.

DeepSpeed (0.19.8: `_configure_tensor_swapping`, `AsyncPartitionedParameterSwapper`) names its files by rank and
parameter number only, `nvme_path/zero_stage_3/optimizer/rank0/7.tensor.swp`: two runs with one `nvme_path` overwrite
each other's moments without a word, and nobody ever deletes them. So each rank swaps to `nvme_path/dstrain_*`, on which
it holds a lock as long as it lives; what dead ranks left is deleted by the next start.
"""

import copy
import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from dstrain.config import ResolvedConfig
from dstrain.errors import UserError

_PREFIX = "dstrain_"
_BLOCKS = ("offload_optimizer", "offload_param")


@dataclass
class SwapFolders:
    """The folders of this rank; leaving the context deletes them.

    claimed: nvme_path as the user wrote it -> (folder in it, the descriptor that holds the lock).
    """

    claimed: dict[str, tuple[Path, int]] = field(default_factory=dict)

    def __enter__(self) -> "SwapFolders":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def localize(self, resolved: ResolvedConfig) -> ResolvedConfig:
        """With this rank's own folders as `nvme_path`; the same object where nothing is swapped.

        Raises UserError where a folder cannot be made.
        """
        zero = resolved.deepspeed["zero_optimization"]
        swapped = [name for name in _BLOCKS if (zero.get(name) or {}).get("device") == "nvme"]
        if not swapped:
            return resolved
        config = copy.deepcopy(resolved.deepspeed)
        for name in swapped:
            block = config["zero_optimization"][name]
            block["nvme_path"] = str(self._claim(block["nvme_path"]))
        return replace(resolved, deepspeed=config)

    def _claim(self, nvme_path: str) -> Path:
        if nvme_path not in self.claimed:
            try:
                Path(nvme_path).mkdir(parents=True, exist_ok=True)
                remove_stale(Path(nvme_path))
                self.claimed[nvme_path] = _new_locked_folder(nvme_path)
            except OSError as error:
                raise UserError(
                    f"nvme_path {nvme_path} cannot be used ({error.strerror}): name a folder on a fast local disk"
                ) from None
        return self.claimed[nvme_path][0]

    def close(self) -> None:
        """A second call does nothing."""
        while self.claimed:
            _, (folder, lock) = self.claimed.popitem()
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def swapped_bytes(resolved: ResolvedConfig) -> int:
    """What this rank has on NVMe now, in blocks of the disk. resolved: as `localize` returned it."""
    zero = resolved.deepspeed["zero_optimization"]
    blocks = [zero[name] for name in _BLOCKS if (zero.get(name) or {}).get("device") == "nvme"]
    paths = {path for block in blocks for path in Path(block["nvme_path"]).rglob("*")}
    return sum(path.stat().st_blocks * 512 for path in paths if path.is_file())


def _new_locked_folder(parent: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # `remove_stale` of another rank saw it before it was locked
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return folder, lock
        os.close(lock)


def remove_stale(parent: Path) -> list[Path]:
    """Delete the folders that no process holds any more; returns them."""
    removed = []
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # another user's, or gone
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
        except OSError:  # a living rank swaps there
            pass
        finally:
            os.close(lock)
    return removed
