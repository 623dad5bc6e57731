"""What a process costs beside its tensors: the measured constants of a platform, each with the command that gave it."""

from dataclasses import dataclass

MIB = 2.0**20


@dataclass(frozen=True)
class Platform:
    """on_cpu: the devices are the host's memory. runtime_bytes: of a process beside its tensors, on the device.
    lost_bytes, lost_share: what the allocator loses, at all and of each byte that comes and goes within a step; never
    more than lost_times that.
    keeps_freed: what a phase of a step frees is not given back for the next."""

    on_cpu: bool
    keeps_freed: bool
    runtime_bytes: float
    lost_bytes: float
    lost_share: float
    lost_times: float
    imports_gib: float
    shared_gib: float = 0.0

    def overhead(self, bytes_by_part: dict[str, float], on_heap: float) -> dict[str, float]:
        """The parts, with `allocator` and `runtime`. on_heap: bytes of the passes that come from a heap."""
        moving = ("activations", "loss", "communication", "gathered")
        size = on_heap if self.keeps_freed else sum(bytes_by_part[name] for name in moving)
        lost = min(self.lost_bytes + self.lost_share * size, self.lost_times * size)
        return {**bytes_by_part, "allocator": lost, "runtime": self.runtime_bytes}


# glibc 2.36 with the heap of dstrain/launch/heap.py. lost_*: `benchmarks.heap` finds 55 MiB and 0.10 without DeepSpeed,
# whose hooks keep more small objects: a little more, fitted to runs of the suite `prediction`. runtime_bytes: code and
# caches of the kernels, what a run of a tiny model takes above its imports. imports_gib: the same run's `imports_gib`.
CPU = Platform(
    on_cpu=True,
    keeps_freed=True,
    runtime_bytes=35 * MIB,
    lost_bytes=62 * MIB,
    lost_share=0.12,
    lost_times=1.3,
    imports_gib=0.41,
    shared_gib=66 / 1024,
)
# Assumed, not measured: half a GiB of CUDA context, NCCL's buffers over NVLink, a tenth lost by the caching allocator.
CUDA = Platform(
    on_cpu=False,
    keeps_freed=False,
    runtime_bytes=2048 * MIB,
    lost_bytes=0.0,
    lost_share=0.10,
    lost_times=0.10,
    imports_gib=3.0,
)


def platform_for(device: str | None) -> Platform:
    """device: "cpu" or "cuda", as DeepSpeed names its accelerator."""
    return CPU if device in (None, "cpu") else CUDA
