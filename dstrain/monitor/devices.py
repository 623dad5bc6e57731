"""What the devices can do and what the processes use: peak FLOP/s, peak memory."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30

# Dense peak in TFLOP/s: (bf16, fp16, fp32 without TF32). None: the device has no unit for the type, or computes it no
# faster than fp32. Patterns are searched in the device's name in this order, the special before the general. Sources:
# NVIDIA data sheets B200/HGX, H200, H100, GH200, A100, A40, A30, A10, L40S, L40, L4, T4, V100, RTX A6000, RTX 6000 Ada,
# and the Blackwell, Ada and Ampere GeForce whitepapers (tensor cores, fp32 accumulation);
# AMD Instinct data sheets MI325X, MI300X, MI250X, MI250, MI210.
# Data sheets that give figures "with sparsity" are halved. A MI250X is two devices, each with half of its figures.
PEAK_TFLOPS: tuple[tuple[str, float | None, float | None, float], ...] = (
    (r"\bGB200\b|\bGB300\b", 2500.0, 2500.0, 80.0),
    (r"\bB200\b|\bB300\b", 2250.0, 2250.0, 75.0),
    (r"\bGH200\b", 989.4, 989.4, 67.0),
    (r"\bH200 NVL\b", 835.5, 835.5, 60.0),
    (r"\bH200\b", 989.4, 989.4, 67.0),
    (r"\bH20\b", 148.0, 148.0, 44.0),
    (r"\bH100 NVL\b", 835.5, 835.5, 60.0),
    (r"\bH100 PCIe\b", 756.0, 756.0, 51.0),
    (r"\bH[18]00\b", 989.4, 989.4, 67.0),
    (r"\bA[18]00\b", 312.0, 312.0, 19.5),
    (r"\bA40\b", 149.7, 149.7, 37.4),
    (r"\bA30\b", 165.0, 165.0, 10.3),
    (r"\bA10G\b", 70.0, 70.0, 35.0),
    (r"\bA10\b", 125.0, 125.0, 31.2),
    (r"\bL40S\b", 362.0, 362.0, 91.6),
    (r"\bL40\b", 181.0, 181.0, 90.5),
    (r"\bL4\b", 121.0, 121.0, 30.3),
    (r"\bV100\b.*PCIE", None, 112.0, 14.0),
    (r"\bV100\b", None, 125.0, 15.7),
    (r"\bT4\b", None, 65.0, 8.1),
    (r"RTX A6000\b", 154.8, 154.8, 38.7),
    (r"RTX 6000 Ada\b", 364.2, 364.2, 91.1),
    (r"RTX 5090\b", 209.5, 209.5, 104.8),
    (r"RTX 4090\b", 165.2, 165.2, 82.6),
    (r"RTX 4080\b", 97.5, 97.5, 48.7),
    (r"RTX 3090\b", 71.0, 71.0, 35.6),
    (r"RTX 3080\b", 59.5, 59.5, 29.8),
    (r"\bMI325X\b", 1307.4, 1307.4, 163.4),
    (r"\bMI300X\b", 1307.4, 1307.4, 163.4),
    (r"\bMI300A\b", 980.6, 980.6, 122.6),
    (r"\bMI250X\b", 191.5, 191.5, 23.95),
    (r"\bMI250\b", 181.05, 181.05, 22.65),
    (r"\bMI210\b", 181.0, 181.0, 22.6),
)
_COLUMNS = {"bfloat16": 1, "float16": 2, "float32": 3}

# Width of the square matmul that measures an unknown device: wide enough to leave the caches, a step still < 0.2 s.
MATMUL_WIDTH = {"cpu": 1024, "device": 4096}


@dataclass(frozen=True)
class Peak:
    """peak_tflops: of one device, in TFLOP/s. peak_source: how it is known, one sentence for run.json."""

    peak_tflops: float
    peak_source: str

    @property
    def flops_per_second(self) -> float:
        return self.peak_tflops * 1e12


def peak_from_table(device_name: str, dtype_name: str) -> Peak | None:
    """The data sheet's dense peak, or None for a device (or a type on it) that the table lacks.

    dtype_name: bfloat16, float16 or float32 (without TF32).
    """
    for pattern, *columns in PEAK_TFLOPS:
        if re.search(pattern, device_name, re.IGNORECASE):
            value = columns[_COLUMNS[dtype_name] - 1]
            return Peak(value, f"data sheet of {device_name}, dense {dtype_name}") if value else None
    return None


def measure_matmul_peak(device: Any, dtype: Any, seconds: float = 0.3) -> Peak:
    """The best rate of a square matmul over `seconds`, with this process's threads.

    device: torch.device. dtype: torch.dtype of the operands. [W, W] @ [W, W], W = `MATMUL_WIDTH`; the fastest
    repetition counts, so that a neighbour on the machine lowers it little.
    """
    import torch

    width = MATMUL_WIDTH["cpu" if device.type == "cpu" else "device"]
    synchronize = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    a = torch.full((width, width), 0.5, dtype=dtype, device=device)
    b = torch.full((width, width), 0.5, dtype=dtype, device=device)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)  # warm-up: kernel choice and, on CPU, packing buffers
    synchronize()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize()
        best = min(best, time.perf_counter() - start)
    tflops = 2 * width**3 / best / 1e12
    name = str(dtype).removeprefix("torch.")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Peak(tflops, f"measured at start: best {name} matmul {width}x{width}x{width} on {device.type}{threads}")


def find_peak(device: Any, dtype: Any) -> Peak:
    """The peak of one device for the training dtype: the data sheet's where the name is known, else a measured matmul.

    device: torch.device; dtype: torch.dtype of the matmuls (the autocast dtype under autocast).
    """
    import torch

    if device.type == "cuda":
        peak = peak_from_table(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))
        if peak is not None:
            return peak
    with torch.no_grad():
        return measure_matmul_peak(device, dtype)


def host_peak_memory_gib() -> float:
    """The largest resident set this process ever had, in GiB (VmHWM of /proc/self/status, which counts in KiB)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / GIB
    # Some sandboxes' /proc has no VmHWM; the kernel's own count (KiB on Linux) is the same quantity.
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def peak_memory_gib(device: Any) -> tuple[float, float]:
    """(device, host) peak memory of this rank in GiB: the allocator's on an accelerator, the peak resident set on host.

    On CPU both are the peak resident set; the accelerator's own figure there is sampled at calls, and no peak.
    """
    host = host_peak_memory_gib()
    if device.type == "cpu":
        return host, host
    import torch

    return torch.accelerator.max_memory_allocated(device) / GIB, host
