"""What a person sees of a running training: a progress bar in a terminal, a line per logging step elsewhere."""

import sys
from typing import Any, TextIO


class NullProgress:
    """Shows nothing: every rank but the first."""

    def start(self, step: int = 0) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def show_train(self, line: dict[str, Any]) -> None:
        pass

    def show_eval(self, line: dict[str, Any]) -> None:
        pass

    def show_note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def format_count(value: float) -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _optional(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


class PlainProgress(NullProgress):
    """One line per logging step, for logs and pipes."""

    def __init__(self, total_steps: int, stream: TextIO):
        self._total_steps = total_steps
        self._stream = stream

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def show_train(self, line: dict[str, Any]) -> None:
        speed = "-" if line["tokens_per_second"] is None else format_count(line["tokens_per_second"])
        self._print(
            f"step {line['step']}/{self._total_steps}  loss {_optional(line['loss'], '.4f')}"
            f"  lr {_optional(line['learning_rate'], '.3g')}  grad norm {_optional(line['grad_norm'], '.3g')}"
            f"  {speed} tokens/s  mfu {_optional(line['mfu'], '.1f', 100)} %"
            f"  {line['peak_device_memory_gib']:.2f} GiB"
        )

    def show_eval(self, line: dict[str, Any]) -> None:
        self._print(
            f"step {line['step']}/{self._total_steps}  eval loss {line['loss']:.4f}  perplexity {line['perplexity']:.2f}"
        )

    def show_note(self, text: str) -> None:
        self._print(text)


def build_progress(total_steps: int, *, is_main: bool, stream: TextIO | None = None) -> NullProgress:
    """stream: where the person looks; default sys.stdout."""
    stream = stream or sys.stdout
    return PlainProgress(total_steps, stream) if is_main else NullProgress()
