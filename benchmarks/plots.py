"""The report's plots: matplotlib figures in the style of a run's own report, as data URIs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.comparisons import from_dstrain
from dstrain.monitor.charts import COLORS, Chart
from dstrain.monitor.progress import format_count

SPLIT_COLORS = {
    "data": "#e0762a",
    "forward": "#2f6fde",
    "backward": "#7aa4ee",
    "optimizer": "#2a9d72",
    "communication": "#c4527a",
    "other": "#c4cad4",
}
PART_COLORS = (
    "#2f6fde",
    "#e0762a",
    "#2a9d72",
    "#c4527a",
    "#7a5cc9",
    "#b8a12c",
    "#4aa7c4",
    "#c4cad4",
    "#8a93a3",
    "#1d2430",
)
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Plot:
    title: str
    uri: str
    wide: bool


def draw_plots(report: Mapping[str, Any]) -> list[Plot]:
    """In the order of the page, squares side by side; a plot without a point is left out."""
    good = [row for row in report["rows"] if row["status"] == "ok"]
    trained = [row for row in good if row["tokens_per_second"]]
    single = [row for row in trained if not row["series"]]
    split = [row for row in trained if row["split_s"]]
    predicted = [row for row in trained if (row["predictions"] or {}).get("memory")]
    pairs = [from_dstrain(pair, report["rows"]) for pair in report["comparisons"] if pair["speed"]]
    drawers: tuple[tuple[str, Any, Callable[[Any], str], bool], ...] = (
        ("Throughput", single, throughput, True),
        ("Where a step's time goes", split, time_split, True),
        ("Memory by part", single, memory, True),
        ("Against peers and baselines", pairs, ratios, True),
        ("Speed against memory", (single, report["pareto"]) if len(single) > 2 else (), speed_against_memory, False),
        ("Predicted against measured memory", predicted, predicted_memory, False),
        ("Scaling", report["scaling"], scaling, False),
        ("Sequence length until memory ends", report["sequences"], sequences, False),
        ("Loading", [row for row in good if row["rates"]], rates, True),
    )
    return [Plot(title, draw(what), wide) for title, what, draw, wide in drawers if what]


def bars(rows: int, xlabel: str, *, wide: bool = True) -> Chart:
    """Horizontal bars, the first on top; as high as there are rows."""
    from matplotlib.ticker import AutoLocator

    chart = Chart("", width=11.4 if wide else 5.6, height=max(1.3, 0.62 + 0.27 * rows))
    chart.axes.set_xlabel(xlabel)
    chart.axes.xaxis.set_major_locator(AutoLocator())
    chart.axes.set_ylim(rows - 0.4, -0.6)
    chart.axes.grid(visible=False, axis="y")
    return chart


def names(chart: Chart, labels: Sequence[str]) -> None:
    chart.axes.set_yticks(range(len(labels)), labels)
    chart.axes.tick_params(axis="y", length=0, labelsize=8.5)


def whiskers(spreads: Sequence[Mapping[str, float]]) -> list[list[float]]:
    return [[s["median"] - s["low"] for s in spreads], [s["high"] - s["median"] for s in spreads]]


def throughput(rows: Rows) -> str:
    from matplotlib.ticker import EngFormatter

    chart = bars(len(rows), "tokens per second of all ranks (whiskers: range over rounds, or quartiles of steps)")
    spreads = [row["tokens_per_second"] for row in rows]
    style: Any = {"color": COLORS["green"], "height": 0.62, "ecolor": "#4b5565", "error_kw": {"linewidth": 1}}
    chart.axes.barh(range(len(rows)), [s["median"] for s in spreads], xerr=whiskers(spreads), **style)
    chart.axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    names(chart, [row["name"] for row in rows])
    return chart.uri()


def stacked(chart: Chart, columns: Mapping[str, Sequence[float]], colors: Mapping[str, str]) -> None:
    left = [0.0] * len(next(iter(columns.values())))
    for label, values in columns.items():
        if any(values):
            chart.axes.barh(range(len(values)), values, left=left, height=0.62, color=colors[label], label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]


def legend_below(chart: Chart) -> None:
    handles, labels = chart.axes.get_legend_handles_labels()
    options: Any = {
        "ncols": 10,
        "fontsize": 8,
        "columnspacing": 1.2,
        "handlelength": 1.4,
        "frameon": False,
        "labelcolor": "#4b5565",
    }
    chart.axes.figure.legend(handles, labels, loc="outside upper left", **options)
    for handle in handles:  # or `uri` would draw a second one inside the axes
        handle.set_label("")


def time_split(rows: Rows) -> str:
    chart = bars(len(rows) + 1, "seconds a step, rank 0")
    stacked(chart, {name: [row["split_s"][name] for row in rows] for name in SPLIT_COLORS}, SPLIT_COLORS)
    chart.axes.set_ylim(len(rows) - 0.4, -0.6)
    names(chart, [row["name"] for row in rows])
    legend_below(chart)
    return chart.uri()


def memory(rows: Rows) -> str:
    """The predicted parts where there are any, and what was measured as a mark; else imports and what is above."""
    chart = bars(len(rows) + 1, "GiB, largest rank")
    if any(row["predicted_parts_gib"] for row in rows):
        rows = [row for row in rows if row["predicted_parts_gib"]]
        parts = list(dict.fromkeys(part for row in rows for part in row["predicted_parts_gib"]))
        columns = {part: [row["predicted_parts_gib"].get(part, 0.0) for row in rows] for part in parts}
        parts = [part for part in parts if any(columns[part])]
        stacked(chart, {part: columns[part] for part in parts}, dict(zip(parts, PART_COLORS * 3, strict=False)))
        marked = [(i, row["predictions"]["memory"]["measured"]) for i, row in enumerate(rows) if row["predictions"]]
        if marked:
            ys, xs = zip(*marked, strict=True)
            chart.axes.plot(xs, ys, "|", color="#1d2430", markersize=13, markeredgewidth=1.8, label="measured")
    else:
        above = [row["memory_above_imports_gib"]["median"] for row in rows]
        columns = {"imports": [row["imports_gib"] for row in rows], "above imports": above}
        stacked(chart, columns, {"imports": COLORS["grey"], "above imports": COLORS["blue"]})
    chart.axes.set_ylim(len(rows) - 0.4, -0.6)
    names(chart, [row["name"] for row in rows])
    legend_below(chart)
    return chart.uri()


def square(xlabel: str, ylabel: str) -> Chart:
    from matplotlib.ticker import AutoLocator

    chart = Chart(ylabel, width=5.6, height=4.0)
    chart.axes.set_xlabel(xlabel)
    chart.axes.xaxis.set_major_locator(AutoLocator())
    return chart


def predicted_memory(rows: Rows) -> str:
    chart = square("measured, GiB", "predicted, GiB")
    pairs = [row["predictions"]["memory"] for row in rows]
    high = 1.08 * max(max(p["measured"], p["predicted"]) for p in pairs)
    chart.axes.fill_between([0, high], [0, 0.9 * high], [0, 1.1 * high], color=COLORS["light"], alpha=0.4, linewidth=0)
    chart.axes.plot([0, high], [0, high], color=COLORS["grey"], linewidth=0.9, label="equal; the band is 10 %")
    xs, ys = [p["measured"] for p in pairs], [p["predicted"] for p in pairs]
    chart.axes.plot(xs, ys, "o", color=COLORS["blue"], markersize=4.5)
    chart.axes.set_xlim(0, high)
    chart.axes.set_ylim(0, high)
    return chart.uri()


def scaling(curves: Rows) -> str:
    from matplotlib.ticker import EngFormatter

    chart = square("ranks", "tokens per second")
    for curve, color in zip(curves, ("blue", "orange", "green", "grey"), strict=False):
        spreads = {int(n): s for n, s in curve["tokens_per_second"].items()}
        workers, medians = list(spreads), [s["median"] for s in spreads.values()]
        style: Any = {"color": COLORS[color], "marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1.4}
        chart.axes.errorbar(workers, medians, yerr=whiskers(list(spreads.values())), label=curve["series"], **style)
        one = medians[0] / workers[0]
        chart.axes.plot(workers, [one * n for n in workers], color=COLORS[color], linewidth=0.8, linestyle=":")
        at = curve["knee"]
        ring: Any = {"color": COLORS[color], "markersize": 11, "markerfacecolor": "none"}
        if at is not None:
            chart.axes.plot([at], [spreads[at]["median"]], "o", label=f"knee at {at}", **ring)
    chart.axes.set_xticks(sorted({int(n) for curve in curves for n in curve["tokens_per_second"]}))
    chart.axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return chart.uri(from_zero=True)


def sequences(curves: Rows) -> str:
    chart = square("tokens in a sequence", "peak memory of the largest rank, GiB")
    chart.axes.set_xscale("log", base=2)
    for curve, color in zip(curves, ("blue", "orange", "green", "grey"), strict=False):
        points = {int(n): gib for n, gib in curve["host_memory_gib"].items()}
        if not points:
            continue
        style: Any = {"marker": "o", "markersize": 4}
        label = f"{curve['series']}: to {curve['longest']:,}"
        chart.line(([float(n) for n in points], list(points.values())), color, label, **style)
        if curve["ended_at"]:
            chart.axes.plot([curve["ended_at"]], [max(points.values())], "x", color=COLORS[color], markersize=7)
    reached = {int(n) for curve in curves for n in curve["host_memory_gib"]}
    lengths = sorted(reached | {curve["ended_at"] for curve in curves if curve["ended_at"]})
    chart.axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    return chart.uri(from_zero=True)


def ratios(pairs: Rows) -> str:
    chart = bars(len(pairs), "tokens per second in units of the other's (whiskers: range over rounds)")
    spreads = [pair["speed"] for pair in pairs]
    style: Any = {"color": COLORS["blue"], "height": 0.62, "ecolor": "#4b5565", "error_kw": {"linewidth": 1}}
    chart.axes.barh(range(len(pairs)), [s["median"] for s in spreads], xerr=whiskers(spreads), **style)
    chart.axes.axvline(1.0, color="#1d2430", linewidth=0.9)
    names(chart, [f"{pair['name']}  /  {pair['against'].rpartition(': ')[2]}" for pair in pairs])
    return chart.uri()


def speed_against_memory(what: tuple[Rows, Sequence[str]]) -> str:
    from matplotlib.ticker import EngFormatter

    rows, best = what
    chart = square("peak host memory of the largest rank, GiB (line: the Pareto front)", "tokens per second")
    groups = list(dict.fromkeys((row["num_parameters"], row["block_size"]) for row in rows))
    for group, color in zip(groups[:4], ("blue", "orange", "green", "grey"), strict=False):
        points = [row for row in rows if (row["num_parameters"], row["block_size"]) == group]
        at = [(row["host_memory_gib"]["median"], row["tokens_per_second"]["median"], row["name"]) for row in points]
        label = f"{format_count(group[0])} parameters, blocks of {group[1]:,}"
        chart.axes.plot([x for x, *_ in at], [y for _, y, _ in at], "o", color=COLORS[color], markersize=4, label=label)
        front = sorted(point for point in at if point[2] in best)
        xs, ys = [x for x, *_ in front], [y for _, y, _ in front]
        chart.axes.step(xs, ys, where="post", color=COLORS[color], linewidth=0.9)
        for x, y, name in dict.fromkeys((front[:1] + front[-1:]) if front else ()):  # the smallest and the fastest
            options: Any = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7.5, "color": "#4b5565"}
            chart.axes.annotate(name, (x, y), **options)
    chart.axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return chart.uri(from_zero=True)


def rates(rows: Rows) -> str:
    from matplotlib.ticker import EngFormatter

    labels = [(f"{row['name']}: {name}", spread) for row in rows for name, spread in row["rates"].items()]
    chart = bars(len(labels), "tokens per second (logarithmic)")
    chart.axes.set_xscale("log")
    spreads = [spread for _, spread in labels]
    style: Any = {"color": COLORS["green"], "height": 0.62, "ecolor": "#4b5565", "error_kw": {"linewidth": 1}}
    chart.axes.barh(range(len(labels)), [s["median"] for s in spreads], xerr=whiskers(spreads), **style)
    chart.axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    names(chart, [label for label, _ in labels])
    return chart.uri()
