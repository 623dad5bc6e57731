"""Runs over hosts that lose one: they go on with what is left, and take it back. All faults: `tests.host_faults`."""

import pytest

from tests import host_faults
from tests.cluster import build_cluster, why_not

pytestmark = pytest.mark.skipif(why_not("pdsh") is not None, reason=str(why_not("pdsh")))


def test_a_run_goes_on_without_a_crashed_host(tmp_path):
    """Two hosts over pdsh; the second dies, the first goes on with the same global batch and the same losses."""
    steps = 8
    reference = host_faults.uninterrupted(tmp_path / "reference", host_faults.CONFIG, steps)
    with build_cluster(tmp_path / "cluster") as cluster:
        trial = host_faults.Trial(cluster, "pdsh", steps=steps)
        try:
            committed = trial.folder / "checkpoints" / "latest"  # the save of step 4 goes on beside step 5
            trial.wait_for("training", lambda: trial.step() >= 4 and committed.exists())
            cluster.crash("node2")
            assert trial.end() == [0], trial.log()
            assert "starts 1 rank on node1; without node2" in trial.log()
            assert len(trial.resumes()) == 1 and host_faults.difference(trial, reference) <= 1e-5
            assert trial.strangers[0].poll() is None and not trial.processes()
        finally:
            trial.close()


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", host_faults.LAYOUTS)
def test_two_hosts_one_and_two_again(layout, tmp_path):
    there = host_faults.there_and_back(layout, tmp_path)
    assert there.worlds == [2, 1, 2] and there.difference <= 1e-5, there


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", host_faults.WAYS)
@pytest.mark.parametrize("fault", host_faults.FAULTS)
def test_every_fault_is_noticed_within_a_minute(way, fault, tmp_path):
    if reason := host_faults.LEFT_OUT.get((way, fault)):
        pytest.skip(reason)
    reference = host_faults.uninterrupted(tmp_path / "reference", host_faults.CONFIG)
    row = host_faults.measure(way, fault, tmp_path / "cluster", reference)
    assert row.good, row
