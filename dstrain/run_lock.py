"""The lock of a run folder: who trains into it, as long as that rank lives, seen from every host.

The kernel holds it (POSIX record lock: on NFS, Lustre and the like the server does), so a rank that is killed leaves
nothing that stands in the way. Only a host that crashes keeps its lock on a file server until the server gives the host
up, 90 s by default under NFSv4. So the holder also touches the file: a lock whose file nobody touches is waited for.
"""

import errno
import fcntl
import json
import os
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dstrain.errors import UserError

LOCK_FILE = "lock"
BEAT_S = 2.0
PATIENCE_S = 10.0  # a rank whose launcher is starting again may still be on its way out
CRASHED_HOST_S = 120.0
_NO_LOCKS_HERE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux


@dataclass
class RunLock:
    """Rank 0's hold on a run folder; leaving the context lets go. notice: what keeps it from locking, or None."""

    folder: Path
    notice: str | None = None
    _fd: int | None = None
    _made_folder: bool = False
    _let_go: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def path(self) -> Path:
        return self.folder / LOCK_FILE

    def wait_until_free(self, patience_s: float = PATIENCE_S, crashed_host_s: float = CRASHED_HOST_S) -> None:
        """Give a holder so many seconds to end, if there is one. Writes nothing. Raises UserError, naming the holder.

        crashed_host_s: for the lock of another host which nobody touches.
        """
        start, touched = time.monotonic(), None
        while (seen := self._look()) is not None:
            touched = seen[1] if touched is None else touched
            waited = time.monotonic() - start
            is_alive = seen[0].get("boot_id") == _boot_id() or seen[1] != touched
            if waited > (patience_s if is_alive else crashed_host_s):
                raise UserError(self._in_use(seen[0]))
            time.sleep(min(0.2, patience_s / 4))

    @property
    def is_held(self) -> bool:
        """Whether a living process trains into the folder."""
        return self._look() is not None

    def take(self) -> None:
        """Make the folder if need be, and lock it. Raises UserError, naming the holder."""
        self._made_folder = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _read_holder(fd)
                os.close(fd)
                if error.errno in _NO_LOCKS_HERE:
                    self.notice = f"{self.folder} is not locked against a second start ({error.strerror})"
                    return
                raise UserError(self._in_use(holder)) from None
            if os.fstat(fd).st_nlink:
                break
            os.close(fd)  # its holder let go, and the file with it, meanwhile
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({**_this_process(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode(), 0)
        self._fd = fd
        threading.Thread(target=self._beat, args=(fd,), name="dstrain-lock", daemon=True).start()

    def _beat(self, fd: int) -> None:
        while not self._let_go.wait(BEAT_S):
            with suppress(OSError):  # a file server that is away
                os.utime(fd)

    def release(self) -> None:
        """A second call does nothing. A folder made for a run that never began goes too."""
        if self._fd is None:
            return
        self._let_go.set()
        self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = None
        if self._made_folder:
            with suppress(OSError):  # it holds a run
                self.folder.rmdir()

    def _look(self) -> tuple[dict, int] | None:
        """(holder, when it touched the file); None: nobody holds the lock. Opening asks a file server anew."""
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except OSError:  # no such file; what cannot be read cannot be locked either, and `take` says so
            return None
        try:
            question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, question))[0]
            return None if kind == fcntl.F_UNLCK else (_read_holder(fd), os.fstat(fd).st_mtime_ns)
        except OSError as error:
            if error.errno in _NO_LOCKS_HERE:
                return None
            raise
        finally:
            os.close(fd)

    def _in_use(self, holder: dict) -> str:
        who = "another start" if not holder else "process {pid} on {host} since {since}".format(**holder)
        return (
            f"--output_dir {self.folder} is in use by {who}: stop that run first (touch {self.folder / 'stop'}), or "
            "choose another folder"
        )


def _boot_id() -> str:
    """The kernel that runs now: its locks go with its processes. Host names may come twice, and come back."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _this_process() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": _boot_id()}


def _read_holder(fd: int) -> dict:
    """{} while its holder is writing it."""
    try:
        return json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
