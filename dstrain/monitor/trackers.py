"""DeepSpeed's monitor blocks (tensorboard, wandb, csv_monitor, comet of the JSON), fed from metrics.jsonl's lines."""

import math
from typing import Any

# metrics.jsonl field -> name in the trackers.
TRAIN_NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_total": "train/tokens_total",
    "step_time_s": "throughput/step_time_s",
    "tokens_per_second": "throughput/tokens_per_second",
    "model_tflops_per_second_per_device": "throughput/model_tflops_per_second_per_device",
    "mfu": "throughput/mfu",
    "data_time_s": "throughput/data_time_s",
    "peak_device_memory_gib": "memory/peak_device_memory_gib",
    "host_memory_gib": "memory/host_memory_gib",
}
EVAL_NAMES = {"loss": "eval/loss", "perplexity": "eval/perplexity"}


class NullTrackers:
    """No tracker is enabled, or this is not rank zero."""

    def write(self, names: dict[str, str], line: dict[str, Any]) -> None:
        pass


class DeepSpeedTrackers(NullTrackers):
    """Forwards lines to DeepSpeed's MonitorMaster; the x axis is the step.

    DeepSpeed's own events use samples as x, and W&B drops a value whose x is below the last one: so this object takes
    the monitor over by clearing the `enabled` that DeepSpeed's engine asks before it writes
    (`runtime/engine.py::_write_monitor`, 0.19.8). `write_events` itself does not ask for it. After a resume the
    trackers go on from the restored step: TensorBoard and CSV then hold the repeated steps twice, CSV its header too.
    """

    def __init__(self, master: Any):
        self._master = master
        master.enabled = False

    def write(self, names: dict[str, str], line: dict[str, Any]) -> None:
        values = ((name, line[field]) for field, name in names.items())
        events = [(name, value, line["step"]) for name, value in values if value is not None and math.isfinite(value)]
        if events:
            self._master.write_events(events)


def build_trackers(master: Any | None) -> NullTrackers:
    """master: `engine.monitor` (MonitorMaster) of DeepSpeed's engine on rank zero, else None."""
    return DeepSpeedTrackers(master) if master is not None and master.enabled else NullTrackers()
