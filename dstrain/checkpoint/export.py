"""A checkpoint of any layout as a Hugging Face folder: safetensors, index, config, tokenizer, generation config, card.

    dstrain export runs/a out                      # the newest checkpoint of a run folder
    dstrain export runs/a/checkpoints/step_00000100 out --dtype fp32 --max_shard_size 2GB
    dstrain export runs/a out --merge              # adapters added to their base, not beside it

Streams one tensor at a time and needs neither DeepSpeed nor the ranks that wrote the checkpoint.
"""

import argparse
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dstrain.adapter import is_base_in_4bit
from dstrain.arguments import is_taken
from dstrain.checkpoint.card import build_card
from dstrain.checkpoint.commit import MODEL_FILES
from dstrain.checkpoint.files import Entry, write_bytes, write_safetensors
from dstrain.checkpoint.manager import choose_checkpoint
from dstrain.checkpoint.manifest import find_problems, read_manifest
from dstrain.checkpoint.peft_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_of,
    is_peft_folder,
    write_adapters,
    write_merged,
)
from dstrain.checkpoint.reshape import CheckpointReader
from dstrain.errors import UserError

# transformers takes a folder that has these for a whole model, with or without adapters.
BASE_FILES = ("config.json", "generation_config.json")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_files(model: Any, tokenizer: Any) -> dict[str, bytes]:
    """Name -> contents of all that a Hugging Face folder holds besides weights and card. model: on any device."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for adapter in getattr(model, "peft_config", {}).values():
            adapter.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = [type(model).__name__]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def holds_adapters(checkpoint: Path) -> bool:
    return is_peft_folder(checkpoint / MODEL_FILES)


def export(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    merge: bool = False,
    base: str | None = None,
) -> Path:
    """Write `out` from a whole checkpoint and return it. dtype: of floating weights; None: as the model computed.

    Adapters become a folder of peft's, or with `merge` a whole model; base: where theirs is now, if not as in training.
    Raises UserError for a damaged checkpoint, one without the model's own files, or a folder that holds something.
    """
    if is_taken(out):
        raise UserError(f"{out} is not an empty folder: choose another place for the export")
    problems = find_problems(checkpoint)
    if problems:
        raise UserError(problems[:5])
    manifest = read_manifest(checkpoint)
    if not (checkpoint / MODEL_FILES / "config.json").is_file():
        raise UserError(
            f"{checkpoint} holds no {MODEL_FILES}/config.json: it was written without the model's own files"
        )
    adapted = holds_adapters(checkpoint)
    if (merge or base) and not adapted:
        raise UserError(
            f"{checkpoint} holds a whole model, and no adapters to merge: leave --merge and --base_model out"
        )
    trained_as = getattr(torch, manifest.contents["layout"]["dtype"])
    target = DTYPES[dtype] if dtype else trained_as
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(checkpoint / MODEL_FILES, temporary)
        reader = CheckpointReader(checkpoint)
        if adapted:
            for name in BASE_FILES:
                (temporary / name).unlink(missing_ok=True)
            # Masters have more digits than the adapters that training computed with: they are what is merged.
            entries = _entries(reader, torch.float32 if merge else target)
            identity = manifest.contents["identity"]
            in_4bit_of = trained_as if is_base_in_4bit(identity) else None
            write_adapters(entries, temporary, identity["base"], in_4bit_of)
            if merge:
                write_merged(temporary, temporary, base or base_of(temporary), target, max_shard_bytes)
                for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                    (temporary / name).unlink()
        else:
            _set_dtype(temporary / "config.json", target)
            _write_weights(reader, temporary, target, max_shard_bytes)
        library = "peft" if adapted and not merge else "transformers"
        write_bytes(temporary / "README.md", build_card(checkpoint, manifest, target, library).encode())
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _entries(reader: CheckpointReader, dtype: torch.dtype) -> Iterator[Entry]:
    """Parameters, then buffers, in the order of their names; each is read when its turn to be written has come."""
    for kind in ("weight", "buffer"):
        for name in sorted(reader.names(kind), key=_natural):
            stored = reader.dtype(kind, name)
            final = dtype if kind == "weight" and stored.is_floating_point else stored

            def data(kind: str = kind, name: str = name, final: torch.dtype = final) -> torch.Tensor:
                return reader.whole(kind, name).to(final)

            yield Entry(name, final, reader.shapes[name], data)


def _write_weights(reader: CheckpointReader, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """One file, or numbered ones with an index, none larger than `max_shard_bytes` unless a tensor is."""
    shards: list[list[Entry]] = [[]]
    for entry in _entries(reader, dtype):
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], {"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, {"format": "pt"})
        weight_map.update({entry.key: name for entry in shard})
    total = sum(entry.nbytes for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_bytes(folder / "model.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode())


def parse_size(text: str) -> int:
    """ "5GB", "500MB", "2GiB" or bytes, as Hugging Face writes them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--max_shard_size is {text!r}: write a size such as 5GB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def find_checkpoint(path: str) -> Path:
    """A checkpoint by its own folder, or the newest of a run folder. Raises UserError."""
    if not Path(path).is_dir():
        raise UserError(f"{path} is no folder: name a checkpoint (step_*) or a run folder")
    try:
        found = choose_checkpoint(Path(path), path)
    except UserError:
        raise UserError(f"{path} holds no complete checkpoint: name a step_* folder or a run folder") from None
    assert found is not None
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a step_* folder, or a run folder for its newest checkpoint")
    parser.add_argument("out", help="the folder to write; it must not hold anything")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: that of training)")
    parser.add_argument("--max_shard_size", default="5GB", help="of one file (default 5GB)")
    parser.add_argument("--merge", action="store_true", help="add trained adapters to the weights of their base")
    parser.add_argument("--base_model", help="with --merge: where the base is now, if not as in training")


def run(args: argparse.Namespace) -> int:
    size = parse_size(args.max_shard_size)
    if args.base_model and not args.merge:
        raise UserError("--base_model is read with --merge only: add that, or leave it out")
    out = export(
        find_checkpoint(args.checkpoint),
        Path(args.out),
        dtype=args.dtype,
        max_shard_bytes=size,
        merge=args.merge,
        base=args.base_model,
    )
    loader = "peft's PeftModel" if (out / ADAPTER_CONFIG).exists() else "transformers' AutoModelForCausalLM"
    print(f"{out}: load it with {loader}.from_pretrained")
    return 0
