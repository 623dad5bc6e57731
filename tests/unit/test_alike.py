"""What hosts must have in common, with the other host's words put in; real hosts are in distributed/test_hosts.py."""

from pathlib import Path

import pytest

from dstrain import alike, distributed
from dstrain.errors import UserError
from dstrain.models.pretrained import Checkpoint
from dstrain.parallel import Launch

FIRST, ALONE = Launch(rank=0, local_rank=0, world_size=2, local_world_size=1), Launch(0, 0, 1, 1)
FACTS = {"flags": {"--seed": 42, "--max_steps": 4}, "model": {"num_hidden_layers": 2}, "model weights": None}


def other_host_says(monkeypatch, *words):
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, ("node2", *words)])
    monkeypatch.setattr(alike.socket, "gethostname", lambda: "node1")


def test_hosts_that_agree_may_begin(monkeypatch):
    other_host_says(monkeypatch, dict(FACTS), [])
    alike._check_same(lambda: FACTS, FIRST)


def test_what_differs_is_named_with_its_host(monkeypatch):
    other_host_says(monkeypatch, {**FACTS, "flags": {"--seed": 43, "--max_steps": 4}, "model weights": "ab"}, [])
    with pytest.raises(UserError) as refusal:
        alike._check_same(lambda: FACTS, FIRST)
    first, second = refusal.value.problems
    assert first.startswith("node1 and node2 differ in flags (--seed: 42, now 43): start the same command")
    assert "node1 and node2 differ in model weights (null, now ab)" in second


def test_a_problem_of_one_host_is_everybodys(monkeypatch):
    other_host_says(monkeypatch, None, ["M has no model.safetensors"])
    with pytest.raises(UserError, match=r"^node2: M has no model\.safetensors"):
        alike._check_same(lambda: FACTS, FIRST)


@pytest.mark.parametrize("case", ["shared", "copied", "one_byte"])
def test_weights_are_compared_to_the_last_byte(case, monkeypatch, tmp_path):
    """Files that hosts share are not read for it."""
    files = [tmp_path / host / "model.safetensors" for host in ("node1", "node2")]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(bytes(range(256)) * 4096)
    if case == "one_byte":
        with open(files[1], "r+b") as other:
            other.seek(300_001)
            other.write(b"x")
    there = [files[0] if case == "shared" else files[1]]
    read = []
    monkeypatch.setattr(alike, "_xxh3", lambda file, own=alike._xxh3: read.append(file) or own(file))
    monkeypatch.setattr(alike, "find_checkpoint", lambda name: Checkpoint(name, [str(files[0])]))
    stat = there[0].stat()
    theirs = iter([[(stat.st_ino, stat.st_size, stat.st_mtime_ns)], {there[0].name: alike._xxh3(there[0])}])
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, ("node2", next(theirs))])
    monkeypatch.setattr(alike.socket, "gethostname", lambda: "node1")
    read.clear()
    if case == "one_byte":
        with pytest.raises(UserError, match=r"^node1 and node2 differ in model\.safetensors of M: copy the model anew"):
            alike.check_whole_weights("M", FIRST)
    else:
        alike.check_whole_weights("M", FIRST)
    assert read == ([] if case == "shared" else [files[0]])


def test_a_folder_that_another_host_does_not_see_is_refused(monkeypatch, tmp_path):
    other_host_says(monkeypatch, False)  # also to the question where the file is, where only rank 0's word counts
    with pytest.raises(UserError, match=r"is not the same folder on node2 as on node1: name one on a file system"):
        alike.check_shared_folder(tmp_path / "runs" / "mine", FIRST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("made", [0, 1, 2])
def test_the_token_is_found_through_another_name_of_the_same_folder(tmp_path, made):
    """However much of the path is there; hosts may have mounted the disk at different places."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "other_mount").symlink_to(tmp_path / "disk")
    if made:
        Path(tmp_path, "disk", *("runs", "mine")[:made]).mkdir(parents=True)
    folder = tmp_path / "disk" / "runs" / "mine"
    token = alike._leave_token(folder)
    depth = alike._depth(folder)
    assert depth == 2 - made
    assert alike._is_there(alike._ancestor(tmp_path / "other_mount" / "runs" / "mine", depth) / token.name)
    assert not (alike._ancestor(tmp_path / "elsewhere" / "runs" / "mine", depth) / token.name).exists()


def test_nothing_is_left_where_the_folder_is_shared(tmp_path):
    alike.check_shared_folder(tmp_path / "run", ALONE)
    assert list(tmp_path.iterdir()) == []
