"""The files of a checkpoint: written as safetensors, read in any range, and any changed byte found."""

import errno
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from dstrain.checkpoint import blocks
from dstrain.checkpoint import manifest as mf
from dstrain.checkpoint.cuts import Cut, find_cut
from dstrain.checkpoint.files import Entry, Key, hash_file, write_bytes, write_rank, write_safetensors
from dstrain.checkpoint.reshape import CheckpointReader
from dstrain.checkpoint.state import HostMemory
from dstrain.errors import UserError

SHAPES = {"a.weight": (6, 4), "b.bias": (5,)}


def _value(name):
    return torch.arange(float(torch.Size(SHAPES[name]).numel())) + (100 if name == "b.bias" else 0)


def _entry(kind, name, start, data, cut=""):
    return Entry(str(Key(kind, name, start, cut)), data.dtype, tuple(data.shape), lambda: data)


def _write_rank(folder, rank, entries):
    facts = {"shapes": SHAPES, "scalars": {name: {"step": 3} for name in SHAPES}, "random": None}
    return {name: vars(file) for name, file in write_rank(folder, rank, entries, facts).items()}


def _pieces(rank, world):
    entries = []
    for name in SHAPES:
        whole = _value(name)
        start, end = len(whole) * rank // world, len(whole) * (rank + 1) // world
        entries.append(_entry("weight", name, start, whole[start:end]))
        entries.append(_entry("exp_avg", name, start, whole[start:end] * 2))
    return entries


def make_checkpoint(folder, step=3, world=2):
    """A whole checkpoint of two parameters, with `latest` beside it."""
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    files = {}
    for rank in range(world):
        files.update(_write_rank(path, rank, _pieces(rank, world)))
    (path / "model").mkdir()
    files["model/config.json"] = vars(write_bytes(path / "model" / "config.json", b'{"model_type": "llama"}\n'))
    mf.write_manifest(path, {"step": step, "samples_consumed": 12, "extra": {}, "files": files})
    mf.write_latest(path)
    return path


def test_a_written_file_is_safetensors_and_its_hash_is_its_own(tmp_path):
    data = torch.arange(5, dtype=torch.bfloat16)
    written = write_safetensors(tmp_path / "x.safetensors", [_entry("weight", "a", 0, data)], {"format": "pt"})
    assert hash_file(tmp_path / "x.safetensors") == written
    with safe_open(str(tmp_path / "x.safetensors"), framework="pt") as file:
        assert torch.equal(file.get_tensor("weight|a|0|"), data)


@pytest.mark.parametrize("takes_direct_writes", [True, False])
@pytest.mark.parametrize("size", [0, 1, blocks.BLOCK, blocks.BLOCK + 1, blocks.SEGMENT + blocks.BLOCK + 17])
def test_files_of_any_size_on_disks_that_take_direct_writes_or_not(tmp_path, monkeypatch, size, takes_direct_writes):
    write, refused = blocks.os.write, []

    def picky(fd, data):
        if not takes_direct_writes and blocks.fcntl.fcntl(fd, blocks.fcntl.F_GETFL) & blocks.os.O_DIRECT:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(fd, data)

    monkeypatch.setattr(blocks.os, "write", picky)
    pieces = list(torch.randint(0, 255, (size,), dtype=torch.uint8).split(5_000_000))
    entries = [_entry("weight", str(i), 0, piece) for i, piece in enumerate(pieces)]
    streamed = write_safetensors(tmp_path / "streamed", entries, {})
    assert hash_file(tmp_path / "streamed") == streamed
    assert streamed.bytes % blocks.BLOCK == size % blocks.BLOCK
    assert bool(refused) != takes_direct_writes
    memory = HostMemory()
    for piece in pieces:
        memory.add("copied", piece)
    memory.copy()
    assert write_safetensors(tmp_path / "copied", entries, {}, memory.images.get("copied")) == streamed


@given(world=st.integers(1, 7), start=st.integers(0, 23), length=st.integers(0, 24))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_is_read_whoever_wrote_it(tmp_path_factory, world, start, length):
    path = make_checkpoint(tmp_path_factory.mktemp("c"), world=world)
    length = min(length, 24 - start)
    out = torch.empty(length)
    CheckpointReader(path).read("exp_avg", "a.weight", start, out)
    assert torch.equal(out, 2 * _value("a.weight")[start : start + length])


