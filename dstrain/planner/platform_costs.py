"""What a process costs beside its tensors: the measured constants of a platform, each with the command that gave it."""

from dataclasses import dataclass

MIB = 2.0**20


@dataclass(frozen=True)
class Platform:
    """on_cpu: the devices are the host's memory. runtime_bytes: of a process beside its tensors, on the device.
    fragmentation: bytes that the allocator loses for each byte that comes and goes within a step."""

    on_cpu: bool
    runtime_bytes: float
    fragmentation: float
    imports_gib: float
    shared_gib: float = 0.0

    def overhead(self, bytes_by_part: dict[str, float]) -> dict[str, float]:
        """The parts, with `allocator` and `runtime`."""
        moving = sum(bytes_by_part[name] for name in ("activations", "loss", "communication", "gathered"))
        return {**bytes_by_part, "allocator": self.fragmentation * moving, "runtime": self.runtime_bytes}


CPU = Platform(on_cpu=True, runtime_bytes=90 * MIB, fragmentation=0.8, imports_gib=0.36, shared_gib=66 / 1024)
# Assumed, not measured: half a GiB of CUDA context, NCCL's buffers over NVLink, a tenth lost by the caching allocator.
CUDA = Platform(on_cpu=False, runtime_bytes=2048 * MIB, fragmentation=0.10, imports_gib=3.0)


def platform_for(device: str | None) -> Platform:
    """device: "cpu" or "cuda", as DeepSpeed names its accelerator."""
    return CPU if device in (None, "cpu") else CUDA
