"""The report's tables and cards, as text: the Markdown and the page show the same. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.comparisons import from_dstrain
from benchmarks.rows import PHASES

Table = tuple[str, str, list[str], list[list[str]]]  # title, remark, header, rows


def build_tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of the Markdown and of the page, already as text; those without a row are left out."""
    against = [_against_table(report["against"])] if report["against"] else []
    return [table for table in (*against, *_case_tables(report), *_group_tables(report)) if table[3]]


def _case_tables(report: Mapping[str, Any]) -> list[Table]:
    """What each case shows alone."""
    rows = report["rows"]
    trained = [row for row in rows if row["status"] == "ok" and row["tokens_per_second"]]
    return [
        (
            "Speed",
            "",
            ["case", "tokens/s", "per rank", "step", "MFU", "of a matmul", "first step after", "others' CPU"],
            [_speed(r) for r in trained],
        ),
        (
            "Where a step's time goes",
            "Seconds on rank 0: the shares of a traced run, of the time of the untraced one. Communication holds the "
            "waiting for others, also inside the other phases.",
            ["case", *PHASES],
            [[r["name"], *(number(r["split_s"][p], 3) for p in PHASES)] for r in trained if r["split_s"]],
        ),
        (
            "Memory",
            "GiB of the largest rank. Above imports: what training takes beyond the libraries.",
            ["case", "host peak", "imports", "above imports", "device peak", "pinned", "NVMe"],
            [_memory(r) for r in trained],
        ),
        (
            "Predicted against measured",
            _prediction_remark(report),
            ["case", "quantity", "predicted", "measured", "error"],
            _predictions(rows),
        ),
        (
            "Communication",
            "MB that rank 0 sends in a step, by the tables of DeepSpeed's comms_logger, and by theory "
            "(benchmarks/theory.py derives it).",
            ["case", "kind", "sent", "theory", "ratio"],
            _volumes(trained),
        ),
        (
            "Saves",
            "Goodput: the share of the time that trains, with a save every 100 steps; seen: of a run with a save every "
            "few steps, its slower steps counted.",
            ["case", "checkpoint GiB", "stall s", "written s", "GiB/s", "goodput", "seen"],
            [_save(r) for r in rows if r["checkpoint_gib"]],
        ),
        (
            "Loading",
            "",
            ["what", "tokens/s"],
            [[name, spread(s, 0)] for r in rows if r["rates"] for name, s in r["rates"].items()],
        ),
        (
            "No figures",
            "",
            ["case", "ended", "why"],
            [[r["name"], r["status"], r["reason"]] for r in rows if r["status"] != "ok"],
        ),
    ]


def _group_tables(report: Mapping[str, Any]) -> list[Table]:
    """What several cases show together."""
    return [
        (
            "Peers and baselines",
            "Tokens/s and memory above imports in units of the other's, round by round; the range over rounds "
            "in brackets.",
            ["case", "against", "speed", "of the fastest steps", "memory", "rounds", "losses differ by"],
            [_pair(pair, report["rows"]) for pair in report["comparisons"]],
        ),
        (
            "Scaling",
            " ".join(f"{c['sentence']}." for c in report["scaling"]),
            ["series", "ranks", "tokens/s", "efficiency", "each further one brings"],
            _scaling(report["scaling"]),
        ),
        (
            "Sequence length",
            "Until memory ends.",
            ["way", "longest", "ended at", "by"],
            [
                [c["series"], number(c["longest"], 0), number(c["ended_at"], 0), c["ended_by"]]
                for c in report["sequences"]
            ],
        ),
    ]


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def spread(value: Mapping[str, float] | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{number(value['median'], digits)} ({number(value['low'], digits)} to {number(value['high'], digits)})"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _median(value: Mapping[str, float] | None) -> float | None:
    return None if value is None else value["median"]


def _speed(row: Mapping[str, Any]) -> list[str]:
    first = row["time_to_first_step_s"]
    return [
        row["name"],
        spread(row["tokens_per_second"], 0),
        number(_median(row["tokens_per_second_per_device"]), 0),
        f"{number(_median(row['step_time_s']), 3)} s",
        percent(_median(row["mfu"])),
        percent(row["of_matmul"]),
        "-" if first is None else f"{first:.1f} s",
        percent(row["disturbance"]),
    ]


def _memory(row: Mapping[str, Any]) -> list[str]:
    medians = (_median(row[name]) for name in ("host_memory_gib", "memory_above_imports_gib", "peak_device_memory_gib"))
    host, above, device = medians
    values = (host, row["imports_gib"], above, device, row["pinned_gib"], row["nvme_gib"])
    return [row["name"], *(number(value, 3) for value in values)]


def _prediction_remark(report: Mapping[str, Any]) -> str:
    parts = (
        f"{name.replace('_', ' ')}: median error {s['median_error']:.1%}, worst {s['worst_error']:+.1%} "
        f"({s['worst_case']}), {s['cases']} cases."
        for name, s in report["prediction_summary"].items()
    )
    return " ".join(parts)


def _predictions(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [row["name"], name.replace("_", " "), number(p["predicted"], 3), number(p["measured"], 3), f"{p['error']:+.1%}"]
        for row in rows
        for name, p in (row["predictions"] or {}).items()
    ]


def _volumes(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            row["name"],
            kind,
            number(row["sent_bytes"][kind] / 1e6, 2),
            number(row["theory_bytes"][kind] / 1e6, 2),
            number(ratio, 2),
        ]
        for row in rows
        for kind, ratio in (row["volume_ratio"] or {}).items()
    ]


