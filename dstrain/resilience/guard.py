"""The non-finite guard: a loss or gradient norm that is not a number ends the run with 77 and spoils no checkpoint.

DeepSpeed 0.19.8 leaves out a step whose gradients are not finite in ZeRO 1-3 in every precision (`check_overflow`,
`is_invalid_grad_norm`) and says so only for fp16; dstrain's engines do the same at ZeRO-0 in fp32. So weights and
moments stay as they were before the batch. The guard gives that its name. All ranks read the same reduced numbers and
decide alike. On an accelerator it waits for nothing: a step that was taken is read one step later, from a copy on the
host.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from dstrain import distributed
from dstrain.errors import NonFiniteError

_SPIKE_WINDOW, _SPIKE_MIN_STEPS = 64, 20
_SPIKE_DEVIATIONS, _SPIKE_RELATIVE = 8.0, 0.2


@dataclass(frozen=True)
class Reading:
    """Numbers of one step, on the host. rank_loss: of this rank's own samples."""

    step: int
    loss: float
    grad_norm: float
    rank_loss: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and 0 <= self.grad_norm < math.inf  # DeepSpeed's norm of nothing finite is -1


@dataclass
class _Pending:
    step: int
    skipped: bool
    values: torch.Tensor  # [loss, grad_norm, rank_loss], float64, on its way to the host
    arrived: Any  # an event of the device, None on the host

    @classmethod
    def of(cls, step: int, result: Any) -> "_Pending":
        """Costs no wait: a number of the host becomes a kernel's argument, not a copy."""
        device = result.loss.device
        numbers = (result.loss, result.grad_norm if result.grad_norm is not None else 0.0, result.rank_loss)
        values = torch.stack([_on(device, number) for number in numbers])
        if device.type == "cpu":
            return cls(step, result.skipped, values, None)
        arrived = torch.Event(device=device)
        values = values.to("cpu", non_blocking=True)
        arrived.record()
        return cls(step, result.skipped, values, arrived)

    def read(self) -> Reading:
        if self.arrived is not None:
            self.arrived.synchronize()
        return Reading(self.step, *self.values.tolist())


def _on(device: torch.device, number: torch.Tensor | float) -> torch.Tensor:
    """0-d float64 on `device`."""
    if isinstance(number, torch.Tensor) and number.device.type == device.type:
        return number.double()
    return torch.full((), float(number), dtype=torch.float64, device=device)


class Guard:
    """Checks every step.

    allowed: how many batches may be left out before the run stops. scaled: fp16, whose loss scaler overflows as part of
    its work. event: writes an event (step, name, text). record: gets every reading before it is judged. batch: says
    what this rank's part of the last batch was.
    """

    def __init__(
        self,
        *,
        allowed: int = 0,
        scaled: bool = False,
        event: Callable[[int, str, str], None],
        record: Callable[[Reading], None] = lambda reading: None,
        batch: Callable[[], str] = str,
    ):
        self.allowed = allowed
        self.scaled = scaled
        self._event = event
        self._record = record
        self._batch = batch
        self._pending: _Pending | None = None
        self._losses: deque[float] = deque(maxlen=_SPIKE_WINDOW)
        self._spiking = False
        self.left_out = 0

    def check(self, step: int, result: Any) -> None:
        """After every step; `step`: completed ones. A collective when a number is not finite.

        Raises NonFiniteError, the same on every rank.
        """
        before, self._pending = self._pending, _Pending.of(step, result)
        if before is not None:
            self._judge(before)
        if self._pending.arrived is None or result.skipped:
            self.settle()

    def settle(self) -> None:
        """Judge the last step now, before a checkpoint is written. Waits for the device. Raises NonFiniteError."""
        before, self._pending = self._pending, None
        if before is not None:
            self._judge(before)

    def _judge(self, pending: _Pending) -> None:
        reading = pending.read()
        self._record(reading)
        if pending.skipped and self.scaled and math.isfinite(reading.loss):
            return  # the loss scaler at its work
        if pending.skipped or not reading.is_finite:
            self._not_finite(reading, skipped=pending.skipped)
        else:
            self._look_for_spike(reading)

    def _not_finite(self, reading: Reading, *, skipped: bool) -> None:
        number = reading.step + skipped  # a step that was left out does not count
        words = f"the loss is {reading.loss}" if not math.isfinite(reading.loss) else "the gradients are not finite"
        own = None if math.isfinite(reading.rank_loss) else self._batch()
        found = distributed.gather_objects(own)
        ranks = [f"rank {rank}: {batch}" for rank, batch in enumerate(found) if batch is not None]
        if not ranks:  # the sum overflowed, or the backward pass did: no rank alone is to blame
            ranks = [f"rank {rank}: {batch}" for rank, batch in enumerate(distributed.gather_objects(self._batch()))]
        where = "; ".join(ranks[:8]) + (f"; and {len(ranks) - 8} more ranks" if len(ranks) > 8 else "")
        text = f"step {number}: {words}"
        if not skipped:
            self._stop(reading.step, f"{text}, and the step was taken: weights are spoiled, none were saved. {where}")
        self.left_out += 1
        if self.left_out > self.allowed:
            more = f" after {self.allowed} that were left out (--skip_nonfinite)" if self.allowed else ""
            self._stop(reading.step, f"{text}{more}; the step was not taken. {where}")
        self._event(reading.step, "non_finite", f"{text}: batch {self.left_out} of {self.allowed} left out. {where}")

    def _stop(self, step: int, text: str) -> NoReturn:
        self._event(step, "non_finite", text)
        raise NonFiniteError(text)

    def _look_for_spike(self, reading: Reading) -> None:
        """A loss far above the median of the last steps, once until it is back."""
        if len(self._losses) >= _SPIKE_MIN_STEPS:
            median = statistics.median(self._losses)
            deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self._losses)
            bound = median + max(_SPIKE_DEVIATIONS * deviation, _SPIKE_RELATIVE * abs(median))
            if reading.loss > bound and not self._spiking:
                self._event(
                    reading.step,
                    "loss_spike",
                    f"loss {reading.loss:.4g} at a median of {median:.4g} over the {len(self._losses)} steps before",
                )
            self._spiking = reading.loss > bound
        self._losses.append(reading.loss)
