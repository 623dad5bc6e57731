"""The parts of a run that survives, one by one; tests/distributed has them in real runs."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch

from dstrain.errors import NonFiniteError
from dstrain.resilience import recorder, watchdog
from dstrain.resilience.causes import how_it_ended, rename_error
from dstrain.resilience.guard import Guard
from dstrain.resilience.signals import AgreedStop, launchers_above
from tests.launch import ROOT, environment


def run_python(code: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
    )


def test_the_exit_timer_needs_no_interpreter_lock():
    code = "import ctypes\nfrom dstrain.resilience.exits import ExitTimer\ntimer = ExitTimer(76)\ntimer.push(30)\n"
    start = time.monotonic()
    assert run_python(code + "timer.push(0.2)\nctypes.PyDLL(None).sleep(30)").returncode == 76
    assert time.monotonic() - start < 10
    assert run_python(code + "timer.push(0.2)\ntimer.cancel()\nimport time; time.sleep(0.5)").returncode == 0


def test_last_words_that_hang_do_not_keep_a_process():
    code = "import time\nfrom dstrain.resilience.exits import exit_now\nexit_now(77, lambda: time.sleep(30), 0.2)"
    assert run_python(code).returncode == 77


SIGNALLED = """
import os, signal, time
from pathlib import Path
from dstrain.resilience.signals import AgreedStop
stop = AgreedStop(Path({folder!r}))
assert stop.agreed() is None
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.1)
os.kill(os.getpid(), signal.SIGTERM)   # forwarded by a launcher: the same wish
time.sleep(0.1)
print(stop.agreed(), flush=True)
time.sleep(0.4)
os.kill(os.getpid(), signal.SIGINT)
import ctypes
ctypes.CDLL(None).sleep(30)            # the main thread is in C code
"""


def test_the_first_signal_is_a_wish_and_the_second_an_end(tmp_path):
    done = run_python(SIGNALLED.format(folder=str(tmp_path)))
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stdout == "signal SIGUSR1\n"


def test_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    stop = AgreedStop(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is not before
    stop.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_stop_file_is_removed_once_honoured(tmp_path):
    stop = AgreedStop(tmp_path)
    (tmp_path / "stop").touch()
    assert stop.agreed() == "the stop file" and stop.agreed() == "the stop file"
    assert not (tmp_path / "stop").exists()
    stop.close()


def test_the_deadline(tmp_path):
    stop = AgreedStop(tmp_path, time.clock_gettime(time.CLOCK_BOOTTIME) + 0.05)
    assert stop.agreed() is None
    time.sleep(0.06)
    assert stop.agreed() == "--max_time is over"
    stop.close()


def test_a_shell_is_no_launcher():
    assert launchers_above() == []


def test_the_daemon_of_a_slurm_step_is_a_launcher(monkeypatch):
    """It writes `slurmstepd: [JOB.STEP]` over its own command line."""
    words = ["slurmstepd: [7.0]", "-c", "print(flush=True); input()"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, executable=sys.executable, stdin=pipe, stdout=pipe) as daemon:
        daemon.stdout.readline()
        monkeypatch.setattr(os, "getppid", lambda: daemon.pid)
        assert [pid for pid, _ in launchers_above()] == [daemon.pid]
        daemon.kill()


@dataclass
class Result:
    loss: torch.Tensor
    grad_norm: object = 1.0
    rank_loss: object = 1.0
    skipped: bool = False


def result(loss: float, grad_norm: object = 1.0, skipped: bool = False) -> Result:
    return Result(torch.tensor(loss, dtype=torch.float64), grad_norm, loss, skipped)


def build_guard(**options) -> tuple[Guard, list[tuple]]:
    events: list[tuple] = []
    return Guard(event=lambda *event: events.append(event), batch=lambda: "samples 7 'text'", **options), events


@pytest.mark.parametrize("bad", [(float("nan"), 1.0), (float("inf"), 1.0), (2.0, float("nan")), (2.0, -1.0)])
def test_what_is_not_finite_stops(bad):
    guard, _ = build_guard()
    guard.check(1, result(2.0, torch.tensor(1.0)))
    guard.check(2, result(2.0, None))
    with pytest.raises(NonFiniteError, match=r"step 3: .* rank 0: samples 7 'text'"):
        guard.check(3, result(*bad))


def test_batches_are_left_out_up_to_the_number_allowed():
    guard, events = build_guard(allowed=2)
    guard.check(1, result(2.0))
    for _ in range(2):
        guard.check(1, result(float("nan"), skipped=True))
    assert [(step, name) for step, name, _ in events] == [(1, "non_finite")] * 2
    with pytest.raises(NonFiniteError, match="after 2 that were left out"):
        guard.check(1, result(float("nan"), skipped=True))


def test_spoiled_weights_stop_whatever_is_allowed():
    guard, _ = build_guard(allowed=5)
    with pytest.raises(NonFiniteError, match="weights are spoiled"):
        guard.check(1, result(float("nan")))


def test_an_overflow_of_the_fp16_scaler_is_its_own_business_but_a_loss_is_not():
    guard, _ = build_guard(scaled=True)
    guard.check(0, result(2.0, float("inf"), skipped=True))
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        guard.check(0, result(float("nan"), skipped=True))


def test_the_end_of_the_fp16_scale_is_non_finite():
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(1.0, 1000, 1.0, 1, False)
    with pytest.raises(Exception, match="minimum") as raised:
        scaler.update_scale(True)
    assert how_it_ended(rename_error(raised.value))[0] == 77
    error = ValueError("other")
    assert rename_error(error) is error and how_it_ended(error) == (1, "ValueError: other")


def test_a_full_disk_is_for_the_user_to_mend():
    code, reason = how_it_ended(rename_error(OSError(errno.ENOSPC, "No space left on device", "runs/a/x")))
    assert code == 2 and reason.startswith("runs/a/x: No space left on device: free space")
    assert how_it_ended(rename_error(PermissionError(errno.EACCES, "no")))[0] == 1


def test_a_spike_is_one_event_and_noise_is_none():
    guard, events = build_guard()
    losses = [3.0 - 0.01 * step + 0.02 * (step % 3) for step in range(40)]
    for step, loss in enumerate([*losses, 6.0, 6.1, *losses[30:], 7.0], start=1):
        guard.check(step, result(loss))
    assert [(step, name) for step, name, _ in events] == [(41, "loss_spike"), (53, "loss_spike")]


def test_readings_are_recorded_before_they_are_judged():
    seen = []
    guard, _ = build_guard(record=seen.append)
    with pytest.raises(NonFiniteError):
        guard.check(1, result(float("nan")))
    assert [reading.step for reading in seen] == [1]


def test_the_ring_keeps_the_last_steps_and_survives_a_kill(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from dstrain.resilience.recorder import Recorder
ring = Recorder(Path({str(tmp_path)!r}), 3, host="here")
for step in range(1, 400):
    ring.write(step=step, loss=float("nan") if step == 399 else 1.0, ids=list(range(16)))
ring.amend(grad_norm=2.0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_python(code).returncode == -signal.SIGKILL
    header, steps = recorder.read_ring(recorder.ring_file(tmp_path, 3))
    assert header["rank"] == 3 and header["host"] == "here" and abs(header["time"] - time.time()) < 60
    assert [step["step"] for step in steps] == list(range(400 - 256, 400))
    assert steps[-1]["loss"] == "nan" and steps[-1]["grad_norm"] == 2.0 and steps[-1]["rss_mib"] > 1


def test_a_new_ring_keeps_the_one_before(tmp_path):
    for start in range(3):
        ring = recorder.Recorder(tmp_path, 0)
        ring.write(step=start)
        ring.close()
    assert recorder.read_ring(tmp_path / "steps_rank_0.ring")[1][0]["step"] == 2
    assert recorder.read_ring(tmp_path / "steps_rank_0.ring.1")[1][0]["step"] == 1


def test_limits_of_the_watchdog():
    chosen = watchdog.Watchdog(0, timeout_s=5.0, pauses=True)
    for activity in ("start", "loading"):  # what takes what it takes, but not for ever
        chosen.beat(activity, 0)
        assert chosen.limit_s == watchdog.FLOOR_S[activity] > 5.0
    chosen.beat("step", 1)
    assert chosen.limit_s == 5.0
    chosen.beat("evaluation", 1)
    assert chosen.limit_s == watchdog.COMPILE_S  # the first batch compiles
    chosen.beat("evaluation", 1)
    assert chosen.limit_s == 5.0
    chosen.close()
    compiled = watchdog.Watchdog(0, pauses=True)
    compiled.beat("step", 1)
    assert compiled.limit_s == watchdog.PAUSE_S
    compiled.close()
    automatic = watchdog.Watchdog(0)
    automatic.beat("step", 1)
    automatic.beat("step", 2)
    assert automatic.limit_s == watchdog.FLOOR_S["step"] < automatic.group_timeout_s
    automatic._steps.extend([60.0] * 50)
    assert automatic.limit_s == 60.0 * watchdog.MEDIAN_STEPS
    automatic.close()


@pytest.mark.parametrize("stuck", ["ctypes.CDLL(None).sleep(60)", "ctypes.PyDLL(None).sleep(60)"])
def test_the_watchdog_ends_a_process_that_is_stuck(stuck, tmp_path):
    """In C code, and in C code that holds the interpreter lock."""
    code = f"""
import ctypes, time
from pathlib import Path
from dstrain.resilience import watchdog
watchdog._MARGIN_S = 0.5
dog = watchdog.Watchdog(1, timeout_s=0.5,
    last_words=lambda code, name, text: Path({str(tmp_path)!r}, "words").write_text(f"{{int(code)}} {{name}} {{text}}"))
dog.attach(Path({str(tmp_path)!r}), lambda: "samples 5")
dog.beat("step", 7)
def stand_here():
    {stuck}
stand_here()
"""
    done = run_python(code)
    assert done.returncode == 76, done.stderr
    text = done.stderr if "PyDLL" in stuck else (tmp_path / "hang_rank_1.txt").read_text()
    assert "in stand_here" in text
    if "PyDLL" not in stuck:
        assert "last completed step 7: samples 5" in text
        assert (tmp_path / "words").read_text().startswith("76 hang no progress for 1 s in step 8")
