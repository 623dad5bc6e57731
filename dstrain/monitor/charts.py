"""The report's charts: matplotlib figures as SVG, each a self-contained data URI."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

Points = tuple[list[float], list[float]]

# More points than pixels only make the file large: longer curves are drawn as means of neighbours.
MAX_POINTS = 800
COLORS = {"blue": "#2f6fde", "orange": "#e0762a", "green": "#2a9d72", "grey": "#8a93a3", "light": "#b9cdf3"}
_STYLE: Any = {
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "axes.edgecolor": "#c4cad4",
    "axes.labelcolor": "#4b5565",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff4",
    "xtick.color": "#6b7482",
    "ytick.color": "#6b7482",
    "svg.hashsalt": "dstrain",  # the same run gives the same file
}


def column(lines: Sequence[dict[str, Any]], name: str, factor: float = 1.0) -> Points:
    """(steps, values) of the lines that hold a finite `name`."""
    kept = [(x["step"], x[name] * factor) for x in lines if x[name] is not None and math.isfinite(x[name])]
    return [float(step) for step, _ in kept], [float(value) for _, value in kept]


def thin(points: Points, limit: int = MAX_POINTS) -> Points:
    """At most `limit` points: each the mean of a run of neighbours."""
    xs, ys = points
    size = math.ceil(len(xs) / limit)
    if size <= 1:
        return points
    groups = [slice(i, i + size) for i in range(0, len(xs), size)]
    return [sum(xs[g]) / len(xs[g]) for g in groups], [sum(ys[g]) / len(ys[g]) for g in groups]


def smooth(points: Points, reach: int) -> Points:
    """Mean over the neighbours up to `reach` away on both sides (fewer near the ends), so that it does not lag."""
    xs, ys = points
    sums = [0.0]
    for value in ys:
        sums.append(sums[-1] + value)
    result = []
    for i in range(len(ys)):
        near = min(reach, i, len(ys) - 1 - i)
        result.append((sums[i + near + 1] - sums[i - near]) / (2 * near + 1))
    return xs, result


class Chart:
    """One pair of axes over the steps. `uri` gives it as a data URI for an <img>."""

    def __init__(self, ylabel: str, *, width: float = 5.6, height: float = 2.5, resumed_at: Sequence[int] = ()):
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        with matplotlib.rc_context(_STYLE):
            self._figure = Figure(figsize=(width, height), layout="constrained")
            self.axes = self._figure.subplots()
        self.axes.set_xlabel("step")
        self.axes.set_ylabel(ylabel)
        self.axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        for step in resumed_at:
            self.axes.axvline(step, color=COLORS["grey"], linewidth=0.9, linestyle=":")

    def line(self, points: Points, color: str, label: str | None = None, **style: Any) -> None:
        xs, ys = thin(points)
        marker = "o" if len(xs) == 1 else None
        self.axes.plot(xs, ys, color=COLORS[color], label=label, **{"linewidth": 1.4, "marker": marker, **style})

    def uri(self, *, from_zero: bool = False, percent: bool = False) -> str:
        import matplotlib

        if from_zero:
            self.axes.set_ylim(0, self.axes.get_ylim()[1] * 1.05)
        if percent:
            self.axes.yaxis.set_major_formatter("{x:g}%")
        if self.axes.get_legend_handles_labels()[0]:
            self.axes.legend(fontsize=8.5, labelcolor="#4b5565", framealpha=0.85, edgecolor="none", loc="best")
        out = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            self._figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
        return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def draw_charts(train: list[dict], evals: list[dict], resumed_at: Sequence[int]) -> dict[str, str]:
    """Title -> data URI, in the order of the report; charts without a point are left out. Loss comes first."""
    from matplotlib.ticker import EngFormatter

    charts: dict[str, str] = {}
    loss, held_out = column(train, "loss"), column(evals, "loss")
    if loss[0] or held_out[0]:
        chart = Chart("nats per token", width=11.4, height=3.6, resumed_at=resumed_at)
        noisy = len(loss[0]) >= 50
        chart.line(loss, "light" if noisy else "blue", "training loss", linewidth=0.9 if noisy else 1.4)
        if noisy:
            chart.line(smooth(loss, max(3, len(loss[0]) // 60)), "blue", "training loss, smoothed")
        chart.line(held_out, "orange", "held-out loss", marker="o", markersize=4)
        for step in resumed_at:
            near: dict[str, Any] = {
                "xytext": (3, -8),
                "textcoords": "offset points",
                "fontsize": 7.5,
                "color": COLORS["grey"],
            }
            chart.axes.annotate("resumed", (step, 1.0), xycoords=chart.axes.get_xaxis_transform(), **near)
        charts["Loss"] = chart.uri()
    singles = (
        ("Learning rate", "learning_rate", "", "blue", True),
        ("Gradient norm", "grad_norm", "L2, before clipping", "blue", True),
        ("Throughput", "tokens_per_second", "tokens per second", "green", True),
    )
    for title, name, label, color, from_zero in singles:
        points = column(train, name)
        if points[0]:
            chart = Chart(label, resumed_at=resumed_at)
            chart.line(points, color)
            if name == "tokens_per_second":
                chart.axes.yaxis.set_major_formatter(EngFormatter(sep=""))
            charts[title] = chart.uri(from_zero=from_zero)
    mfu = column(train, "mfu", 100.0)
    if mfu[0]:
        chart = Chart("of the device's peak", resumed_at=resumed_at)
        chart.line(mfu, "green")
        charts["Model FLOPs utilisation"] = chart.uri(from_zero=True, percent=True)
    if train:
        charts["Peak memory"] = _memory(train, resumed_at)
        charts["Step time"] = _step_time(train, resumed_at)
    return charts


def _memory(train: list[dict], resumed_at: Sequence[int]) -> str:
    chart = Chart("GiB, largest rank", resumed_at=resumed_at)
    device, host = column(train, "peak_device_memory_gib"), column(train, "host_memory_gib")
    if device == host:  # a CPU: the device's memory is the host's
        chart.line(host, "blue")
    else:
        chart.line(device, "blue", "device")
        chart.line(host, "orange", "host process")
    return chart.uri(from_zero=True)


def _step_time(train: list[dict], resumed_at: Sequence[int]) -> str:
    chart = Chart("milliseconds", resumed_at=resumed_at)
    whole, waiting = thin(column(train, "step_time_s", 1e3)), thin(column(train, "data_time_s", 1e3))
    if whole[0]:
        chart.axes.fill_between(waiting[0], waiting[1], color=COLORS["orange"], label="waiting for data", linewidth=0.4)
        chart.axes.fill_between(
            whole[0], waiting[1], whole[1], color=COLORS["light"], label="forward, backward, update", linewidth=0
        )
        chart.line(whole, "blue")
    return chart.uri(from_zero=True)
