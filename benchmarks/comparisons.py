"""What a report says of several cases together: peers, scaling, sequences, predictions, a baseline. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.analysis import (
    DISTURBED,
    PAYS,
    Spread,
    compare,
    knee,
    marginal_gains,
    pareto,
    ratio_in_turns,
    worst,
)
from benchmarks.cases import TITLES

# How far two programs' losses may be apart, relative, for one to be a peer of the other: CONTRIBUTING.md's parity.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}


def good_runs(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [run for run in entry["runs"] if run["status"] == "ok"]


def build_comparisons(contents: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every case that names a baseline, in units of it: speed (tokens/s, round by round), memory (above imports) and,
    where the case has an ideal, of_ideal (step time in units of the ideal one). speed_of_fastest is of the fastest step
    of all rounds of each: what disturbs a machine only slows. No ratio where they do not train the same: then `agree`
    is false and `reason` says why.
    """
    by_name, found = {row["name"]: row for row in rows}, []
    for name, entry in contents["cases"].items():
        baseline = entry["case"]["baseline"]
        if baseline is None:
            continue
        result: dict[str, Any] = {"name": name, "baseline": baseline, "ideal": entry["case"]["ideal"]}
        agreement = ("loss_difference", "tolerance", "agree")
        result |= dict.fromkeys(("speed", "speed_of_fastest", "memory", "of_ideal", "rounds", *agreement))
        ours, theirs = good_runs(entry), good_runs(contents["cases"].get(baseline, {"runs": []}))
        found.append(result | {"reason": "one of them has no result"})
        if not ours or not theirs:
            continue
        difference, tolerance = loss_difference(ours[-1], theirs[-1]), LOSS_TOLERANCE[ours[-1]["precision"]]
        agree = difference <= tolerance
        found[-1] |= {"loss_difference": difference, "tolerance": tolerance, "agree": agree}
        found[-1]["reason"] = "" if agree else f"losses differ by {difference:.2g} relative: not the same training"
        if agree:
            found[-1] |= ratios_of(undisturbed_pairs(ours, theirs), entry["case"]["ideal"])
            fastest = [max(speed for run in runs for speed in run["tokens_per_second"]) for runs in (ours, theirs)]
            found[-1]["speed_of_fastest"] = fastest[0] / fastest[1]
            above = [by_name[x]["memory_above_imports_gib"] for x in (name, baseline)]
            found[-1]["memory"] = above[0]["median"] / above[1]["median"]
    return found


def undisturbed_pairs(ours: Sequence[Mapping], theirs: Sequence[Mapping]) -> list[tuple[Mapping, Mapping]]:
    """The rounds in which both had the cores for themselves; all rounds where there is none such."""
    pairs = list(zip(ours, theirs, strict=False))
    quiet = [pair for pair in pairs if all(run["disturbance"] <= DISTURBED for run in pair)]
    return quiet or pairs


def ratios_of(pairs: Sequence[tuple[Mapping, Mapping]], ideal: float) -> dict[str, Any]:
    speeds = [(median(a["tokens_per_second"]), median(b["tokens_per_second"])) for a, b in pairs]
    ratios: dict[str, Any] = {"speed": asdict(ratio_in_turns(*zip(*speeds, strict=True))), "rounds": len(pairs)}
    if ideal != 1.0:
        times = [median(a["step_time_s"]) / median(b["step_time_s"]) / ideal for a, b in pairs]
        ratios["of_ideal"] = asdict(Spread.of(times))
    return ratios


