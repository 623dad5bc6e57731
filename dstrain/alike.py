"""What must be the same on all hosts before a run begins, where hosts have disks of their own.

Each host reads its own flags (torchrun, accelerate), DeepSpeed JSON, model, code and packages: one that differs would
train another model, or wait for ever in another collective. The training data are compared where they are built.
"""

import os
import secrets
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from dstrain import distributed
from dstrain.arguments import Arguments
from dstrain.config import ResolvedConfig
from dstrain.errors import UserError
from dstrain.models.adapters import weights_sha256
from dstrain.models.config import model_identity
from dstrain.models.pretrained import find_checkpoint
from dstrain.parallel import Launch
from dstrain.run_folder import code_sha256, difference, package_versions

# Where a host keeps its copies is its own affair; what is in them is compared.
_PLACES = {
    *("model_name_or_path", "config_name", "tokenizer_name", "chat_template", "peft_config", "deepspeed_config"),
    *("train_file", "validation_file", "dataset_name", "output_dir", "export", "local_rank"),
}
_PACKAGES = ("dstrain", "torch", "deepspeed", "transformers")
_PATIENCE_S = 5.0  # a network file system may show a new file a little later
_CHUNK_BYTES = 1 << 24


def check_alike(args: Arguments, resolved: ResolvedConfig, config: Any, launch: Launch, *, is_new: bool) -> None:
    """Refuse hosts that would not train the same run, or share no run folder. A collective; writes nothing that stays.

    is_new: the run begins from the model's own weights, which beside adapters every start reads. Raises UserError, on
    every rank.
    """
    hosts = distributed.gather_objects((socket.gethostname(), launch.local_world_size))
    if len(set(hosts)) == 1 and launch.local_world_size == launch.world_size:
        return
    _check_same(partial(_facts, args, resolved, config), launch)
    if args.model.model_name_or_path and (is_new or args.model.adapter):
        check_whole_weights(args.model.model_name_or_path, launch)
    check_shared_folder(Path(args.run.output_dir), launch)


def _facts(args: Arguments, resolved: ResolvedConfig, config: Any) -> dict[str, Any]:
    """By what it is called in a message."""
    weights = weights_sha256(args.model.model_name_or_path) if args.model.model_name_or_path else None
    return {
        "flags": {f"--{name}": value for name, value in args.to_dict().items() if name not in _PLACES},
        "DeepSpeed configuration": resolved.deepspeed,
        "packages": {name: package_versions()[name] for name in _PACKAGES},
        "code of dstrain": code_sha256(),
        "model": model_identity(config),
        "model weights": weights,
    }


def _check_same(make_facts: Callable[[], dict[str, Any]], launch: Launch) -> None:
    """Compare what the first rank of each host finds. A collective."""
    facts, own = None, []
    try:
        facts = make_facts() if launch.is_main_on_host else None
    except UserError as error:
        own = error.problems
    found = distributed.gather_objects((socket.gethostname(), facts, own))
    if problems := [f"{host}: {problem}" for host, _, problems in found for problem in problems]:
        raise UserError(problems)
    first_host, first, _ = found[0]
    problems = [
        f"{first_host} and {host} differ in {name} ({difference(first[name], facts[name])}): "
        "start the same command from the same files on every host"
        for host, facts, _ in found
        for name in facts or ()
        if first[name] != facts[name]
    ]
    if problems:
        raise UserError(problems)


def check_whole_weights(name: str, launch: Launch) -> None:
    """Refuse copies of a model whose weights differ anywhere. A collective.

    Files on a file system that all hosts share are told by inode, size and time, and are not read; a host's own copy is
    read once, as fast as its disk gives it.
    """
    files = list(map(Path, find_checkpoint(name).files)) if launch.is_main_on_host else []
    marks = [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files)]
    found = distributed.gather_objects((socket.gethostname(), marks))
    first = found[0][1]
    if all(marks in (first, []) for _, marks in found):
        return
    found = distributed.gather_objects((socket.gethostname(), {file.name: _xxh3(file) for file in files}))
    first_host, first = found[0]
    problems = [
        f"{first_host} and {host} differ in {', '.join(name for name in first if first[name] != sums.get(name))} of "
        f"{name}: copy the model anew"
        for host, sums in found
        if sums and sums != first
    ]
    if problems:
        raise UserError(problems)


def _xxh3(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_shared_folder(folder: Path, launch: Launch) -> None:
    """Refuse a run folder that hosts do not share: rank 0 leaves a file, each host looks for it. A collective.

    The folder need not be there yet, and is not made: the file is in the first of its parents that is.
    """
    token: Path | None = None
    try:
        if launch.is_main:
            token = _leave_token(folder)
        depth, name = distributed.gather_objects((_depth(folder), token.name if token else ""))[0]
        seen = launch.is_main or not launch.is_main_on_host or _is_there(_ancestor(folder, depth) / name)
        found = distributed.gather_objects((socket.gethostname(), seen))
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    blind = sorted({host for host, seen in found if not seen})
    if blind:
        raise UserError(
            f"--output_dir {folder} is not the same folder on {', '.join(blind)} as on {found[0][0]}: name one on a "
            "file system that all hosts share (a checkpoint is whole only with the parts of all ranks, and a host that "
            "is lost must not take its part along)"
        )


def _ancestor(folder: Path, depth: int) -> Path:
    path = folder.absolute()
    return path if depth == 0 else path.parents[depth - 1]


def _depth(folder: Path) -> int:
    """How many folders of the path are still to be made."""
    return next(depth for depth in range(len(folder.absolute().parts)) if _ancestor(folder, depth).is_dir())


def _leave_token(folder: Path) -> Path:
    path = _ancestor(folder, _depth(folder)) / f".dstrain-{secrets.token_hex(8)}"
    with open(path, "w") as file:
        os.fsync(file.fileno())
    return path


def _is_there(path: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
