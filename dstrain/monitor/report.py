"""report.html: one self-contained page about a run, made from its run.json and metrics.jsonl.

python -m dstrain.monitor.report RUN_FOLDER
"""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from dstrain.monitor.metrics import METRICS_FILE, read_metrics
from dstrain.monitor.progress import format_count, format_duration

# Keys of run.json that have a table or a place of their own; the rest goes into the table "Run".
_OWN_TABLES = (
    "arguments",
    "deepspeed_config",
    "origins",
    "versions",
    "data",
    "host",
    "startup_s",
    "sample",
    "identity",
)


def write_report(run_dir: str | os.PathLike) -> Path:
    """Write `run_dir/report.html` whole and return its path. Missing parts of run.json are left out of the page.

    Raises ValueError when run.json or metrics.jsonl is broken.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    run_dir = Path(run_dir)
    run_json = run_dir / "run.json"
    facts = json.loads(run_json.read_text(encoding="utf-8")) if run_json.exists() else {}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(_contents(run_dir, facts, read_metrics(run_dir)))
    scratch = run_dir / "report.html.new"
    scratch.write_text(page, encoding="utf-8")
    scratch.replace(run_dir / "report.html")
    return run_dir / "report.html"


def _contents(run_dir: Path, facts: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    from dstrain.monitor.charts import draw_charts

    kinds: dict[str, list[dict]] = {name: [] for name in ("train", "eval", "save", "event", "summary")}
    for line in lines:
        kinds[line["kind"]].append(line)
    resumed_at = [event["step"] for event in kinds["event"] if event["name"] == "resume"]
    summary = kinds["summary"][-1] if kinds["summary"] else None
    return {
        "name": run_dir.resolve().name,
        "headline": " · ".join([*_headline(facts), str(run_dir.resolve())]),
        "metrics_file": METRICS_FILE,
        "summary": summary,
        "cards": _cards(kinds, summary),
        "charts": draw_charts(kinds["train"], kinds["eval"], resumed_at),
        "sample": facts.get("sample"),
        "evals": kinds["eval"],
        "saves": [{**save, "size": format_count(save["bytes"]) + "B"} for save in kinds["save"]],
        "events": kinds["event"],
        "configuration": _with_origins(facts.get("deepspeed_config", {}), facts.get("origins", {})),
        "tables": _tables(facts),
    }


def _headline(facts: dict[str, Any]) -> list[str]:
    """What was trained, on what, how: as far as run.json knows."""
    config, world = facts.get("deepspeed_config", {}), facts.get("world", {})
    model = facts.get("identity", {}).get("model", {})
    words = [model["model_type"]] if isinstance(model, dict) and "model_type" in model else []
    if "num_parameters" in facts:
        words.append(f"{format_count(facts['num_parameters'])} parameters")
    if "source" in facts.get("data", {}):
        words.append(facts["data"]["source"])
    if config:
        precision = next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")), "fp32")
        words.append(f"ZeRO-{config.get('zero_optimization', {}).get('stage', 0)}, {precision}")
    if "world_size" in world:
        words.append(f"{world['world_size']} devices" if world["world_size"] > 1 else "1 device")
    return words


def _cards(kinds: dict[str, list[dict]], summary: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the figures that a reader looks for first."""
    cards = []
    train = [line for line in kinds["train"] if line["loss"] is not None]
    evals = [line for line in kinds["eval"] if line["loss"] is not None]
    if evals:
        best = min(evals, key=lambda line: line["loss"])
        remark = "" if best is evals[-1] else f"best {best['loss']:.4f} at step {best['step']}"
        cards.append(("held-out loss", f"{evals[-1]['loss']:.4f}", remark))
        if evals[-1]["perplexity"] is not None:
            cards.append(("held-out perplexity", f"{evals[-1]['perplexity']:.2f}", f"{evals[-1]['tokens']:,} tokens"))
    if train:
        last = train[-1]
        cards.append(("training loss", f"{last['loss']:.4f}", f"step {last['step']:,}, from {train[0]['loss']:.4f}"))
        cards.append(("tokens read", format_count(last["tokens_total"]), f"{last['tokens_total']:,}"))
        device, host = last["peak_device_memory_gib"], last["host_memory_gib"]
        remark = "per process" if device == host else f"host process {host:.2f} GiB"
        cards.append(("peak memory", f"{device:.2f} GiB", remark))
    if summary and summary["median_tokens_per_second"] is not None:
        speed, per_device = summary["median_tokens_per_second"], summary["median_tokens_per_second_per_device"]
        cards.append(("tokens per second", format_count(speed), f"median; {format_count(per_device)} per device"))
        cards.append(("step time", f"{summary['median_step_time_s'] * 1e3:,.0f} ms", "median"))
    if summary and summary["median_mfu"] is not None:
        tflops = summary["median_model_tflops_per_second_per_device"]
        cards.append(("MFU", f"{summary['median_mfu']:.1%}", f"median; {tflops:.3g} TFLOP/s per device"))
    return cards


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys; an empty table stays a value."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        k: v
        for key, part in value.items()
        for k, v in _flatten(part, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _show(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 100_000:
        return f"{value:,}"
    return json.dumps(value)


def _with_origins(config: dict[str, Any], origins: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """(key, value, kind of origin, its reason) of every value of the resolved DeepSpeed JSON."""
    rows = []
    for key, value in (_flatten(config) if config else {}).items():
        # An origin may be stated for the table that a value stands in.
        parts = key.split(".")
        stated = next(
            (origins[".".join(parts[:n])] for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in origins), ""
        )
        kind, _, reason = stated.partition(":")
        rows.append((key, _show(value), kind.strip(), reason.strip()))
    return rows


def _tables(facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, rows) of everything else that run.json holds."""
    identity = facts.get("identity", {})
    rest = {key: value for key, value in facts.items() if key not in _OWN_TABLES}
    if "command" in rest:
        rest["command"] = shlex.join(rest["command"])
    rest.update({key: value for key, value in identity.items() if key not in ("model", "data")})
    startup = {phase: format_seconds(s) for phase, s in facts.get("startup_s", {}).items()}
    tables = {
        "Run": rest,
        "Data": facts.get("data", {}),
        "Model": identity.get("model", {}),
        "Flags": {key: value for key, value in facts.get("arguments", {}).items() if value not in (None, [], False)},
        "Versions": facts.get("versions", {}),
        "Host": facts.get("host", {}),
        "Start-up": startup,
    }
    return [(title, [(k, _show(v)) for k, v in _flatten(table).items()]) for title, table in tables.items() if table]


def format_seconds(seconds: float) -> str:
    """2.345 -> 2.35 s; 75 -> 1:15."""
    return f"{seconds:.2f} s" if seconds < 60 else format_duration(seconds)


if __name__ == "__main__":
    print(write_report(sys.argv[1]))
