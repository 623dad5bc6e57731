"""What an evaluation found: a table for a person, JSON for a program."""

import argparse
import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

from dstrain.data.build import default_cache_dir
from dstrain.data.sources import file_sha256, find_files
from dstrain.generate.model import LoadedModel
from dstrain.monitor.logs import screen
from dstrain.parallel import Launch
from dstrain.run_folder import environment_facts

_PACKAGES = {
    "perplexity": (),
    "classification": ("scikit-learn",),
    "generation": ("sacrebleu", "rouge-score"),
    "lm_eval": ("lm_eval",),
}


def report(args: argparse.Namespace, loaded: LoadedModel, outcome: Any, launch: Launch, *, seconds: float) -> None:
    """Write the files that were asked for, then the table and, as the last line, the JSON. On the first rank only."""
    result = _result(args, loaded, outcome, launch, seconds)
    text = json.dumps(result, ensure_ascii=False, allow_nan=False)
    if args.predictions:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in outcome.rows)
        Path(args.predictions).write_text("".join(lines), encoding="utf-8")
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    _show(result)
    print(text, file=screen(), flush=True)


def _result(
    args: argparse.Namespace, loaded: LoadedModel, outcome: Any, launch: Launch, seconds: float
) -> dict[str, Any]:
    facts = environment_facts()
    for package in _PACKAGES[args.task.partition(":")[0]]:
        facts["versions"][package] = metadata.version(package)
    files = find_files(args.data_file, "--data_file") if args.data_file else []
    return {
        "model": loaded.source,
        "task": args.task,
        "metrics": _finite(outcome.metrics),
        "settings": {**outcome.settings, "batch_size": args.batch_size},
        "data": [{"file": str(file), "sha256": file_sha256(file, default_cache_dir())} for file in files],
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "world_size": launch.world_size,
        "seconds": round(seconds, 3),
        **facts,
    }


def _finite(value: Any) -> Any:
    """Strict JSON: what is no number becomes null, what is no JSON its text."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int | str) else str(value)


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(file=screen(), highlight=False)
    metrics, settings = result["metrics"], result["settings"]
    console.print(f"{result['model']}: {result['task']}", markup=False, soft_wrap=True)
    if "by_label" in metrics:
        tables = ("by_label", "by_group", "confusion_matrix")
        console.print(_table({name: value for name, value in metrics.items() if name not in tables}))
        console.print(_confusion(metrics, settings["labels"]))
        if "by_group" in metrics:
            console.print(_groups(metrics["by_group"], settings["group_column"]))
    elif result["task"].startswith("lm_eval"):
        for figures in metrics.values():
            console.print(_table(figures))
    else:
        console.print(_table(metrics))
    told = ("num_rows", "num_samples", "tokens", "num_cut", "max_length", "num_not_ended")
    notes = [f"{name} {settings[name]}" for name in told if settings.get(name) is not None]
    notes += [f"{kind} rows left out: {found['rows']}" for kind, found in settings.get("skipped_rows", {}).items()]
    notes += [f"{name}: {text}" for name, text in settings.get("signatures", {}).items()]
    console.print("\n".join([*notes, f"{result['seconds']:.1f} s"]), markup=False, soft_wrap=True)


def _table(figures: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        shown = f"{value:.4f}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)
        table.add_row(escape(name), escape(shown))
    return table


def _groups(by_group: dict[str, dict[str, Any]], column: str) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"rows by {column}"), title_justify="left")
    table.add_column("")
    for name in next(iter(by_group.values())):
        table.add_column(name.replace("_", " "), justify="right")
    for group, figures in by_group.items():
        shown = (f"{x:.4f}" if isinstance(x, float) else "" if x is None else str(x) for x in figures.values())
        table.add_row(escape(repr(group)), *shown)
    return table


def _confusion(metrics: dict[str, Any], labels: list[str]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="rows of each label (down) by what was predicted (across)", title_justify="left")
    table.add_column("")
    for label in labels:
        table.add_column(escape(repr(label)), justify="right")
    table.add_column("precision", justify="right")
    table.add_column("recall", justify="right")
    table.add_column("F1", justify="right")
    for label, counts in zip(labels, metrics["confusion_matrix"], strict=True):
        own = [f"{metrics['by_label'][label][name]:.4f}" for name in ("precision", "recall", "f1")]
        table.add_row(escape(repr(label)), *map(str, counts), *own)
    return table
