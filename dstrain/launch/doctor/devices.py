"""The devices of this host and whether they are well: NVIDIA's through nvidia-ml-py (the extra `gpu`), or the CPU's."""

import os
from pathlib import Path
from typing import Any

GIB = 2.0**30
_DRIVER = Path("/proc/driver/nvidia/gpus")
_CPU_FLAGS = ("avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
# Bits of NVML's clocks event reasons (nvml.h) that a healthy GPU does not have.
_THROTTLES = {0x08: "hardware slowdown", 0x20: "too hot", 0x40: "much too hot", 0x80: "power brake"}


def cpu() -> dict[str, Any]:
    """Cores that this process may use, the model and the instruction sets that matter."""
    flags: set[str] = set()
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
        elif name.strip() == "model name":
            model = value.strip()
        if flags and model:
            break
    found = [name for name in _CPU_FLAGS if name in flags]
    return {"cores": len(os.sched_getaffinity(0)), "model": model, "flags": found}


def gpus(nvml: Any = None) -> tuple[list[dict[str, Any]], str | None]:
    """NVIDIA's devices, and why they could not be asked. nvml: the module `pynvml`; found by itself if None."""
    there = _DRIVER.is_dir() and any(_DRIVER.iterdir())
    if nvml is None:
        try:
            import pynvml
        except ImportError:
            return [], "there are GPUs, but no nvidia-ml-py to ask them: pip install nvidia-ml-py" if there else None
        nvml = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return [], f"the GPUs do not answer ({error}): look at `nvidia-smi` and `dmesg`" if there else None
    try:
        return [_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())], None
    except nvml.NVMLError as error:
        return [], f"a GPU does not answer ({error}): look at `nvidia-smi` and `dmesg`"


def _gpu(nvml: Any, handle: Any) -> dict[str, Any]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    try:
        uncorrected = nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
    except nvml.NVMLError:  # a GPU without ECC, or with it switched off
        uncorrected = 0
    name = nvml.nvmlDeviceGetName(handle)
    return {
        "name": name.decode() if isinstance(name, bytes) else name,
        "memory_gib": memory.total / GIB,
        "free_gib": memory.free / GIB,
        "uncorrected_errors": uncorrected,
        "throttled": [text for bit, text in _THROTTLES.items() if reasons & bit],
        "processes": [process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)],
    }
