"""From a results file to what a report says of each case: one flat row, the names as docs/benchmarks.md has them. Pure.

A quantity that was measured several times is {median, low, high}: over the rounds where there are several, else over
the steps of the one run (its quartiles). What does not apply is null.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.analysis import (
    DISTURBED,
    Spread,
    goodput,
    goodput_of_run,
    is_finite,
    middle,
    relative_error,
)
from benchmarks.cases import TITLES

GIB = 2**30
PHASES = ("data", "forward", "backward", "optimizer", "communication", "other")
_PARTS = {"dp_size": "dp", "tp_size": "tp", "pp_size": "pp", "sp_size": "sp"}


def build_rows(contents: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each case of a results file, in its order."""
    return [build_row(name, entry, contents) for name, entry in contents["cases"].items()]


def build_row(name: str, entry: Mapping[str, Any], contents: Mapping[str, Any]) -> dict[str, Any]:
    case, runs = entry["case"], entry["runs"]
    failed = next((run for run in runs if run["status"] != "ok"), None)
    good = [run for run in runs if run["status"] == "ok"]
    last = good[-1] if good else {}
    row: dict[str, Any] = {
        "name": name,
        "suite": contents["suite"],
        "hardware": contents["machine"]["hardware"],
        "program": TITLES[case["program"]],
        "status": failed["status"] if failed else "ok",
        "reason": failed["reason"] if failed else "",
        "rounds": len(good),
        "disturbance": max((run["disturbance"] for run in good), default=None),
        "processes": case["processes"],
        "block_size": case["block_size"],
        "series": case["series"],
        "command": (failed or last)["command"],
    }
    measured = {**row, **_sizes(last), **_speed(good, contents), **_memory(good, contents), **_saves(good)}
    return measured | _split(entry, measured) | _volume(entry) | _predictions(last, measured)


def _sizes(run: Mapping[str, Any]) -> dict[str, Any]:
    """What was trained, as far as the run says."""
    config, world = run.get("deepspeed_config", {}), run.get("world", {})
    return {
        "num_parameters": run.get("num_parameters"),
        "precision": run.get("precision"),
        "zero_stage": run.get("zero_stage"),
        "parallel": " ".join(f"{short}{world[key]}" for key, short in _PARTS.items() if world.get(key, 1) > 1),
        "global_batch": config.get("train_batch_size"),
        "micro_batch": config.get("train_micro_batch_size_per_gpu"),
        "gradient_accumulation_steps": config.get("gradient_accumulation_steps"),
        "tokens_per_step": run.get("tokens_per_step"),
        "time_to_first_step_s": run.get("startup_s", {}).get("total"),
        "losses": run.get("losses"),
        "rates": {name: asdict(Spread.of(values)) for name, values in run.get("rates", {}).items()} or None,
    }


def over_runs(runs: Sequence[Mapping[str, Any]], name: str) -> Spread | None:
    """Over the rounds' medians where there are several, else over the steps; None where no step has the value. Rounds
    beside which others worked count only where there is no other."""
    quiet = [run for run in runs if run["disturbance"] <= DISTURBED]
    columns = [[value for value in run.get(name, []) if value is not None] for run in quiet or runs]
    columns = [column for column in columns if column]
    if not columns:
        return None
    return Spread.of([median(column) for column in columns]) if len(columns) > 1 else middle(columns[0])


def _speed(runs: Sequence[Mapping[str, Any]], contents: Mapping[str, Any]) -> dict[str, Any]:
    names = ("step_time_s", "data_time_s", "tokens_per_second", "model_tflops_per_second_per_device", "mfu")
    spreads = {name: over_runs(runs, name) for name in names}
    row: dict[str, Any] = {name: spread and asdict(spread) for name, spread in spreads.items()}
    speed, tflops = spreads["tokens_per_second"], spreads["model_tflops_per_second_per_device"]
    last = runs[-1] if runs else {}
    devices = last.get("world", {}).get("world_size", 1)
    row["tokens_per_second_per_device"] = speed and asdict(Spread(*(x / devices for x in asdict(speed).values())))
    row["peak_tflops"], row["peak_source"] = last.get("peak_tflops"), last.get("peak_source")
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(last.get("precision", ""), "")
    matmul = contents["sessions"][last["session"]]["matmul_tflops"].get(dtype) if last else None
    row["matmul_tflops"] = matmul
    row["of_matmul"] = tflops.median / matmul if tflops and matmul else None
    return row


def _imports_gib(run: Mapping[str, Any], contents: Mapping[str, Any]) -> float:
    """What the process held before it built anything: as the run itself says, else as this session measured it."""
    own = run.get("imports_gib", run.get("measured", {}).get("imports_gib"))
    return own if own is not None else contents["sessions"][run["session"]]["imports_gib"]


