"""Keeps the screen for what dstrain says: all else that a rank prints goes to `logs/rank_N.log`."""

import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TextIO

from dstrain.errors import UserError

_active: "QuietOutput | None" = None


def screen() -> TextIO:
    """Where dstrain writes for a person: the real standard output on rank zero, nothing on other ranks.

    Without a running `QuietOutput` it is sys.stdout.
    """
    return _active.screen if _active is not None else sys.stdout


def printable(text: str) -> str:
    """Without control characters: a young model may write some, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


class QuietOutput:
    """From `start` to `restore`, what Python code prints and warns goes to a file, and so does what C++ code and child
    processes write to file descriptor 1. `screen` still reaches the person.

    `start` comes before torch and deepspeed are imported, since they warn while they are; the text waits in a nameless
    file, because a refused start writes nothing, until `attach` names the run folder. Logged errors also show on
    rank zero's real stderr. Descriptor 2 stays as it is: aborts in C++ speak there. As a context manager it restores
    at the end, so uncaught exceptions print as ever.
    """

    def __init__(self, rank: int):
        self._rank = rank
        self._attached = False
        self.screen: TextIO = sys.stdout

    def start(self) -> "QuietOutput":
        global _active
        assert _active is None, "output is already quiet"
        sys.stdout.flush()
        sys.stderr.flush()
        self._real = (sys.stdout, sys.stderr, warnings.showwarning)
        self._real_fd = os.dup(1)
        path_or_fd = os.dup(1) if self._rank == 0 else os.devnull
        self.screen = open(path_or_fd, "w", buffering=1, errors="replace")  # noqa: SIM115  (lives until restore)
        self._spool = tempfile.TemporaryFile("w+b")  # noqa: SIM115  (lives until restore)
        # Nobody closes this stream: handlers made meanwhile keep it, and may write at interpreter exit.
        self._sink = os.fdopen(os.dup(self._spool.fileno()), "w", buffering=1, errors="backslashreplace")
        os.dup2(self._sink.fileno(), 1)
        sys.stdout = sys.stderr = self._sink
        self._warned: set[tuple] = set()
        warnings.showwarning = self._show_warning_once
        self._handlers: list[tuple[logging.Logger, logging.Handler]] = []
        _active = self
        return self

    def attach(self, run_dir: str | os.PathLike) -> None:
        """Move what was said so far, and all that follows, to `run_dir/logs/rank_N.log`, which is appended to."""
        path = Path(run_dir) / "logs" / f"rank_{self._rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._sink.flush()
        with open(path, "ab") as log:
            log.write(f"--- started {time.strftime('%Y-%m-%d %H:%M:%S %z')}, process {os.getpid()}\n".encode())
            self._spool.seek(0)
            shutil.copyfileobj(self._spool, log)
            log.flush()
            os.dup2(log.fileno(), self._sink.fileno())
            os.dup2(log.fileno(), 1)
        self._attached = True
        self._adopt_loggers()

    def _adopt_loggers(self) -> None:
        """Turn handlers that hold the real streams to the file, and show errors on rank zero's stderr."""
        loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
        on_screen = logging.StreamHandler(self._real[1])
        on_screen.setLevel(logging.ERROR)
        on_screen.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        for logger in (x for x in loggers if isinstance(x, logging.Logger)):
            for handler in logger.handlers:
                if type(handler) is logging.StreamHandler and handler.stream in self._real[:2]:
                    handler.setStream(self._sink)
            ends_here = logger.parent is None or (not logger.propagate and logger.handlers)
            if self._rank == 0 and ends_here:
                logger.addHandler(on_screen)
                self._handlers.append((logger, on_screen))

    def _show_warning_once(self, message, category, filename, lineno, file=None, line=None) -> None:
        """torch warns at every collective: a long run would fill its log with one line."""
        key = (category, str(message), filename, lineno)
        if key not in self._warned:
            self._warned.add(key)
            self._sink.write(warnings.formatwarning(message, category, filename, lineno, line))

    def restore(self) -> None:
        """Give standard output back. A second call does nothing."""
        global _active
        if _active is not self:
            return
        for logger, handler in self._handlers:
            logger.removeHandler(handler)
        self._sink.flush()
        self.screen.flush()
        sys.stdout, sys.stderr, warnings.showwarning = self._real
        os.dup2(self._real_fd, 1)
        os.close(self._real_fd)
        self.screen.close()
        self._spool.close()
        _active = None

    def __enter__(self) -> "QuietOutput":
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None and not self._attached and not issubclass(kind, UserError | SystemExit):
            # A crash before there was a log: what the libraries said may hold the cause.
            self._sink.flush()
            self._spool.seek(0)
            self._real[1].write(self._spool.read().decode(errors="replace"))
        self.restore()


def quiet_third_parties(run_dir: str | os.PathLike, rank: int) -> QuietOutput:
    """`QuietOutput` started and attached in one call, for a run folder that exists."""
    quiet = QuietOutput(rank).start()
    quiet.attach(run_dir)
    return quiet
