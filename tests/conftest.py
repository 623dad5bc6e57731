"""What every test can rely on: markers by folder, GPU tests that skip with the reason, ops built before any rank.

DeepSpeed's ops are built beside the unit tests, which come first: both take minutes, and one core each.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import hypothesis
import pytest

from tests.launch import ROOT, environment

# A first example pays for imports, and two busy cores are no reason to fail.
hypothesis.settings.register_profile("dstrain", deadline=None)
hypothesis.settings.load_profile("dstrain")
# DeepSpeed compiles with the first `ninja` on PATH, and one of another version starts every op anew.
os.environ["PATH"] = environment()["PATH"]
SHARED_DATA = ROOT.parent / "shared" / "data"


BUILD = pytest.StashKey[tuple[subprocess.Popen, IO[str]]]()


def pytest_collection_modifyitems(items):
    """Mark by folder, `ops` last, and skip `gpu` where there is none. `import torch` is paid only for a GPU test."""
    for item in items:
        folder = Path(item.path).relative_to(ROOT).parts[1]
        if folder in ("distributed", "gpu"):
            item.add_marker(folder)
        if folder == "distributed":
            item.add_marker("ops")
    items.sort(key=lambda item: item.get_closest_marker("ops") is not None)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish(session):
    """Begin to build DeepSpeed's ops where a selected test needs them."""
    selected = [item for item in session.items if item.get_closest_marker("ops")]
    if not selected or session.config.option.collectonly:
        return
    command = [sys.executable, "-m", "dstrain.launch.ops"]
    swaps = has_libaio() and any("nvme" in i.nodeid and i.get_closest_marker("exhaustive") for i in selected)
    for name in ("zero2", "zero3_offload_cpu", *(["zero3_offload_nvme"] if swaps else [])):
        command += ["--deepspeed_config", f"ds_configs/{name}.json"]
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115  read when the build is waited for
    build = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    session.config.stash[BUILD] = build, output
    session.config.add_cleanup(build.wait)  # a killed build leaves a lock


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Wait for the ops before the first test that needs them, and outside its time limit: minutes would be a hang."""
    if BUILD in item.config.stash and item.get_closest_marker("ops"):
        build, output = item.config.stash[BUILD]
        del item.config.stash[BUILD]
        terminal = item.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line("\nwaiting for DeepSpeed's ops (minutes, once per environment)", flush=True)
        code = build.wait()
        output.seek(0)
        said = output.read()
        terminal.write_line(said)
        if code != 0 or "ops ready" not in said:  # a test that ends all below pytest takes its code along
            pytest.exit("DeepSpeed's ops cannot be built", returncode=pytest.ExitCode.INTERNAL_ERROR)
    return (yield)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data and weights beside the checkout (../shared/data); the test skips where they are absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def libaio() -> None:
    """Skips where NVMe offload cannot be built."""
    if not has_libaio():
        pytest.skip("no libaio headers: apt-get install libaio-dev")


def has_libaio() -> bool:
    header = any(Path(folder, "libaio.h").exists() for folder in ("/usr/include", "/usr/local/include"))
    return header and shutil.which("c++") is not None