def test_a_missing_piece_is_named(tmp_path):
    (tmp_path / "c").mkdir()
    _write_rank(tmp_path / "c", 0, [_entry("weight", "a.weight", 0, _value("a.weight")[:10])])
    with pytest.raises(UserError, match="10 of 24 elements of weight"):
        CheckpointReader(tmp_path / "c").whole("weight", "a.weight")
    with pytest.raises(UserError, match="no exp_avg of"):
        CheckpointReader(tmp_path / "c").whole("exp_avg", "a.weight")


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("blocks", [[[3, 3], [1, 1]], [[2, 2]], [[3, 1]]])
def test_tensor_parallel_cuts_come_back_whole_and_are_cut_anew(tmp_path, dim, blocks):
    size = sum(sum(widths) for widths in blocks)
    shape = (size, 3) if dim == 0 else (3, size)
    whole = torch.randn(shape)

    meta = {
        "replicated": False,
        "logical_shape": shape,
        "original_shape": shape,
        "partition_dim": dim,
        "sub_param_shard_widths": blocks if len(blocks) > 1 else None,
        "partition_sizes": blocks[0],
        "conversion": {"unsupported_reason": None},
    }
    parameter = SimpleNamespace(ds_autotp_universal_checkpoint_meta=meta)
    cuts = [find_cut("p", parameter, rank) for rank in range(2)]
    for rank, cut in enumerate(cuts):
        flat = cut.take(whole).view(-1)
        half = len(flat) // 2  # two data-parallel ranks within each cut
        entries = [
            _entry("weight", "p", 0, flat[:half], cut.label),
            _entry("weight", "p", half, flat[half:], cut.label),
        ]
        facts = {"shapes": {"p": shape}, "scalars": {}, "random": None}
        write_rank(tmp_path, rank, entries, facts)
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.whole("weight", "p"), whole)
    other = Cut(shape, dim, ((1, size),))
    for cut in [*cuts, other]:
        out = torch.empty(cut.take(whole).numel() - 1)
        reader.read("weight", "p", 1, out, cut)
        assert torch.equal(out, cut.take(whole).view(-1)[1:])


def test_a_layout_that_tensor_parallelism_does_not_describe_is_refused():
    meta = {
        "replicated": False,
        "logical_shape": (4, 4),
        "partition_dim": None,
        "sub_param_shard_widths": None,
        "partition_sizes": None,
        "conversion": {"unsupported_reason": "fused"},
    }
    parameter = SimpleNamespace(ds_autotp_universal_checkpoint_meta=meta)
    with pytest.raises(UserError, match="no checkpoint can describe"):
        find_cut("p", parameter, 0)


def all_problems(path):
    return mf.find_problems(path) + mf.latest_problems(path.parent)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("pristine"))
    assert all_problems(path) == []
    return path


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_any_single_changed_byte_of_any_file_is_found(pristine, data):
    files = sorted(p for p in pristine.parent.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    raw = path.read_bytes()
    position = data.draw(st.integers(0, len(raw) - 1))
    changed = raw[position] ^ data.draw(st.integers(1, 255))
    try:
        path.write_bytes(raw[:position] + bytes([changed]) + raw[position + 1 :])
        assert all_problems(pristine), f"{path} at {position}"
    finally:
        path.write_bytes(raw)
    assert all_problems(pristine) == []


def test_every_byte_of_manifest_and_latest(pristine):
    for path in (pristine / "manifest.json", pristine.parent / "latest"):
        raw = path.read_bytes()
        for position in range(len(raw)):
            for flip in (1, 32):  # a neighbouring character, the other case
                path.write_bytes(raw[:position] + bytes([raw[position] ^ flip]) + raw[position + 1 :])
                assert all_problems(pristine), f"{path} at {position}"
        path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "manifest.json").unlink(), "no complete checkpoint"),
        (lambda p: (p / "rank_00001.exp_avg.safetensors").unlink(), "is missing"),
        (lambda p: (p / "model" / "config.json").write_text("{"), "bytes, 24 were written"),
        (lambda p: (p / "extra").write_text("x"), "does not belong"),
        (lambda p: (p / "manifest.json").write_text("{}"), "damaged"),
        (lambda p: (p / "manifest.json").write_text("[]"), "damaged"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff"), "damaged"),
        (lambda p: (p.parent / "latest").unlink(), "latest is missing"),
    ],
)
def test_what_is_missing_or_foreign_is_named(tmp_path, damage, words):
    path = make_checkpoint(tmp_path)
    damage(path)
    assert any(words in problem for problem in all_problems(path)), all_problems(path)


def test_only_whole_checkpoints_are_listed(tmp_path):
    for step in (3, 6, 12):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step_00000006" / "manifest.json").unlink()
    (tmp_path / ".step_00000009.tmp").mkdir()
    assert [p.name for p in mf.list_checkpoints(tmp_path)] == ["step_00000003", "step_00000012"]


def test_another_format_is_refused_by_name(tmp_path, monkeypatch):
    path = make_checkpoint(tmp_path)
    monkeypatch.setattr(mf, "FORMAT", 2)
    assert "format 1, this dstrain reads 2" in mf.quick_problems(path)[0]