def from_dstrain(pair: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A comparison as a reader asks for it: name, against, speed, memory. A peer is told the other way round: what
    dstrain, its baseline, does in units of the peer."""
    program = next(row["program"] for row in rows if row["name"] == pair["name"])
    told = {"against": pair["baseline"], **{key: pair[key] for key in ("name", "speed", "speed_of_fastest", "memory")}}
    if program == TITLES["dstrain"] or not pair["speed"]:
        return told
    low, middle, high = (1 / pair["speed"][part] for part in ("high", "median", "low"))
    told |= {"name": pair["baseline"], "against": pair["name"], "speed": {"median": middle, "low": low, "high": high}}
    return told | {name: 1 / pair[name] for name in ("speed_of_fastest", "memory")}


def loss_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """The largest relative difference of the losses of the same steps."""
    pairs = list(zip(a["losses"], b["losses"], strict=False))
    assert pairs, "no step to compare"
    return max(abs(x - y) / abs(y) for x, y in pairs)


def build_scaling(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every series over processes: speeds, efficiency, what each further worker brings, and the knee in words."""
    found = []
    for series in dict.fromkeys(row["series"] for row in rows if row["series"]):
        points = {row["processes"]: row for row in rows if row["series"] == series and row["status"] == "ok"}
        if len(points) < 2:
            continue
        speed = {workers: row["tokens_per_second"]["median"] for workers, row in sorted(points.items())}
        first = min(speed)
        best = knee(speed)
        gains = marginal_gains(speed)
        found.append(
            {
                "series": series,
                "tokens_per_second": {n: points[n]["tokens_per_second"] for n in speed},
                "efficiency": {n: speed[n] / n / (speed[first] / first) for n in speed},
                "marginal_gain": gains,
                "knee": best if best < max(speed) else None,  # None: beyond what was measured
                "pays": PAYS,
                "sentence": knee_sentence(series, best, gains, max(speed)),
            }
        )
    return found


def knee_sentence(series: str, best: int, gains: Mapping[int, float], largest: int) -> str:
    if best == largest:
        return f"{series}: up to {largest} workers every further one pays; the knee lies beyond"
    beyond = min(n for n in gains if n > best)
    return (
        f"{series}: the knee is at {best} worker{'s' if best > 1 else ''}; up to {beyond}, each further one brings "
        f"{gains[beyond]:.0%} of what one alone brings, and below {PAYS:.0%} it does not pay"
    )


def build_sequences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every series over sequence lengths: its points, the longest that ended well, and what ended the next."""
    found = []
    for series in dict.fromkeys(row["series"] for row in rows if row["series"]):
        members = [row for row in rows if row["series"] == series]
        if len({row["block_size"] for row in members}) < 2:
            continue
        good = [row for row in members if row["status"] == "ok"]
        bad = next((row for row in members if row["status"] != "ok"), None)
        found.append(
            {
                "series": series,
                "longest": max((row["block_size"] for row in good), default=None),
                "tokens_per_second": {row["block_size"]: row["tokens_per_second"]["median"] for row in good},
                "host_memory_gib": {row["block_size"]: row["host_memory_gib"]["median"] for row in good},
                "ended_at": bad and bad["block_size"],
                "ended_by": bad["status"] if bad else "the suite's last length",
            }
        )
    return found


def build_prediction_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """quantity -> cases, median and worst of the absolute relative errors; {} where nothing was predicted."""
    errors: dict[str, dict[str, float]] = {}
    for row in rows:
        for quantity, pair in (row["predictions"] or {}).items():
            errors.setdefault(quantity, {})[row["name"]] = pair["error"]
    return {
        quantity: {
            "cases": len(found),
            "median_error": median(abs(e) for e in found.values()),
            "worst_error": worst(list(found.values())),
            "worst_case": max(found, key=lambda name: abs(found[name])),
        }
        for quantity, found in errors.items()
    }


def build_pareto(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the cases of which no other of the same model and tokens is as fast and as small; see `pareto`."""
    groups: dict[tuple, dict[str, tuple[float, float]]] = {}
    for row in rows:
        if row["status"] == "ok" and row["tokens_per_second"] and row["num_parameters"]:
            key = (row["suite"], row["num_parameters"], row["block_size"])
            point = (row["tokens_per_second"]["median"], row["host_memory_gib"]["median"])
            groups.setdefault(key, {})[row["name"]] = point
    return [name for points in groups.values() for name in pareto(points)]


def build_against(rows: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same cases of a baseline: ratio, noise, whether it regressed. Cases that failed since are regressions."""
    old, found = {row["name"]: row for row in before}, []
    for row in rows:
        other = old.get(row["name"])
        if other is None or other["status"] != "ok":
            continue
        if row["status"] != "ok":
            found.append({"name": row["name"], "quantity": "status", "ratio": None, "noise": None, "regressed": True})
            continue
        for quantity, higher in (("tokens_per_second", True), ("memory_above_imports_gib", False)):
            if row[quantity] and other[quantity]:
                change = compare(Spread(**row[quantity]), Spread(**other[quantity]), higher_is_better=higher)
                found.append({"name": row["name"], "quantity": quantity, **asdict(change)})
    missing = sorted(set(old) - {row["name"] for row in rows})
    return {"changes": found, "regressed": [c["name"] for c in found if c["regressed"]], "missing": missing}
