"""`dstrain checkpoint`: verify, list, show and convert checkpoints.

dstrain checkpoint verify runs/a
dstrain checkpoint list runs/a
dstrain checkpoint show runs/a/checkpoints/step_00000100
dstrain checkpoint convert SRC DST --deepspeed_config ds_configs/zero3.json --world_size 8
"""

import argparse
import json
from pathlib import Path

from dstrain.checkpoint.convert import convert
from dstrain.checkpoint.export import find_checkpoint
from dstrain.checkpoint.manifest import find_problems, latest_problems, list_folders, quick_problems, read_manifest
from dstrain.checkpoint.reshape import CheckpointReader
from dstrain.errors import ExitCode, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    verify = actions.add_parser("verify", help="read every byte and compare it with what was written")
    listing = actions.add_parser("list", help="the checkpoints of a run, whole or not")
    show = actions.add_parser("show", help="what one checkpoint holds")
    for action in (verify, listing, show):
        action.add_argument("path", help="a step_* folder, or a run folder")
    conversion = actions.add_parser("convert", help="rewrite for another number of ranks, beforehand")
    conversion.add_argument("source", help="a step_* folder, or a run folder for its newest checkpoint")
    conversion.add_argument("target", help="the new step_* folder; it must not exist")
    conversion.add_argument("--deepspeed_config", required=True, help="the DeepSpeed JSON that will go on from it")
    conversion.add_argument("--world_size", type=int, required=True, help="number of ranks that will go on from it")


def _folder_of_checkpoints(path: str) -> Path:
    folder = Path(path) / "checkpoints"
    return folder if folder.is_dir() else Path(path)


def _verify(path: str) -> int:
    """One line per checkpoint and per problem; exit code 2 when anything is wrong."""
    one = Path(path)
    if (one / "manifest.json").exists() or not list_folders(_folder_of_checkpoints(path)):
        folders, problems = [one], []
        if not one.is_dir():
            raise UserError(f"{path} is no folder: name a checkpoint (step_*) or a run folder")
    else:
        folders = list_folders(_folder_of_checkpoints(path))
        problems = latest_problems(_folder_of_checkpoints(path))
    for folder in folders:
        found = find_problems(folder)
        problems += found
        print(f"{folder}: {'damaged' if found else 'whole'}")
    if problems:
        raise UserError(problems)
    return ExitCode.FINISHED


def _list(path: str) -> int:
    """One JSON object a line: name, step, bytes, whether it is whole by its manifest and sizes."""
    for folder in list_folders(_folder_of_checkpoints(path)):
        problems = quick_problems(folder)
        facts = {} if problems else {"step": read_manifest(folder).step, "bytes": read_manifest(folder).bytes}
        print(json.dumps({"name": folder.name, "whole": not problems, **facts, "problems": problems}))
    return ExitCode.FINISHED


def _show(path: str) -> int:
    """The manifest without its hashes, and what is stored of how many parameters, as JSON."""
    folder = find_checkpoint(path)
    manifest, reader = read_manifest(folder), CheckpointReader(folder)
    contents = {key: value for key, value in manifest.contents.items() if key != "files"}
    stored = {
        "parameters": len(reader.names()),
        "elements": sum(_numel(reader.shapes[name]) for name in reader.names()),
        "kinds": sorted({kind for kind, _ in reader.pieces}),
        "files": len(manifest.files),
        "bytes": manifest.bytes,
    }
    print(json.dumps({**contents, "digest": manifest.digest, "stored": stored}, indent=2))
    return ExitCode.FINISHED


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def run(args: argparse.Namespace) -> int:
    if args.action == "convert":
        target = convert(find_checkpoint(args.source), Path(args.target), args.deepspeed_config, args.world_size)
        print(f"{target}: written for {args.world_size} ranks")
        return ExitCode.FINISHED
    return {"verify": _verify, "list": _list, "show": _show}[args.action](args.path)
