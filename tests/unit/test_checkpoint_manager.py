"""Saving, keeping, cleaning and restoring, with an engine of one process that is only torch."""

import errno
import json
import os
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dstrain.checkpoint import commit, manager
from dstrain.checkpoint import state as checkpoint_state
from dstrain.checkpoint.manager import CheckpointManager, TrainState, choose_checkpoint, list_checkpoints
from dstrain.errors import DiskError, DiskFullError, UserError


def fake_engine(seed=0, lr=0.1, optimizer=torch.optim.AdamW):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module[0].bias.requires_grad = False
    trained = [p for p in module.parameters() if p.requires_grad]
    return SimpleNamespace(
        module=module,
        optimizer=optimizer(trained, lr=lr),
        lr_scheduler=None,
        zero_optimization_stage=lambda: 0,
        autotp_size=lambda: 1,
        global_steps=0,
        global_samples=0,
        skipped_steps=0,
    )


def train(engine, steps=1):
    for _ in range(steps):
        engine.optimizer.zero_grad()
        engine.module(torch.randn(5, 3)).square().sum().backward()
        engine.optimizer.step()
        engine.global_steps += 1


def make(folder, engine=None, **options):
    options = {"save_steps": 1, "save_total_limit": None, **options}
    return CheckpointManager(folder, engine or fake_engine(), **options)


def state(step):
    return TrainState(step, 4 * step)


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != "latest")


def test_what_was_saved_comes_back_bit_by_bit(tmp_path):
    engine = fake_engine()
    train(engine, 3)
    make(tmp_path, engine).save(state(3), {"window": [1.5]})
    expected = torch.randn(3), np.random.rand(2), random.random()
    train(engine, 2)

    other = fake_engine(seed=9)
    found, extra = make(tmp_path, other).load(tmp_path / "step_00000003")
    assert (found, extra, other.global_steps) == (state(3), {"window": [1.5]}, 3)
    drawn = torch.randn(3), np.random.rand(2), random.random()
    assert torch.equal(drawn[0], expected[0])
    assert (drawn[1] == expected[1]).all()
    assert drawn[2] == expected[2]
    train(other, 2)
    for name, value in engine.module.state_dict().items():
        assert torch.equal(other.module.state_dict()[name], value), name
    assert torch.equal(other.module[0].bias, engine.module[0].bias)  # frozen


def test_a_step_is_saved_once(tmp_path):
    checkpoints = make(tmp_path)
    stats = checkpoints.save(state(1), {})
    assert stats.bytes == sum(p.stat().st_size for p in (tmp_path / "step_00000001").glob("rank_*"))
    assert checkpoints.save(state(1), {}) is None


def test_the_newest_are_kept_and_damaged_ones_do_not_count(tmp_path):
    checkpoints = make(tmp_path, save_total_limit=2)
    for step in (1, 2, 3):
        checkpoints.save(state(step), {})
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    (tmp_path / "step_00000003" / "manifest.json").unlink()
    checkpoints.save(state(4), {})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000004"]


def test_what_an_interrupted_save_left_is_cleaned(tmp_path):
    for step in (1, 3):
        make(tmp_path).save(state(step), {})
    (tmp_path / ".step_00000002.tmp").mkdir()
    (tmp_path / ".step_00000001.old").mkdir()
    (tmp_path / "step_00000003").rename(tmp_path / ".step_00000003.old")
    assert make(tmp_path).restore("auto").state == state(3)
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


