"""Named devices and links, and what of them a training step gets."""

import os
import time
from dataclasses import dataclass
from typing import Any

from dstrain.errors import UserError

GIB = 2.0**30


@dataclass(frozen=True)
class Device:
    """One device and its links.

    memory_gib: usable, of the data sheet's. tflops: dense peak by dtype. bandwidth: of its memory, bytes/s. link: to
    devices of the same host, network: of one device to other hosts (shares_network: of all devices of a host together),
    bytes/s, one direction; latency, network_latency: of a collective there, in seconds. host_link: to the host's
    memory; host_bandwidth: of the host's memory, which its devices share. operator_s: what starting one operator costs.
    matmul, streaming: the shares of peak and bandwidth that kernels reach. pace: how many times longer a real layer
    takes than these rates promise.
    """

    name: str
    kind: str  # "cuda" or "cpu"
    memory_gib: float
    tflops: dict[str, float]
    bandwidth: float
    link: float
    network: float
    latency: float
    network_latency: float
    host_link: float
    host_bandwidth: float
    operator_s: float
    matmul: float
    streaming: float
    pace: float
    host_gib_per_device: float
    source: str
    shares_network: bool = False

    def flops(self, precision: str) -> float:
        """FLOP/s that products of matrices reach."""
        return self.tflops[precision] * 1e12 * self.matmul


# Sources: NVIDIA data sheets of H100 (SXM), H200, A100, L40S: dense tensor peak, memory size and bandwidth, NVLink (one
# direction is half of the total), PCIe. network: one 400 Gb/s (A100: 200) port a device, as in DGX systems; L40S: 100
# Gb/s shared by two. memory_gib: what torch.cuda reports, less than the name says. Assumed, not measured here: matmul,
# streaming, operator_s (starting a kernel from eager PyTorch), host_bandwidth, host_gib_per_device.
_TFLOPS_HOPPER = {"bf16": 989.4, "fp16": 989.4, "fp32": 67.0}
_TFLOPS_AMPERE = {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5}
_COMMON: dict[str, Any] = {
    "kind": "cuda",
    "latency": 20e-6,
    "network_latency": 20e-6,
    "host_bandwidth": 200e9,
    "operator_s": 6e-6,
    "matmul": 0.7,
    "streaming": 0.8,
    "pace": 1.0,
}
DEVICES = {
    device.name: device
    for device in (
        Device("h100-80g", memory_gib=79.1, tflops=_TFLOPS_HOPPER, bandwidth=3.35e12, link=450e9, network=50e9,
               host_link=55e9, host_gib_per_device=256, source="NVIDIA H100 SXM data sheet", **_COMMON),
        Device("h200", memory_gib=139.8, tflops=_TFLOPS_HOPPER, bandwidth=4.8e12, link=450e9, network=50e9,
               host_link=55e9, host_gib_per_device=256, source="NVIDIA H200 SXM data sheet", **_COMMON),
        Device("a100-80g", memory_gib=79.2, tflops=_TFLOPS_AMPERE, bandwidth=2.04e12, link=300e9, network=25e9,
               host_link=25e9, host_gib_per_device=128, source="NVIDIA A100 80GB SXM data sheet", **_COMMON),
        Device("a100-40g", memory_gib=39.4, tflops=_TFLOPS_AMPERE, bandwidth=1.56e12, link=300e9, network=25e9,
               host_link=25e9, host_gib_per_device=128, source="NVIDIA A100 40GB SXM data sheet", **_COMMON),
        Device("l40s", memory_gib=44.4, tflops={"bf16": 362.0, "fp16": 362.0, "fp32": 91.6}, bandwidth=0.864e12,
               link=25e9, network=6e9, host_link=25e9, host_gib_per_device=128, source="NVIDIA L40S data sheet",
               **_COMMON),
    )
}  # fmt: skip