def _pair(pair: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    told = from_dstrain(pair, rows)
    difference = "-" if pair["loss_difference"] is None else f"{pair['loss_difference']:.1e}"
    if not told["speed"]:
        return [told["name"], told["against"], pair["reason"], "-", "-", "-", difference]
    text = spread(told["speed"], 2)
    if pair["of_ideal"]:
        text += f"; step {pair['of_ideal']['median']:.2f} of ideal"
    figures = (f"{told[name]:.2f}" for name in ("speed_of_fastest", "memory"))
    return [told["name"], told["against"], text, *figures, str(pair["rounds"]), difference]


def _scaling(curves: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            curve["series"],
            str(n) + (" (knee)" if n == curve["knee"] else ""),
            spread(speed, 0),
            percent(curve["efficiency"][n]),
            percent(curve["marginal_gain"].get(n)),
        ]
        for curve in curves
        for n, speed in curve["tokens_per_second"].items()
    ]


def _save(row: Mapping[str, Any]) -> list[str]:
    medians = [_median(row[name]) for name in ("save_stall_s", "save_total_s", "save_gib_per_s")]
    figures = (number(value, 3) for value in (row["checkpoint_gib"], *medians))
    return [row["name"], *figures, percent(row["goodput"]), percent(row["goodput_seen"])]


def _against_table(against: Mapping[str, Any]) -> Table:
    rows = [
        [
            change["name"],
            change["quantity"].replace("_", " "),
            "-" if change["ratio"] is None else f"{change['ratio']:.3f}",
            "-" if change["noise"] is None else f"{change['noise']:.1%}",
            "REGRESSED" if change["regressed"] else "within the noise or better",
        ]
        for change in against["changes"]
    ]
    remark = f"Not measured this time: {', '.join(against['missing'])}." if against["missing"] else ""
    return ("Against the baseline", remark, ["case", "quantity", "ratio", "noise", ""], rows)


def build_cards(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, remark) of what a reader looks for first."""
    rows = report["rows"]
    good = [row for row in rows if row["status"] == "ok"]
    others = ", ".join(sorted({row["status"] for row in rows} - {"ok"}))
    cards = [("cases with figures", f"{len(good)} of {len(rows)}", others)]
    trained = [row for row in good if row["tokens_per_second"]]
    if trained:
        fastest = max(trained, key=lambda row: row["tokens_per_second"]["median"])
        smallest = min(trained, key=lambda row: row["host_memory_gib"]["median"])
        cards.append(("fastest, tokens/s", number(fastest["tokens_per_second"]["median"], 0), fastest["name"]))
        cards.append(("least host memory", f"{smallest['host_memory_gib']['median']:.2f} GiB", smallest["name"]))
    for name, summary in report["prediction_summary"].items():
        worst = f"worst {summary['worst_error']:+.1%}, {summary['worst_case']}"
        cards.append((f"error of predicted {name.replace('_', ' ')}", f"{summary['median_error']:.1%}", worst))
    return cards + [(f"knee, {c['series']}", f"{c['knee']} ranks", "") for c in report["scaling"] if c["knee"]]
