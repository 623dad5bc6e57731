"""What a person sees of a running training: a progress bar in a terminal, a line per logging step elsewhere."""

import itertools
import math
from typing import Any, TextIO

from dstrain.monitor.logs import screen


class NullProgress:
    """Shows nothing: every rank but the first. The interface of the others."""

    def start(self, step: int = 0) -> None:
        """Training begins with `step` steps done; without this call it begins with the first `advance`."""

    def advance(self, step: int) -> None:
        """A step was completed."""

    def show_train(self, line: dict[str, Any]) -> None:
        """A train line was written."""

    def show_eval(self, line: dict[str, Any]) -> None:
        """An eval line was written."""

    def show_note(self, text: str) -> None:
        """One line about something that happened."""

    def close(self) -> None:
        """Training ended; text may follow."""


def format_count(value: float) -> str:
    """Three figures: 1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}" if abs(value) < 999.5 * size else f"{value / size:.0f}{letter}"
    return f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """75 -> 1:15; 3675 -> 1:01:15."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _describe(line: dict[str, Any]) -> dict[str, str]:
    """The figures of a train line as short text; a dash where there is none."""

    def show(name: str, form: str, factor: float = 1.0) -> str:
        value = line[name]
        return "-" if value is None else format(value * factor, form)

    speed = line["tokens_per_second"]
    return {
        "loss": show("loss", ".4f"),
        "lr": show("learning_rate", ".2e"),
        "grad_norm": show("grad_norm", ".3g"),
        "speed": "-" if speed is None else format_count(speed),
        "mfu": show("mfu", ".1f", 100) + ("%" if line["mfu"] is not None else ""),
        "memory": show("peak_device_memory_gib", ".2f"),
    }


class PlainProgress(NullProgress):
    """One line per logging step, for logs and pipes."""

    def __init__(self, total_steps: int, stream: TextIO):
        self._total_steps = total_steps
        self._stream = stream
        self._width = len(str(total_steps))

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _at(self, step: int) -> str:
        return f"step {step:{self._width}d}/{self._total_steps}"

    def show_train(self, line: dict[str, Any]) -> None:
        words = _describe(line)
        left = (self._total_steps - line["step"]) * line["step_time_s"]
        self._print(
            f"{self._at(line['step'])}  loss {words['loss']}  lr {words['lr']}  grad norm {words['grad_norm']}"
            f"  {words['speed']} tokens/s  mfu {words['mfu']}  memory {words['memory']} GiB"
            f"  left {format_duration(left)}"
        )

    def show_eval(self, line: dict[str, Any]) -> None:
        self._print(f"{self._at(line['step'])}  held-out loss {line['loss']:.4f}  perplexity {line['perplexity']:.2f}")

    def show_note(self, text: str) -> None:
        self._print(text)


class RichProgress(NullProgress):
    """A bar at the foot of the terminal; notes and evaluations scroll above it."""

    def __init__(self, total_steps: int, stream: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(file=stream, highlight=False)
        wide = self._console.width >= 80  # a narrower terminal would cut the step and the time left
        details = [TextColumn("mfu {task.fields[mfu]}"), TextColumn("{task.fields[memory]} GiB")] if wide else []
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("loss [bold]{task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tok/s"),
            *details,
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            refresh_per_second=2,  # its thread shares the interpreter with the training loop
            redirect_stdout=False,
            redirect_stderr=False,
            expand=True,
            # A resumed run starts in the middle and evaluations pause it: the estimate follows the last half minute.
            speed_estimate_period=30.0,
        )
        self._started = False
        self._task = self._progress.add_task("train", total=total_steps, loss="-", speed="-", mfu="-", memory="-")

    def start(self, step: int = 0) -> None:
        self._started = True
        self._progress.update(self._task, completed=step)
        self._progress.start()

    def advance(self, step: int) -> None:
        if not self._started:
            self.start(step - 1)
        self._progress.update(self._task, completed=step)

    def show_train(self, line: dict[str, Any]) -> None:
        words: dict[str, Any] = _describe(line)
        self._progress.update(self._task, **words)

    def show_eval(self, line: dict[str, Any]) -> None:
        self.show_note(
            f"step {line['step']}: held-out loss [bold]{line['loss']:.4f}[/], perplexity {line['perplexity']:.2f}",
            markup=True,
        )

    def show_note(self, text: str, markup: bool = False) -> None:
        if self._progress.finished:
            # What is said after the last step (also by others, through `logs.screen`) stands below the full bar.
            self._progress.stop()
        self._console.print(text, markup=markup)

    def close(self) -> None:
        self._progress.stop()


def build_progress(total_steps: int, *, is_main: bool, stream: TextIO | None = None) -> NullProgress:
    """The display for this rank. stream: where the person looks; default `logs.screen()`."""
    if not is_main:
        return NullProgress()
    stream = stream if stream is not None else screen()
    return RichProgress(total_steps, stream) if stream.isatty() else PlainProgress(total_steps, stream)


# Braille cells are 2 x 4 dots; bit of the dot at (column, row), from Unicode's chart U+2800.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def render_loss_curve(points: list[tuple[int, float | None]], width: int = 72, height: int = 12) -> str:
    """A curve of (step, loss) as text with axes, `width` columns wide and `height` + 2 lines high.

    Each column shows the mean of its points, so that noise does not fill the picture. Points without a finite value
    are left out; with none left it is one line that says so.
    """
    finite = [(x, float(y)) for x, y in points if y is not None and math.isfinite(y)]
    if not finite:
        return "no finite loss to draw"
    first, last = finite[0][0], max(finite[-1][0], finite[0][0] + 1)
    size = math.ceil(len(finite) / max(1, width - 10))
    groups = [finite[i : i + size] for i in range(0, len(finite), size)]
    curve = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    low, high = min(y for _, y in curve), max(y for _, y in curve)
    high = high if high > low else low + 1e-3
    labels = [f"{high - (high - low) * row / (height - 1):.3f}" for row in range(height)]
    margin = max(len(label) for label in labels)
    columns = width - margin - 2
    cells = [[0] * columns for _ in range(height)]

    def dot(column: float, row: float) -> None:
        x, y = min(round(column), columns * 2 - 1), min(round(row), height * 4 - 1)
        cells[y // 4][x // 2] |= _DOTS[x % 2][y % 4]

    placed = [
        ((x - first) / (last - first) * (columns * 2 - 1), (high - y) / (high - low) * (height * 4 - 1))
        for x, y in curve
    ]
    dot(*placed[0])
    for (x0, y0), (x1, y1) in itertools.pairwise(placed):
        steps = max(1, math.ceil(max(abs(x1 - x0), abs(y1 - y0))))
        for i in range(1, steps + 1):
            dot(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps)

    shown = {0, height // 2, height - 1}
    rows = [
        f"{labels[row] if row in shown else '':>{margin}} {'┤' if row in shown else '│'}"
        + "".join(chr(0x2800 + cell) for cell in cells[row]).rstrip("\u2800")
        for row in range(height)
    ]
    axis = f"{'':>{margin}} └{'─' * columns}"
    caption = f"{'':>{margin}}  {first}{'step ' + str(finite[-1][0]):>{columns - len(str(first))}}"
    return "\n".join([*rows, axis, caption])