def damage(path):
    file = next(path.glob("rank_*"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


def test_a_damaged_checkpoint_is_set_aside_and_said(tmp_path):
    checkpoints = make(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(state(step), {"step": step})
    damage(tmp_path / "step_00000003")
    (tmp_path / "step_00000002" / "manifest.json").unlink()
    restored = make(tmp_path).restore("auto")
    assert (restored.state, restored.extra) == (state(1), {"step": 1})
    assert [word in note for word, note in zip(("00003", "00002"), restored.notes, strict=False)] == [True, True]
    assert names(tmp_path) == ["step_00000001", "step_00000002.damaged", "step_00000003.damaged"]
    assert (tmp_path / "latest").read_text().startswith("step_00000001 ")


def test_nothing_begins_anew_beside_damaged_checkpoints(tmp_path):
    make(tmp_path).save(state(1), {})
    damage(tmp_path / "step_00000001")
    with pytest.raises(UserError, match="none is whole"):
        make(tmp_path).restore("auto")
    assert names(tmp_path) == ["step_00000001"]
    (tmp_path / "step_00000001" / "manifest.json").unlink()
    with pytest.raises(UserError, match="none is whole"):
        choose_checkpoint(tmp_path, "auto")


def test_a_named_checkpoint_is_taken_or_refused(tmp_path):
    checkpoints = make(tmp_path / "run" / "checkpoints")
    for step in (1, 2):
        checkpoints.save(state(step), {})
    one = tmp_path / "run" / "checkpoints" / "step_00000001"
    assert make(tmp_path / "other").restore(str(one)).state == state(1)
    assert make(tmp_path / "other").restore(str(tmp_path / "run")).state == state(2)
    damage(one)
    with pytest.raises(UserError, match="is damaged: its hash"):
        make(tmp_path / "other").restore(str(one))
    with pytest.raises(UserError, match="no complete checkpoint"):
        make(tmp_path / "other").restore(str(tmp_path / "nowhere"))
    assert make(tmp_path / "other").restore("auto") is None
    assert make(tmp_path / "run" / "checkpoints").restore("none") is None


def test_the_json_wins_over_the_checkpoint_and_it_is_said(tmp_path):
    engine = fake_engine()
    train(engine)
    make(tmp_path, engine).save(state(1), {})
    other = fake_engine(lr=0.5)
    notes = make(tmp_path, other).restore("auto").notes
    assert other.optimizer.param_groups[0]["lr"] == 0.5
    assert notes == ["optimizer lr is 0.5 as the JSON says; the checkpoint had 0.1"]


def test_another_optimizer_or_model_is_refused_by_name(tmp_path):
    engine = fake_engine()
    train(engine)
    make(tmp_path, engine).save(state(1), {})
    with pytest.raises(UserError, match="holds the state of AdamW, the JSON asks for SGD"):
        make(tmp_path, fake_engine(optimizer=torch.optim.SGD)).restore("auto")
    wider = fake_engine()
    wider.module[0] = torch.nn.Linear(3, 5)
    with pytest.raises(UserError, match=r"0.weight has shape \[4, 3\], the model \[5, 3\]"):
        make(tmp_path, wider).load(tmp_path / "step_00000001")
    deeper = fake_engine()
    deeper.module.append(torch.nn.Linear(4, 1))
    with pytest.raises(UserError, match="holds no parameter 2"):
        make(tmp_path, deeper).load(tmp_path / "step_00000001")


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    checkpoints = make(tmp_path)
    checkpoints.save(state(1), {})
    monkeypatch.setattr(manager.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="GiB free and the checkpoint needs"):
        checkpoints.save(state(2), {})
    assert names(tmp_path) == ["step_00000001"]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EROFS, DiskError)]
)
def test_a_disk_that_does_not_take_it_keeps_what_was(tmp_path, monkeypatch, background, number, kind):
    """`--ignore_full_disk` passes over a full one only."""
    checkpoints = make(tmp_path, background=background)
    checkpoints.save(state(1), {})
    checkpoints.close()

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(commit, "write_rank", full)

    def save():
        checkpoints.save(state(2), {})
        checkpoints.close()

    with pytest.raises(UserError, match=r"step_00000002 could not be written \(") as raised:
        save()
    assert type(raised.value) is kind and os.strerror(number) in str(raised.value)
    assert names(tmp_path) == ["step_00000001"]
    monkeypatch.undo()
    checkpoints.save(state(2), {})
    checkpoints.close()
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_writing_in_the_background(tmp_path, monkeypatch):
    may_write = threading.Event()
    write = commit.write_rank

    def slow(*args):
        may_write.wait(10)
        return write(*args)

    monkeypatch.setattr(commit, "write_rank", slow)
    engine = fake_engine()
    checkpoints = make(tmp_path, engine, background=True)
    before = engine.module[0].weight.detach().clone()
    assert checkpoints.save(state(1), {}) is None
    train(engine)  # while the checkpoint is on its way
    assert checkpoints.finished() == []
    assert list_checkpoints(tmp_path) == []
    may_write.set()
    checkpoints.save(state(2), {})  # at most one in flight: waits for the first
    checkpoints.close()
    stats = checkpoints.finished()
    assert [s.step for s in stats] == [1, 2]
    assert all(0 < s.stall_s <= s.total_s for s in stats)
    assert checkpoints.finished() == []
    other = fake_engine(seed=9)
    make(tmp_path, other).load(tmp_path / "step_00000001")
    assert torch.equal(other.module[0].weight, before)


