"""From the results of steps to the lines of metrics.jsonl, the progress display and the trackers."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dstrain.errors import ExitCode
from dstrain.monitor.devices import peak_memory_gib
from dstrain.monitor.energy import EnergyMeter
from dstrain.monitor.metrics import MetricsWriter, median_fields
from dstrain.monitor.progress import NullProgress
from dstrain.monitor.trackers import EVAL_NAMES, TRAIN_NAMES, NullTrackers

# Ends that all ranks reach together, so that a collective may still run.
AGREED_ENDS = (ExitCode.FINISHED, ExitCode.STOPPED)


@dataclass(frozen=True)
class RunScale:
    """What turns a step's time into rates.

    num_devices: ranks, on CPU too. flops_per_token: model FLOPs, forward and backward, of one processed token; None
    where unknown. peak_tflops: of one device, `devices.find_peak`; None where unknown.
    """

    num_devices: int = 1
    flops_per_token: float | None = None
    peak_tflops: float | None = None

    def rates(self, tokens_per_second: float | None) -> dict[str, float | None]:
        if tokens_per_second is None:
            return dict.fromkeys(("tokens_per_second_per_device", "model_tflops_per_second_per_device", "mfu"))
        per_device = tokens_per_second / self.num_devices
        tflops = per_device * self.flops_per_token / 1e12 if self.flops_per_token else None
        return {
            "tokens_per_second_per_device": per_device,
            "model_tflops_per_second_per_device": tflops,
            "mfu": tflops / self.peak_tflops if tflops is not None and self.peak_tflops else None,
        }


@dataclass
class _Window:
    """Sums over the steps since the last line. Values of `pending` may still be on the device."""

    steps: int = 0
    sums: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("loss", "learning_rate", "step_time_s", "data_time_s"), 0.0)
    )
    grad_norm: float | None = None
    tokens: int = 0
    tokens_processed: int = 0
    pending: list[Any] = field(default_factory=list)

    def settle(self) -> None:
        """Read the pending results. On an accelerator this waits for the device: that time belongs to the steps."""
        waits, start = not self.is_on_host(), time.perf_counter()
        for result in self.pending:
            self.sums["loss"] += float(result.loss)
            self.sums["learning_rate"] += float(result.learning_rate)
            if result.grad_norm is not None:
                self.grad_norm = (self.grad_norm or 0.0) + float(result.grad_norm)
            self.tokens += int(result.tokens)
            self.tokens_processed += int(result.tokens_processed)
        if waits:
            self.sums["step_time_s"] += time.perf_counter() - start
        self.pending.clear()

    def is_on_host(self) -> bool:
        """Whether `settle` cannot wait for a device."""
        values = (v for r in self.pending for v in (r.loss, r.grad_norm, r.tokens, r.tokens_processed))
        return all(getattr(getattr(v, "device", None), "type", "cpu") == "cpu" for v in values)


class Monitor:
    """Every rank calls it; rank zero writes metrics.jsonl and feeds the display and the trackers.

    max_over_ranks: collective maximum of a list of floats, called on all ranks at logging steps and when a run ends by
    agreement. device: torch.device of this rank, whose peak memory is read. total_steps: the last step, which gets its
    line at once even inside a window; None leaves that to `close`.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        *,
        device: Any,
        is_main: bool = True,
        logging_steps: int = 1,
        total_steps: int | None = None,
        scale: RunScale = RunScale(),
        max_over_ranks: Callable[[list[float]], list[float]] = list,
        progress: NullProgress | None = None,
        trackers: NullTrackers | None = None,
        energy: EnergyMeter | None = None,
    ):
        self._writer = MetricsWriter(run_dir, enabled=is_main)
        self._device = device
        self._logging_steps = logging_steps
        self._total_steps = total_steps
        self._scale = scale
        self._max_over_ranks = max_over_ranks
        self._progress = progress or NullProgress()
        self._trackers = trackers or NullTrackers()
        self.energy = energy or EnergyMeter([])
        self._window = _Window()
        self._tokens_total = 0
        self._step = 0
        self._written_step = 0  # of the last train line
        self._lines: list[dict[str, Any]] = []  # of this attempt, for the medians and the curve
        self._eval_lines: list[dict[str, Any]] = []
        self._closed = False

    def on_step(self, step: int, result: Any, step_time_s: float, data_time_s: float) -> None:
        """After an optimizer step. step: completed steps, this one included.

        result: a `StepResult`; its tensors are read at logging steps only. step_time_s: seconds from asking for the
        batch until the step returned; data_time_s: the part of it that waited for data. A step that the fp16 scaler
        skipped is an event and nothing else: it does not count (its `step` is the last completed one).
        """
        if result.skipped:
            text = "the gradients were not finite (fp16: the loss scaler overflowed): no optimizer step"
            self.event(step, "skipped_step", text)
            return
        self._step = step
        window = self._window
        window.pending.append(result)
        window.steps += 1
        window.sums["step_time_s"] += step_time_s
        window.sums["data_time_s"] += data_time_s
        self._progress.advance(step)
        if step % self._logging_steps == 0:
            self._write_window(collective=True)
            self._tokens_total += window.tokens_processed
            self._window = _Window()
        elif step == self._total_steps:
            # The window stays open in `state_dict`: a run that goes on from here with more steps completes it.
            self._write_window(collective=True)

    def _write_window(self, collective: bool) -> None:
        window = self._window
        window.settle()
        self.energy.sample()
        memory = list(peak_memory_gib(self._device))
        device_gib, host_gib = self._max_over_ranks(memory) if collective else memory
        seconds = window.sums["step_time_s"]
        tokens_per_second = window.tokens_processed / seconds if seconds > 0 else None
        line = {
            "step": self._step,
            **{name: total / window.steps for name, total in window.sums.items()},
            "grad_norm": None if window.grad_norm is None else window.grad_norm / window.steps,
            "tokens": window.tokens,
            "tokens_processed": window.tokens_processed,
            "tokens_total": self._tokens_total + window.tokens_processed,
            "tokens_per_second": tokens_per_second,
            **self._scale.rates(tokens_per_second),
            "peak_device_memory_gib": device_gib,
            "host_memory_gib": host_gib,
        }
        self._written_step = self._step
        self._writer.write("train", **line)
        self._lines.append(line)
        self._trackers.write(TRAIN_NAMES, line)
        self._progress.show_train(line)

    def on_eval(self, step: int, loss: float, tokens: int) -> None:
        """loss: mean over the `tokens` label tokens of the evaluation, in nats."""
        loss, tokens = float(loss), int(tokens)
        perplexity = math.exp(loss) if loss < 700.0 else math.inf  # exp overflows a double at 709.8
        line = {"step": step, "loss": loss, "perplexity": perplexity, "tokens": tokens}
        self._writer.write("eval", **line)
        self._eval_lines.append(line)
        self._trackers.write(EVAL_NAMES, line)
        self._progress.show_eval(line)

    def on_save(self, step: int, num_bytes: int, stall_s: float, total_s: float) -> None:
        """stall_s: seconds for which training stood still; total_s: until the checkpoint was whole on disk."""
        self._writer.write("save", step=step, bytes=int(num_bytes), stall_s=stall_s, total_s=total_s)
        self._progress.show_note(f"step {step}: checkpoint of {num_bytes / 2**20:,.1f} MiB in {total_s:.1f} s")

    def event(self, step: int, name: str, text: str) -> None:
        """Something that happened: written, and shown on the screen. Safe from any thread."""
        self._writer.write("event", step=step, name=name, text=text)
        self._progress.show_note(f"step {step}: {name}: {text}")

    @property
    def train_lines(self) -> list[dict[str, Any]]:
        """The train lines of this attempt, on every rank."""
        return self._lines

    @property
    def eval_lines(self) -> list[dict[str, Any]]:
        return self._eval_lines

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint, plain JSON: total and open window, so that a resumed run writes the same lines."""
        window = self._window
        window.settle()
        kept = {name: getattr(window, name) for name in ("steps", "grad_norm", "tokens", "tokens_processed")}
        return {"step": self._step, "tokens_total": self._tokens_total, "window": {**kept, "sums": dict(window.sums)}}

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Returns the number of steps in the restored window, for `truncate_to_step`."""
        self._step, self._tokens_total = state["step"], state["tokens_total"]
        self._progress.start(self._step)
        self._window = _Window(**{**state["window"], "sums": dict(state["window"]["sums"])})
        return self._window.steps

    def close(self, exit_code: int, reason: str) -> None:
        """Write the last, partial window and the summary. A second call does nothing.

        Ranks that do not end by agreement may be alone, on a device that no longer answers: then nothing here waits
        for either.
        """
        if self._closed:
            return
        self._closed = True
        agreed = exit_code in AGREED_ENDS
        if self._window.steps and self._written_step != self._step and (agreed or self._window.is_on_host()):
            self._write_window(collective=agreed)
        self._progress.close()
        self._writer.write(
            "summary", exit_code=int(exit_code), reason=reason, steps=self._step, **median_fields(self._lines)
        )
        self._writer.close()
