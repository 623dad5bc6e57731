"""`dstrain checkpoint`: what it prints and returns."""

import json

import pytest

from dstrain.checkpoint.convert import convert
from dstrain.checkpoint.manifest import read_manifest
from dstrain.checkpoint.reshape import CheckpointReader
from dstrain.cli import main
from dstrain.errors import UserError
from tests.unit.test_checkpoint_files import _value, make_checkpoint


@pytest.fixture
def run(tmp_path):
    for step in (3, 6):
        make_checkpoint(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


def test_verify_a_run_and_one_checkpoint(run, capsys):
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": whole") == 2
    damaged = run / "checkpoints" / "step_00000006" / "rank_00000.exp_avg.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert main(["checkpoint", "verify", str(run)]) == 2
    assert "is damaged: its hash" in capsys.readouterr().err
    assert main(["checkpoint", "verify", str(run / "checkpoints" / "step_00000003")]) == 0


def test_verify_finds_a_wrong_latest(run, capsys):
    (run / "checkpoints" / "latest").write_text("step_00000003 0\n")
    assert main(["checkpoint", "verify", str(run)]) == 2
    assert "latest is damaged or old" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["verify", "show"])
def test_what_is_not_there_is_one_line(action, tmp_path, capsys):
    assert main(["checkpoint", action, str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_list_and_show(run, capsys):
    (run / "checkpoints" / "step_00000003" / "manifest.json").unlink()
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["name"], line["whole"]) for line in lines] == [("step_00000003", False), ("step_00000006", True)]
    assert main(["checkpoint", "show", str(run)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["step"], shown["stored"]["parameters"], shown["stored"]["elements"]) == (6, 2, 29)
    assert shown["stored"]["kinds"] == ["exp_avg", "weight"]


@pytest.mark.parametrize("world_size", [1, 3])
def test_convert_writes_the_same_values_for_other_ranks(run, tmp_path, world_size):
    source = run / "checkpoints" / "step_00000006"
    _describe(source)
    ds = tmp_path / "ds.json"
    ds.write_text('{"train_batch_size": 6, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}}')
    target = convert(source, tmp_path / "new" / "step_00000006", str(ds), world_size)
    assert main(["checkpoint", "verify", str(tmp_path / "new")]) == 0
    assert sum(name.endswith(".weight.safetensors") for name in read_manifest(target).files) == world_size
    reader = CheckpointReader(target)
    assert (reader.whole("exp_avg", "a.weight").view(-1) == 2 * _value("a.weight")).all()
    assert reader.scalars["a.weight"] == {"step": 3}
    with pytest.raises(UserError, match="must be a new folder"):
        convert(source, target, str(ds), world_size)
    ds.write_text('{"train_batch_size": 6, "optimizr": {}}')
    with pytest.raises(UserError, match="optimizr"):
        convert(source, tmp_path / "other" / "step_00000006", str(ds), world_size)


def _describe(path):
    """The parts of a manifest that only a real run writes."""
    from dstrain.checkpoint.manifest import write_manifest

    contents = read_manifest(path).contents
    write_manifest(path, {**contents, "layout": {"world_size": 2, "zero_stage": 0}, "identity": {"global_batch": 6}})
