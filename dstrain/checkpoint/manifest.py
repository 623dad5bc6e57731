"""manifest.json makes a folder a checkpoint: what is in it, and a hash of every byte, its own included."""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.checkpoint.blocks import Written
from dstrain.checkpoint.files import THREADS, hash_file, sync_folder, write_bytes
from dstrain.errors import UserError

FORMAT = 1
NAME = re.compile(r"step_(\d{8,})$")
MANIFEST = "manifest.json"
LATEST = "latest"


@dataclass(frozen=True)
class Manifest:
    """contents: step, samples_consumed, layout, ... as written; files: relative path -> (bytes, sha256)."""

    contents: dict[str, Any]
    digest: str

    @property
    def step(self) -> int:
        return self.contents["step"]

    @property
    def files(self) -> dict[str, Written]:
        return {name: Written(**facts) for name, facts in self.contents["files"].items()}

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


def _text(contents: dict[str, Any]) -> str:
    return json.dumps(contents, indent=1, sort_keys=True, allow_nan=False)


def write_manifest(folder: Path, contents: dict[str, Any]) -> Manifest:
    """Write `contents` with the digest of itself; durable on return. Raises OSError."""
    contents = {**contents, "format": FORMAT}
    digest = hashlib.sha256(_text(contents).encode()).hexdigest()
    write_bytes(folder / MANIFEST, (_text({**contents, "digest": digest}) + "\n").encode())
    sync_folder(folder)
    return Manifest(contents, digest)


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError unless every byte of the manifest is the one that was written."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{folder} is no complete checkpoint ({error.strerror}: {MANIFEST})") from None
    damaged = UserError(f"{path} is damaged: its own digest does not match; use another checkpoint")
    try:
        contents = json.loads(raw)
        if not isinstance(contents, dict):
            raise damaged
        digest = contents.pop("digest", "")
        canonical = (_text({**contents, "digest": digest}) + "\n").encode()
    except ValueError:  # not JSON, not UTF-8, or NaN
        raise damaged from None
    if canonical != raw or hashlib.sha256(_text(contents).encode()).hexdigest() != digest:
        raise damaged
    if contents["format"] != FORMAT:
        raise UserError(
            f"{path} has format {contents['format']}, this dstrain reads {FORMAT}: use the one that wrote it"
        )
    return Manifest(contents, digest)


def quick_problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint without reading its tensors: manifest, names and sizes."""
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return error.problems
    problems = []
    if NAME.match(folder.name) and checkpoint_step(folder) != manifest.step:
        problems.append(f"{folder} holds step {manifest.step}: give it that name")
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected.bytes:
            problems.append(f"{path} has {path.stat().st_size} bytes, {expected.bytes} were written")
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    foreign = sorted(present - {MANIFEST, *manifest.files})
    return problems + [f"{folder / name} does not belong to the checkpoint" for name in foreign]


def find_problems(folder: Path, part: int = 0, num_parts: int = 1) -> list[str]:
    """All that is wrong with a checkpoint: `quick_problems`, and the hash of every `num_parts`-th file from `part`."""
    problems = quick_problems(folder)
    if problems:
        return problems
    largest_first = sorted(read_manifest(folder).files.items(), key=lambda item: (-item[1].bytes, item[0]))

    def check(file: tuple[str, Written]) -> list[str]:
        path = folder / file[0]
        try:
            same = hash_file(path) == file[1]
        except OSError as error:
            return [f"{path} cannot be read ({error.strerror})"]
        return [] if same else [f"{path} is damaged: its hash is not the one that was written"]

    with ThreadPoolExecutor(THREADS) as readers:
        return [problem for found in readers.map(check, largest_first[part::num_parts]) for problem in found]


def checkpoint_step(folder: Path) -> int:
    match = NAME.match(folder.name)
    return int(match.group(1)) if match else -1


def list_folders(folder: Path) -> list[Path]:
    """Folders named like checkpoints, whole or not, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if NAME.match(p.name) and p.is_dir()), key=checkpoint_step)


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first: a valid manifest, and every file of its size. Hashes are not read."""
    return [p for p in list_folders(folder) if not quick_problems(p)]


def _latest_line(folder: Path) -> str:
    return f"{folder.name} {read_manifest(folder).digest}\n"


def write_latest(checkpoint: Path) -> None:
    """Point `latest` beside the checkpoint at it, atomically and durably."""
    temporary = checkpoint.parent / f".{LATEST}.tmp"
    write_bytes(temporary, _latest_line(checkpoint).encode())
    os.replace(temporary, checkpoint.parent / LATEST)
    sync_folder(checkpoint.parent)


def latest_problems(folder: Path) -> list[str]:
    """What is wrong with `latest` in a folder of checkpoints: it names the newest and the digest of its manifest."""
    found, path = list_checkpoints(folder), folder / LATEST
    if not found:
        return [f"{path} names a checkpoint, but none is complete"] if path.exists() else []
    try:
        text = path.read_bytes()
    except OSError:
        return [f"{path} is missing: the newest checkpoint is {found[-1].name}"]
    if text != _latest_line(found[-1]).encode():
        return [f"{path} is damaged or old: the newest checkpoint is {found[-1].name}"]
    return []
