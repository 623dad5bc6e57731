"""Rewrite a checkpoint with one file for each rank of another world, beforehand and without any rank.

Resuming needs no conversion: every layout reads every checkpoint. What this adds is the answer, before machines are
reserved, whether a configuration can go on from it, and files of which each rank reads mostly its own.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint.files import Entry, Key, write_bytes, write_rank
from dstrain.checkpoint.manifest import find_problems, list_checkpoints, read_manifest, write_latest, write_manifest
from dstrain.checkpoint.reshape import CheckpointReader
from dstrain.config import load_config, resolve_config
from dstrain.errors import UserError


def convert(source: Path, target: Path, deepspeed_config: str, world_size: int) -> Path:
    """Write `target` (a folder named step_*) from a whole checkpoint; one tensor in memory at a time.

    Raises UserError for a damaged source, a configuration that is wrong or whose batch cannot continue the run's, or
    a target that exists or is not named like a checkpoint.
    """
    problems = find_problems(source)
    if problems:
        raise UserError(problems[:5])
    contents = read_manifest(source).contents
    if target.exists() or target.name != f"step_{contents['step']:08d}":
        raise UserError(f"{target} must be a new folder with the step in its name: write {target / source.name}")
    resolved = resolve_config(
        load_config(deepspeed_config),
        world_size=world_size,
        stored_global_batch=contents.get("identity", {}).get("global_batch"),
    )
    contents["layout"] = {**contents["layout"], "world_size": world_size, "converted_for": str(deepspeed_config)}
    contents["layout"]["zero_stage"] = resolved.zero_stage
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_files(source, temporary, contents, world_size)
        write_manifest(temporary, contents)
        os.replace(temporary, target)
        write_latest(list_checkpoints(target.parent)[-1])
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_files(source: Path, temporary: Path, contents: dict[str, Any], world_size: int) -> None:
    reader = CheckpointReader(source)
    files: dict[str, Any] = {}
    for rank in range(world_size):
        before = reader.rank_facts(rank)
        facts = {"shapes": reader.shapes, "scalars": reader.scalars, "random": before and before["random"]}
        entries = [entry for kind, name in reader.pieces for entry in _part(reader, kind, name, rank, world_size)]
        written = write_rank(temporary, rank, entries, facts)
        files.update({name: vars(file) for name, file in written.items()})
    for name in contents["files"]:
        if not name.startswith("rank_"):
            (temporary / name).parent.mkdir(exist_ok=True)
            files[name] = vars(write_bytes(temporary / name, (source / name).read_bytes()))
    contents["files"] = files


def _part(reader: CheckpointReader, kind: str, name: str, rank: int, world_size: int) -> list[Entry]:
    """The `rank`-th of `world_size` nearly equal ranges of a stored tensor."""
    numel = torch.Size(reader.shapes[name]).numel()
    start, end = numel * rank // world_size, numel * (rank + 1) // world_size
    if start == end:
        return []
    dtype = reader.dtype(kind, name)

    def data() -> torch.Tensor:
        out = torch.empty(end - start, dtype=dtype)
        reader.read(kind, name, start, out)
        return out

    return [Entry(str(Key(kind, name, start)), dtype, (end - start,), data)]