def test_weights_do_not_change_before_they_are_copied(tmp_path, monkeypatch):
    """The copy runs beside the next forward and backward pass; the optimizer's step waits for it."""
    may_copy, copy_all, order = threading.Event(), checkpoint_state.copy_all, []

    def slow(pairs):
        if threading.current_thread().name == "checkpoint-copy":
            may_copy.wait(10)
            order.append("copied")
        copy_all(pairs)

    engine = fake_engine()
    train(engine)
    checkpoints = make(tmp_path, engine, background=True)
    monkeypatch.setattr(checkpoint_state, "copy_all", slow)
    before = engine.module[0].weight.detach().clone()
    checkpoints.save(state(1), {})
    assert not order
    threading.Timer(0.3, may_copy.set).start()
    train(engine)
    order.append("stepped")
    assert order[-2:] == ["copied", "stepped"] and checkpoints.memory.waited_s > 0.1
    checkpoints.close()
    (stats,) = checkpoints.finished()
    assert stats.stall_s > 0.1
    other = fake_engine(seed=9)
    make(tmp_path, other).load(tmp_path / "step_00000001")
    assert torch.equal(other.module[0].weight, before)
    assert not torch.equal(other.module[0].weight, engine.module[0].weight)


def test_a_rank_that_ends_alone_lets_its_checkpoint_finish(tmp_path):
    checkpoints = make(tmp_path, background=True)
    checkpoints.settle()
    checkpoints.save(state(1), {})
    checkpoints.settle()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000001"]


def test_a_crash_while_writing_is_raised_where_someone_sees_it(tmp_path, monkeypatch):
    checkpoints = make(tmp_path, background=True)

    def crash(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(commit, "write_rank", crash)
    checkpoints.save(state(1), {})
    with pytest.raises(RuntimeError, match="step_00000001 could not be written: ZeroDivisionError"):
        checkpoints.close()
    assert names(tmp_path) == []


def test_saving_over_a_checkpoint_replaces_it_whole(tmp_path):
    make(tmp_path).save(state(1), {"by": "first"})
    make(tmp_path).save(state(1), {"by": "second"})
    assert make(tmp_path).restore("auto").extra == {"by": "second"}
    assert names(tmp_path) == ["step_00000001"]


def test_the_models_own_files_are_part_of_it(tmp_path):
    make(tmp_path, model_files=lambda: {"config.json": b"{}"}, description={"identity": {"seed": 4}}).save(state(1), {})
    contents = json.loads((tmp_path / "step_00000001" / "manifest.json").read_text())
    assert contents["files"]["model/config.json"]["bytes"] == 2
    assert contents["identity"] == {"seed": 4}
    (tmp_path / "step_00000001" / "model" / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        make(tmp_path).load(tmp_path / "step_00000001")


def test_the_last_checkpoint_takes_no_copy(tmp_path):
    engine = fake_engine()
    train(engine, 3)
    copied, last = make(tmp_path / "a", engine), make(tmp_path / "b", engine, total_steps=3)
    for checkpoints in (copied, last):
        checkpoints.save(state(3), {})
    assert copied.memory.images and not last.memory.images
    weights = [next((tmp_path / run / "step_00000003").glob("rank_*.weight.*")).read_bytes() for run in "ab"]
    assert weights[0] == weights[1]
