"""The run folder: what is in it, whether a start may use it, and `run.json`."""

import hashlib
import json
import os
import platform
import re
import shutil
import socket
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dstrain.errors import UserError
from dstrain.run_lock import LOCK_FILE

VERSIONED = ("dstrain", "torch", "deepspeed", "transformers", "accelerate", "datasets", "tokenizers")
OWN_NAMES = (
    *("run.json", "metrics.jsonl", "checkpoints", "logs", "report.html", "stop", "profile", "export"),
    *("comms.json", LOCK_FILE),
)


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Nothing is written before `create`."""

    path: Path

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def read(self) -> dict[str, Any]:
        """run.json of the run that the folder holds; {} where there is none. Raises UserError when it is broken."""
        if not self.run_json.exists():
            return {}
        try:
            return json.loads(self.run_json.read_text())
        except ValueError as error:
            raise UserError(
                f"{self.run_json} is not valid JSON ({error}): "
                "choose another --output_dir or add --overwrite_output_dir"
            ) from None

    def check_usable(self, *, overwrite: bool, resume: str) -> None:
        """Refuse a folder that holds something else than a run, or a run that this start would destroy."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output_dir {self.path} is a file: name a folder")
        existing = next((p for p in (self.path, *self.path.parents) if p.exists()), Path("/"))
        if not os.access(existing, os.W_OK):
            raise UserError(f"--output_dir {self.path} cannot be written: choose a folder of your own")
        if not self.path.exists() or overwrite:
            return
        if not self.run_json.exists() and any(name.name not in OWN_NAMES for name in self.path.iterdir()):
            raise UserError(
                f"--output_dir {self.path} holds files but no run: choose an empty folder or add --overwrite_output_dir"
            )
        if self.run_json.exists() and resume == "none":
            raise UserError(
                f"--output_dir {self.path} already holds a run: choose another folder, add --overwrite_output_dir to "
                "start anew in it, or leave --resume_from_checkpoint out to go on with it"
            )

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Refuse to go on with a run of another model, data or seed; names what differs."""
        stored = self.read().get("identity", {})
        problems = [
            f"--output_dir {self.path} holds a run with another {name} ({difference(stored[name], value)}): "
            "choose another folder or add --overwrite_output_dir"
            for name, value in identity.items()
            if name in stored and stored[name] != value
        ]
        if problems:
            raise UserError(problems)

    def clear(self) -> None:
        """Delete what a run writes, and nothing else; the lock is of the start that clears."""
        for name in set(OWN_NAMES) - {LOCK_FILE}:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def create(self) -> None:
        for folder in (self.path, self.checkpoints, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, contents: dict[str, Any]) -> None:
        """Replace run.json whole."""
        temporary = self.run_json.with_suffix(".tmp")
        temporary.write_text(json.dumps(contents, indent=2, sort_keys=False, default=str) + "\n")
        temporary.replace(self.run_json)

    def update(self, **contents: Any) -> None:
        """Merge into run.json."""
        self.write({**self.read(), **contents})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def package_versions() -> dict[str, str | None]:
    """Of Python and what a run depends on; None for a package that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in VERSIONED}}


def missing_packages() -> list[str]:
    """What dstrain requires and this Python lacks; [] also where dstrain itself is not installed."""
    try:
        requirements = metadata.requires("dstrain") or []
    except metadata.PackageNotFoundError:
        return []
    names = [re.split(r"[^\w.-]", text)[0] for text in requirements if ";" not in text]  # ; is of extras
    return [name for name in names if _version(name) is None]


def code_sha256() -> str:
    """Of the sources of this package."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def environment_facts() -> dict[str, Any]:
    """Versions, host and start command; nothing that could be secret."""
    return {
        "versions": package_versions(),
        "host": {"name": socket.gethostname(), "cpus": os.cpu_count(), "platform": platform.platform()},
        "command": [sys.executable, *sys.argv],
    }


def difference(stored: Any, now: Any) -> str:
    """What was and what is; of two tables, the first entry that differs."""
    if isinstance(stored, dict) and isinstance(now, dict):
        name = next(name for name in {**now, **stored} if stored.get(name) != now.get(name))
        return f"{name}: {difference(stored.get(name), now.get(name))}"
    return f"{_short(stored)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
