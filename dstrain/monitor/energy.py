"""The energy of a run, where the machine has a meter: NVML's of an NVIDIA GPU, RAPL's of the processor packages.

Both are counters of the hardware; nothing is estimated from a data sheet. What others do on the same host is in them.
CO2 is that energy times what codecarbon's table says of a country's grid.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dstrain.errors import UserError

JOULES_PER_KWH = 3.6e6
RAPL = Path("/sys/class/powercap")


@dataclass
class Counter:
    """read(): joules since some moment, which starts again at 0 after `wraps_at` joules (None: never)."""

    read: Callable[[], float]
    wraps_at: float | None = None
    last: float = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.read()

    def advance(self) -> float:
        """Joules since the last call, which must not be more than one turn of the counter ago."""
        before, self.last = self.last, self.read()
        return self.last - before + (self.wraps_at or 0.0) * (self.last < before)


class EnergyMeter:
    """Joules since it was made. `sample` it more often than a counter turns (a RAPL one: tens of minutes)."""

    def __init__(self, counters: list[Counter]):
        self._counters = counters
        self.joules = 0.0

    @property
    def has_reading(self) -> bool:
        return bool(self._counters)

    def sample(self) -> None:
        self.joules += sum(counter.advance() for counter in self._counters)


def build_energy_meter(device: Any, *, is_main_on_host: bool) -> EnergyMeter:
    """Of this rank's GPU and, on the first rank of a host, of its processor packages; without counters it reads 0."""
    counters = []
    if device.type == "cuda" and (gpu := _gpu_counter(device)):
        counters.append(gpu)
    if is_main_on_host:
        counters += package_counters(RAPL)
    return EnergyMeter(counters)


def package_counters(root: Path) -> list[Counter]:
    """One per processor package (`intel-rapl:0`, also AMD's), as far as this user may read them."""
    counters = []
    for folder in sorted(root.glob("intel-rapl:?")):
        try:
            turn = _joules(folder / "max_energy_range_uj")
            counters.append(Counter(partial(_joules, folder / "energy_uj"), turn))
        except (OSError, ValueError):
            continue
    return counters


def _joules(file: Path) -> float:
    return int(file.read_text()) / 1e6


def _gpu_counter(device: Any) -> Counter | None:
    """None without nvidia-ml-py (the extra `gpu`), or where the GPU is too old to count (before Volta)."""
    try:
        import pynvml
        import torch
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return Counter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
    except pynvml.NVMLError:
        return None


def grid_kg_per_kwh(country: str) -> float:
    """kg of CO2 equivalents for a kWh of this country's grid, the mean of a year (by codecarbon, which names it).

    country: ISO 3166's three letters. Raises UserError without codecarbon, and for a country that is not in its table.
    """
    try:
        from codecarbon.input import DataSource
    except ImportError:
        raise UserError("--co2_country needs the package codecarbon: pip install 'dstrain[co2]'") from None
    grids = DataSource().get_global_energy_mix_data()
    if country not in grids:
        raise UserError(
            f"--co2_country {country}: no grid of that name is known: write ISO 3166's three letters, such as DEU"
        )
    return grids[country]["carbon_intensity"] / 1000
