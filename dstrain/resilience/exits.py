"""Ends of this process that need nobody's help: not the main thread, not the interpreter lock, not a working disk."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from dstrain.parallel import Launch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHER_DIED = "its launcher has died"
_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2


def speaks_for_host() -> bool:
    """Whether this rank is the one of its host that tells a problem which all of them found.

    The others wait here: a launcher ends all ranks when the first ends, and the one that speaks must be the first.
    """
    if Launch.from_environment().is_main_on_host:
        return True
    time.sleep(3)
    return False


class _SigEvent(ctypes.Structure):
    """struct sigevent of 64-bit Linux (glibc and musl), with the members of SIGEV_THREAD."""

    _fields_ = (
        ("value", ctypes.c_int64),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2))


class ExitTimer:
    """A kernel timer that calls `_exit(code)` in a thread of its own.

    Unlike a Python thread it fires while C code holds the interpreter lock (an extension that spins, a driver that
    does not return), and unlike `faulthandler.dump_traceback_later(exit=True)` it gives the exit code asked for.
    """

    def __init__(self, code: int):
        self._libc = ctypes.CDLL(None, use_errno=True)
        event = _SigEvent(value=code, notify=_SIGEV_THREAD, function=ctypes.cast(self._libc._exit, ctypes.c_void_p))
        self._timer = ctypes.c_void_p()
        if self._libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), "timer_create")

    def push(self, seconds: float) -> None:
        """Fire in so many seconds from now, instead of when it was going to."""
        spec = _TimerSpec()
        spec.value[0], spec.value[1] = int(seconds), int(seconds % 1 * 1e9)
        self._libc.timer_settime(self._timer, 0, ctypes.byref(spec), None)

    def cancel(self) -> None:
        self.push(0)


def ignore_stop_signals() -> None:
    """Until this process ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_now(code: int, last_words: Callable[[], None] = lambda: None, patience_s: float = 10.0) -> NoReturn:
    """End this process from any thread, after `last_words`, or after `patience_s` if they do not come back."""
    ExitTimer(code).push(patience_s + 5)

    def speak() -> None:
        try:
            last_words()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    speaker = threading.Thread(target=speak, name="dstrain-last-words", daemon=True)
    speaker.start()
    speaker.join(patience_s)
    os._exit(code)
