"""Which evaluation was the best so far, and whether the run has had enough of them."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Best:
    """The lowest held-out loss, and how many evaluations in a row were not clearly lower.

    patience, threshold: as of Hugging Face's EarlyStoppingCallback; None never stops.
    """

    patience: int | None = None
    threshold: float = 0.0
    loss: float | None = None
    step: int | None = None
    num_worse: int = 0

    def note(self, step: int, loss: float) -> None:
        """An evaluation after `step` steps; one that is no number is never the best."""
        clearly = self.loss is None or loss < self.loss - self.threshold
        self.num_worse = 0 if clearly else self.num_worse + 1
        if loss < (float("inf") if self.loss is None else self.loss):
            self.loss, self.step = loss, step

    @property
    def is_enough(self) -> bool:
        return self.patience is not None and self.num_worse >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("patience", "threshold")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss, self.step, self.num_worse = state["loss"], state["step"], state["num_worse"]
