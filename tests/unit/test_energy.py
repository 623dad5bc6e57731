import sys
from types import SimpleNamespace

import pytest

from dstrain.errors import UserError
from dstrain.monitor import energy
from dstrain.monitor.energy import Counter, EnergyMeter, build_energy_meter, package_counters


def test_counts_from_the_start_and_over_a_turn():
    readings = iter([90.0, 95.0, 5.0, 5.0])
    meter = EnergyMeter([Counter(lambda: next(readings), wraps_at=100.0)])
    for expected in (5.0, 15.0, 15.0):
        meter.sample()
        assert meter.joules == expected


def make_package(root, name: str, joules: float) -> None:
    (root / name).mkdir(parents=True)
    (root / name / "energy_uj").write_text(f"{joules * 1e6:.0f}\n")
    (root / name / "max_energy_range_uj").write_text("262143328850\n")


def test_packages_are_added_and_their_parts_are_not(tmp_path, monkeypatch):
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        make_package(tmp_path, name, 100.0)
    (tmp_path / "intel-rapl:2").mkdir()  # one that this user may not read
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert len(package_counters(tmp_path)) == 2
    cpu = SimpleNamespace(type="cpu")
    first, other = (build_energy_meter(cpu, is_main_on_host=main) for main in (True, False))
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (tmp_path / name / "energy_uj").write_text(f"{150 * 10**6}\n")
    first.sample()
    assert first.joules == pytest.approx(100.0) and first.has_reading
    assert not other.has_reading


def test_a_grid_is_codecarbons_and_an_unknown_one_is_refused():
    pytest.importorskip("codecarbon", reason="the extra co2 is not installed")
    assert 0.01 < energy.grid_kg_per_kwh("FRA") < energy.grid_kg_per_kwh("DEU") < energy.grid_kg_per_kwh("POL") < 1.5
    with pytest.raises(UserError, match=r"--co2_country GER: .*such as DEU"):
        energy.grid_kg_per_kwh("GER")


def test_without_codecarbon_no_grid(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon.input", None)
    with pytest.raises(UserError, match=r"pip install 'dstrain\[co2\]'"):
        energy.grid_kg_per_kwh("DEU")
