"""How a module of dstrain is run on any host: by this very interpreter, from this very folder, as DeepSpeed does."""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

# What the checks read of a rank's environment: DeepSpeed's launcher hands on the first by itself, the others where
# .deepspeed_env of the home folder, or of this one, holds them (deepspeed 0.19.8, launcher/runner.py).
_BY_ITSELF = ("PYTHONPATH", "NCCL_SOCKET_IFNAME")
_READ = (
    *("PATH", "GLOO_SOCKET_IFNAME", "TORCH_EXTENSIONS_DIR", "TMPDIR", "HOME", "DS_ACCELERATOR", "CXX"),
    "CUDA_VISIBLE_DEVICES",
)


def module_command(module: str, *words: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The command that runs a module of dstrain on any host, with what of the environment a rank there will have."""
    variables = {name: environment[name] for name in _BY_ITSELF if name in environment}
    for folder in (Path.home(), Path.cwd()):
        variables |= _read(folder / environment.get("DS_ENV_FILE", ".deepspeed_env"))
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), variables.get("PYTHONPATH")]))
    pairs = [f"{name}={value}" for name, value in variables.items()]
    start = shlex.join(["env", *pairs, sys.executable, "-m", module, *words])
    return ["sh", "-c", f"cd {shlex.quote(os.getcwd())} && exec {start}"]


def _read(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    pairs = (line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
    return {name: value for name, value in pairs if name in (*_READ, *_BY_ITSELF)}