def _memory(runs: Sequence[Mapping[str, Any]], contents: Mapping[str, Any]) -> dict[str, Any]:
    """Of the largest rank; with several rounds their medians."""
    names = ("peak_device_memory_gib", "host_memory_gib", "imports_gib", "memory_above_imports_gib", "nvme_gib")
    if not runs:
        return dict.fromkeys((*names, "pinned_gib"))
    host = [run["host_memory_gib"] for run in runs]
    imports = [_imports_gib(run, contents) for run in runs]
    device = [run.get("peak_device_memory_gib") for run in runs]
    above = Spread.of([a - b for a, b in zip(host, imports, strict=True)])
    on_gpu = bool(contents["machine"]["devices"])
    pinned = runs[-1].get("measured", {}).get("pinned_gib") if on_gpu else 0.0  # without a device nothing is pinned
    return {
        "peak_device_memory_gib": None if None in device else asdict(Spread.of(device)),
        "host_memory_gib": asdict(Spread.of(host)),
        "imports_gib": median(imports),
        "memory_above_imports_gib": asdict(above),
        "nvme_gib": runs[-1].get("nvme_gib"),
        "pinned_gib": pinned,
    }


def _saves(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all saves of all rounds. goodput: with a save every 100 steps; goodput_seen: of runs that saved often."""
    saves = [save for run in runs for save in run.get("saves", [])]
    names = ("checkpoint_gib", "save_stall_s", "save_total_s", "save_gib_per_s", "goodput", "goodput_seen")
    if not saves:
        return dict.fromkeys(names)
    stall, total = Spread.of([s["stall_s"] for s in saves]), Spread.of([s["total_s"] for s in saves])
    steps = over_runs(runs, "step_time_s")
    assert steps is not None, "a run that saved has trained"
    rates = Spread.of([s["bytes"] / GIB / s["total_s"] for s in saves])
    often = [run for run in runs if len(run["saves"]) > 2]
    seen = [goodput_of_run(run["step_time_s"], [s["stall_s"] for s in run["saves"][:-1]]) for run in often]
    values = (saves[-1]["bytes"] / GIB, asdict(stall), asdict(total), asdict(rates))
    return dict(zip(names, (*values, goodput(steps.median, stall.median), median(seen) if seen else None), strict=True))


def _split(entry: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of each phase: the shares of the traced steps, of the time of the untraced ones."""
    profile = entry["profile"]
    if not profile or "split" not in profile or not row["step_time_s"]:
        return {"split_s": None, "split_note": profile["reason"] if profile else "not traced"}
    traced = profile["split"]
    factor = row["step_time_s"]["median"] / traced["step_time_s"]
    note = f"shares of {traced['steps']} traced steps of {traced['step_time_s']:.3g} s on rank {traced['rank']}"
    return {"split_s": {name: traced["seconds"][name] * factor for name in PHASES}, "split_note": note}


def _volume(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes that rank zero sends in a step, measured and by theory, and their ratio, by kind of parallelism."""
    profile = entry["profile"]
    if not profile or "sent_bytes" not in profile:
        return {"sent_bytes": None, "theory_bytes": None, "volume_ratio": None}
    sent, theory = profile["sent_bytes"], profile["theory_bytes"]
    ratio = {kind: sent[kind] / theory[kind] for kind in theory if kind in sent}
    return {"sent_bytes": sent, "theory_bytes": theory, "volume_ratio": ratio}


def _predictions(run: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """What train.py predicted at the start, beside what it was: {predicted, measured, error}; error is relative."""
    prediction = run.get("prediction") or {}
    device = prediction.get("device_gib") or {}
    pairs = {
        "memory": (device.get("total"), _measured_memory(run, row)),
        "step_time": (prediction.get("step_time_s"), row["step_time_s"] and row["step_time_s"]["median"]),
        "checkpoint": (prediction.get("checkpoint_gib"), row["checkpoint_gib"]),
        "nvme": (prediction.get("nvme_gib") or None, row["nvme_gib"] or None),
    }
    found = {}
    for name, (predicted, measured) in pairs.items():
        if is_finite(predicted) and is_finite(measured) and measured:
            found[name] = {
                "predicted": predicted,
                "measured": measured,
                "error": relative_error(predicted, measured),
            }
    parts = {name: value for name, value in device.items() if name != "total"} or None
    return {"predictions": found or None, "predicted_parts_gib": parts}


def _measured_memory(run: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """What the device's prediction is held against: on a CPU the process above its imports."""
    above = run.get("measured", {}).get("peak_above_imports_gib")
    on_cpu = "cpu" in row["hardware"]
    if on_cpu:
        return (
            above
            if above is not None
            else row["memory_above_imports_gib"] and row["memory_above_imports_gib"]["median"]
        )
    return row["peak_device_memory_gib"] and row["peak_device_memory_gib"]["median"]
