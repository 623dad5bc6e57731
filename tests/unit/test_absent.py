"""Hosts that pdsh has done with before the ranks met; over real hosts: tests/distributed/test_doctor.py."""

import base64
import json
import os
import time

from dstrain.launch import absent
from dstrain.parallel import Launch

WORLD = "--world_info=" + base64.urlsafe_b64encode(json.dumps({"node1": [0], "node2": [0, 1]}).encode()).decode()
LAUNCHER = (9, ["python", "-u", "-m", "deepspeed.launcher.launch", WORLD, "--node_rank=0", "dstrain/train.py"])
# pdsh takes the comma out of its own command line
PDSH = (5, ["/usr/bin/pdsh", "-S", "-f", "1024", "-w", "node1", "node2", "cd /x;", "python", WORLD])
SSH = {host: (20, ["ssh", "-oConnectTimeout=10", "-x", host, "cd /x; python"]) for host in ("node1", "node2")}
OTHER = {40: (5, ["pdsh", "-S", "-w", "node1", "--world_info=other"]), 41: (40, ["ssh", "node2", "x"])}


def test_a_host_without_a_connection_is_absent():
    running = {10: LAUNCHER, 20: PDSH, 21: SSH["node1"], 22: SSH["node2"], **OTHER}
    assert absent.absent_hosts(running, 10) == []
    del running[22]
    assert absent.absent_hosts(running, 10) == ["node2"]


def test_without_pdsh_on_this_host_nobody_is_absent():
    assert absent.absent_hosts({10: LAUNCHER, **OTHER}, 10) == []
    assert absent.absent_hosts({10: (9, ["torchrun"]), 20: PDSH}, 10) == []
    assert absent.absent_hosts({}, 10) == []
    assert absent._processes()[os.getpid()][0] == os.getppid()


def test_rank_zero_ends_once_a_host_is_absent_twice(monkeypatch):
    ends, seen = [], iter([["node2"], [], ["node2"], ["node2"]])
    monkeypatch.setattr(absent, "_LOOK_S", 0.01)
    monkeypatch.setattr(absent, "absent_hosts", lambda processes, launcher: next(seen, []))
    monkeypatch.setattr(absent, "exit_now", lambda code, words: ends.append((code, words.args[0])))
    with absent.leaving_without_absent_hosts(Launch(rank=0, local_rank=0, world_size=3, local_world_size=1)):
        deadline = time.monotonic() + 20
        while not ends and time.monotonic() < deadline:
            time.sleep(0.01)
    ((code, line),) = ends
    assert code == 2 and line.startswith("dstrain: error: node2: what was started there has ended")
    assert next(seen, None) is None


def test_once_the_ranks_have_met_a_lost_host_is_not_an_absent_one(monkeypatch):
    ends, looked = [], []
    monkeypatch.setattr(absent, "_LOOK_S", 0.01)
    monkeypatch.setattr(absent, "absent_hosts", lambda processes, launcher: looked.append(1) or met_hosts())
    monkeypatch.setattr(absent, "exit_now", lambda code, words: ends.append(code))

    def met_hosts() -> list[str]:
        return ["node2"] if met.is_set() else []

    with absent.leaving_without_absent_hosts(Launch(rank=0, local_rank=0, world_size=2, local_world_size=1)) as met:
        while not looked:
            time.sleep(0.01)
        met.set()
        time.sleep(0.2)
        assert ends == []
    with absent.leaving_without_absent_hosts(Launch(rank=1, local_rank=0, world_size=2, local_world_size=1)):
        looked.clear()
        time.sleep(0.1)
    assert looked == []  # the other ranks do not look
