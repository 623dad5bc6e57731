"""`dstrain config check | explain | migrate`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dstrain.config.facts import RunFacts
from dstrain.config.load import apply_overrides, leaves, load_config
from dstrain.config.removed import migrate
from dstrain.config.resolve import ResolvedConfig, resolve_config
from dstrain.config.schema_keys import TOP
from dstrain.errors import ExitCode, UserError

_WEIGHT_DECAY = "weight decay leaves out norms, biases and 1-D parameters, as Hugging Face's Trainer does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="check | explain | migrate")
    for name, text in (
        ("check", "is the file right for a number of processes? prints what it amounts to"),
        ("explain", "every value that DeepSpeed will get, and where it comes from"),
        ("migrate", "rewrite keys that DeepSpeed 0.19 removed; the new JSON goes to stdout, each change to stderr"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("file", help="a DeepSpeed JSON")
        action.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one value; repeatable")
        if name != "migrate":
            action.add_argument("--world_size", type=int, default=1, help="number of processes (default 1)")
            action.add_argument("--max_steps", type=int, help="length of the run, for schedules that depend on it")
        if name == "explain":
            action.add_argument("--all", action="store_true", help="also the defaults of every block that is used")
            action.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    if args.action == "migrate":
        return _migrate(args)
    for flag in ("world_size", "max_steps"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} is {getattr(args, flag)}: write a positive number")
    resolved = resolve_config(
        load_config(args.file),
        world_size=args.world_size,
        overrides=args.set,
        facts=RunFacts(source=args.file, config_only=True, total_steps=args.max_steps),
    )
    for notice in resolved.notices:
        print(f"dstrain: note: {args.file}: {notice}", file=sys.stderr)
    if args.action == "check":
        print(f"{args.file}: {_summary(resolved)}")
    elif args.json:
        print(json.dumps({"deepspeed": resolved.deepspeed, "origins": resolved.origins}, indent=2))
    else:
        _print_table(_rows(resolved, with_defaults=args.all))
        print(f"\n{_WEIGHT_DECAY}")
    return ExitCode.FINISHED


def _summary(resolved: ResolvedConfig) -> str:
    dims = resolved.parallel
    parts = [
        f"ZeRO-{resolved.zero_stage}",
        resolved.precision + (f" with autocast to {resolved.autocast_dtype}" if resolved.autocast_dtype else ""),
        resolved.optimizer_type + (f" with {resolved.scheduler_type}" if resolved.scheduler_type else ""),
        f"{resolved.global_batch} samples a step = {resolved.micro_batch} x {resolved.gradient_accumulation_steps} "
        f"accumulated x {dims.dp_size} data-parallel",
    ]
    for name, size in (("tensor", dims.tp_size), ("pipeline", dims.pp_size), ("sequence", dims.sp_size)):
        if size > 1:
            parts.append(f"{name} parallel {size}")
    for name, device in (("optimizer", resolved.offload_optimizer), ("parameters", resolved.offload_param)):
        if device:
            parts.append(f"{name} offloaded to {device}")
    return ", ".join(
        [*parts, f"clipping {resolved.gradient_clipping:g}" if resolved.gradient_clipping else "no clipping"]
    )


def _rows(resolved: ResolvedConfig, with_defaults: bool) -> list[tuple[str, str, str]]:
    values = dict(leaves(resolved.deepspeed))
    origins = dict(resolved.origins)
    if with_defaults:
        for key, default in _defaults(resolved.deepspeed):
            if key not in values:
                values[key], origins[key] = default, "default"
    order = {name: place for place, name in enumerate(TOP)}
    keys = sorted(values, key=lambda key: (order.get(key.split(".")[0], len(order)), key))
    rows = [(key, json.dumps(values[key]), origins.get(key, "user")) for key in keys]
    if resolved.parallel.tp_size > 1:
        rows.insert(1, ("(samples per step)", str(resolved.global_batch), "derived: without counting TP ranks"))
    return rows


def _defaults(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """Scalars of the top level, and of the blocks that the configuration uses."""
    found: list[tuple[str, Any]] = []

    def visit(keys: dict[str, Any], values: dict[str, Any], prefix: str) -> None:
        for name, key in keys.items():
            if key.kind == "block":
                if isinstance(values.get(name), dict):
                    visit(key.keys, values[name], f"{prefix}{name}.")
            elif key.default is not None:
                found.append((f"{prefix}{name}", key.default))

    visit(TOP, config, "")
    return found


def _print_table(rows: list[tuple[str, str, str]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table("key", "value", "origin", box=None, header_style="bold")
        for row in rows:
            table.add_row(*row)
        Console().print(table, markup=False)
        return
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, origin in rows:
        print(f"{key:{widths[0]}}  {value:{widths[1]}}  {origin}")


def _migrate(args: argparse.Namespace) -> int:
    config, changes = migrate(apply_overrides(load_config(Path(args.file)), args.set))
    for change in changes or ["nothing to change"]:
        print(f"dstrain: {args.file}: {change}", file=sys.stderr)
    print(json.dumps(config, indent=2))
    return ExitCode.FINISHED
