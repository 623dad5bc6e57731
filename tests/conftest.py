"""What every test can rely on: markers by folder, GPU tests that skip with the reason, ops built before any rank."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

from tests.launch import ROOT, environment

# A first example pays for imports, and two busy cores are no reason to fail.
hypothesis.settings.register_profile("dstrain", deadline=None)
hypothesis.settings.load_profile("dstrain")
# DeepSpeed compiles with the first `ninja` on PATH, and one of another version starts every op anew.
os.environ["PATH"] = environment()["PATH"]
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items):
    """Mark by folder, and skip `gpu` where there is none. `import torch` is paid only if a GPU test was collected."""
    for item in items:
        folder = Path(item.path).relative_to(ROOT).parts[1]
        if folder in ("distributed", "gpu"):
            item.add_marker(folder)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish(session):
    """Build DeepSpeed's ops before the first rank needs them: inside a test the minutes would count as a hang."""
    selected = [item for item in session.items if item.get_closest_marker("distributed")]
    if not selected or session.config.option.collectonly:
        return
    print("\nbuilding DeepSpeed's ops where they are missing (minutes, once per environment)", flush=True)
    command = [sys.executable, "-m", "dstrain.launch.ops"]
    swaps = has_libaio() and any("nvme" in i.nodeid and i.get_closest_marker("exhaustive") for i in selected)
    for name in ("zero2", "zero3_offload_cpu", *(["zero3_offload_nvme"] if swaps else [])):
        command += ["--deepspeed_config", f"ds_configs/{name}.json"]
    subprocess.run(command, env=environment(), cwd=ROOT, check=True)


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