# Two ranks of one machine: what `measure_links` found on two cores of an Intel Xeon, for a plan without ranks to ask.
GLOO_LINK, GLOO_LATENCY = 0.8e9, 0.5e-3
_REDUCED_BYTES = 4 << 20
# Where no layer was tried: of the 10 M Llama of examples/ in bf16, as `planner/pace.py` measures it.
CPU_PACE = 2.0
# Of the copy that measures a CPU: the size of a step's tensors.
_COPY_BYTES = 8 << 20


def find_device(name: str, ranks: int = 1) -> Device:
    """A named device; `cpu` is what each of so many ranks has of this machine, measured now. Raises UserError."""
    if name == "cpu":
        return measure_cpu(max(1, (os.cpu_count() or 1) // ranks))
    if name not in DEVICES:
        raise UserError(f"--device {name} is unknown: write one of cpu, {', '.join(DEVICES)}")
    return DEVICES[name]


def measure_cpu(threads: int, seconds: float = 0.12) -> Device:
    """This machine's rates with so many threads: matmuls, copies, and the cost of an operator. In 0.4 s."""
    import torch

    torch.set_num_threads(threads)

    from dstrain.monitor.devices import measure_matmul_peak

    with torch.no_grad():
        peaks = {
            name: measure_matmul_peak(torch.device("cpu"), dtype, seconds).peak_tflops
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        }
    return cpu_with({**peaks, "fp16": peaks["fp32"]}, seconds)


def cpu_with(
    peaks: dict[str, float], seconds: float = 0.05, link: float = GLOO_LINK, latency: float = GLOO_LATENCY
) -> Device:
    """This machine, its matmul rates known, and those of its links where ranks could measure them."""
    import torch

    from dstrain.monitor.limits import host_limit

    with torch.no_grad():
        source = torch.zeros(_COPY_BYTES // 4)
        target = torch.zeros_like(source)
        bandwidth = 2 * _COPY_BYTES / _fastest(lambda: target.copy_(source), seconds)
        small = torch.zeros(16)
        operator_s = _fastest(lambda: small.add(1.0), 0.01)
    return Device(
        name="cpu",
        kind="cpu",
        memory_gib=host_limit().gib,
        tflops=peaks,
        bandwidth=bandwidth,
        link=link,
        network=1e9,
        latency=latency,
        network_latency=latency,
        host_link=bandwidth,
        host_bandwidth=bandwidth,
        operator_s=operator_s,
        matmul=1.0,
        streaming=1.0,
        pace=CPU_PACE,
        host_gib_per_device=host_limit().gib,
        source=f"measured on this machine, {torch.get_num_threads()} thread(s)",
    )


def measure_links() -> tuple[float, float]:
    """(bytes/s that a rank sends, seconds of a small collective) by all-reduces of the default group. A collective."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return GLOO_LINK, GLOO_LATENCY
    large, small, best = torch.zeros(_REDUCED_BYTES // 4), torch.zeros(1), [float("inf")] * 2
    for _ in range(4):  # the same number on every rank
        for place, tensor in enumerate((small, large)):
            start = time.perf_counter()
            dist.all_reduce(tensor)
            best[place] = min(best[place], time.perf_counter() - start)
    sent = 2 * _REDUCED_BYTES * (dist.get_world_size() - 1) / dist.get_world_size()
    return sent / best[1], best[0]


def _fastest(call: Any, seconds: float) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def device_here(device: Any, precision: str, flops_per_second: float) -> Device | None:
    """The device (torch.device) of this process; None for an accelerator that the table lacks. A collective.

    flops_per_second: its peak for this precision, as already found.
    """
    if device.type == "cpu":
        return cpu_with({precision: flops_per_second / 1e12}, 0.05, *measure_links())
    import torch

    name = torch.cuda.get_device_name(device).lower()
    memory = torch.cuda.get_device_properties(device).total_memory / GIB
    for known in DEVICES.values():
        if known.name.split("-")[0] in name and abs(known.memory_gib / memory - 1) < 0.2:
            return known
    return None
