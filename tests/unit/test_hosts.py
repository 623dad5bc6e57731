"""Hostfiles, and programs on hosts; those over a network are in tests/distributed/test_hosts.py."""

import socket
import sys

import pytest

from dstrain.errors import UserError
from dstrain.launch.hosts import SSH_OPTIONS, Host, ask, ask_all, is_this_host, read_hostfile, write_hostfile


def test_a_hostfile_is_read_in_its_order(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# ours\nnode2 slots=8\n\nnode1   slots=4  # the old one\n")
    assert read_hostfile(path) == [Host("node2", 8), Host("node1", 4)]
    write_hostfile(tmp_path / "again", read_hostfile(path))
    assert read_hostfile(tmp_path / "again") == read_hostfile(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node1 slots=0\n", "hostfile:1: 'node1 slots=0' is no host"),
        ("node1\nnode2 slots=x\n", "hostfile:2: 'node2 slots=x' is no host"),
        ("node1 slots=1\nnode1 slots=1\n", "named twice"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_bad_hostfile_is_refused_by_line(tmp_path, text, words):
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(UserError, match=r"NAME slots=N|named twice") as refusal:
        read_hostfile(tmp_path / "hostfile")
    assert words in str(refusal.value)


def test_a_missing_hostfile_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


def test_this_host_is_asked_without_ssh():
    assert is_this_host("localhost") and is_this_host("127.0.0.1") and is_this_host(socket.gethostname())
    assert not is_this_host("203.0.113.7") and not is_this_host("no-such-host.invalid")
    echo = [sys.executable, "-c", "import sys; print(sys.stdin.read() + '!'); sys.exit(3)"]
    first, second = ask_all(["localhost", "127.0.0.1"], echo, timeout_s=20, stdin="word")
    assert (first.host, first.exit_code, first.stdout, first.problem) == ("localhost", 3, "word!\n", None)
    assert second.stdout == "word!\n"


def test_what_never_answers_is_given_up():
    assert "no answer within 1 s" in (ask("localhost", ["sleep", "60"], timeout_s=1).problem or "")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("root@node2: Permission denied (publickey).", "node2 refuses this user's key: ssh-copy-id node2"),
        ("ssh: Could not resolve hostname node2: unknown", "node2 is not a known name"),
        ("ssh: connect to host node2 port 22: Connection refused", "node2 runs no ssh server"),
        ("something new", "ssh to node2 failed (something new)"),
    ],
)
def test_what_ssh_says_is_put_into_words(tmp_path, monkeypatch, said, reason):
    fake = tmp_path / "ssh"
    fake.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 255\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("dstrain.launch.hosts.is_this_host", lambda name: False)
    answer = ask("node2", ["hostname"], timeout_s=20)
    assert answer.problem is not None and reason in answer.problem


def test_ssh_never_waits_for_a_person():
    assert "BatchMode=yes" in SSH_OPTIONS
