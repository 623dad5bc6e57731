"""A run goes on under another layout by itself. The whole matrix is `python -m tests.crossings`."""

import pytest

from tests import checkpoints as ck
from tests import crossings, torture
from tests.launch import run_command

CROSSED = [["zero0-1", "zero3-2", "pp2-2"], ["tp2-2", "tp2-zero3-2", "sp2-2"]]


@pytest.mark.parametrize("names", [CROSSED[0], pytest.param(CROSSED[1], marks=pytest.mark.exhaustive)], ids=" ".join)
def test_checkpoints_cross_layouts_and_export(names, tmp_path):
    results = crossings.cross(names, tmp_path)
    assert len(results) == len(names) ** 2 + len(names)
    for pair, result in results.items():
        assert result["error"] is not None, f"{pair}: {result['text']}"
        assert result["error"] <= result["bound"], pair


@pytest.mark.exhaustive
@pytest.mark.parametrize("source", [0, 1])
def test_the_momenta_of_muon_cross(source, tmp_path):
    """They are of whole matrices at ZeRO 0 and of ranges of them at ZeRO 1: stored alike."""
    muon = {"type": "Muon", "params": {"lr": 0.02}}
    layouts = [(ck.config(0, optimizer=muon), 1), (ck.config(1, "bf16", optimizer=muon), 2)]
    whole, bounds = tmp_path / "whole", {}
    first = ck.start(whole, *layouts[source]).check()
    for target in (0, 1):
        copied = ck.interrupt(whole, tmp_path / f"resumed{target}")
        second = ck.start(copied, *layouts[target]).check()
        bounds[target] = max(abs(a - b) / b for a, b in zip(second.losses(), first.losses(), strict=True))
    assert bounds[source] == 0
    assert bounds[1 - source] < 2e-2


def test_the_real_trainer_goes_on_with_fewer_ranks_and_another_stage(tmp_path):
    whole = tmp_path / "whole"
    first = ck.start(whole, ck.config(2), 2).check()
    ck.interrupt(whole, tmp_path / "resumed")
    second = ck.start(tmp_path / "resumed", ck.config(3), 1).check()
    assert second.losses() == pytest.approx(first.losses(), rel=1e-5)
    assert second.run_json()["identity"] == first.run_json()["identity"]
    notes = " ".join(line["text"] for line in second.metrics("event"))
    assert "world_size 2 -> 1" in notes
    assert "zero_stage 2 -> 3" in notes


@pytest.mark.slow
def test_rounds_of_torture(tmp_path):
    command = [torture.sys.executable, "-m", "tests.torture", "--rounds", "5", "--seed", "3"]
    result = run_command(command, timeout_s=290).check()
    assert '"unloadable": 0, "silent_restart": 0, "wrong_bits": 0, "hang": 0, "shm": 0' in result.stdout
