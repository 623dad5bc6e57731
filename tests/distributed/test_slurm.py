"""`dstrain launch --to slurm` on a real Slurm (`tests.slurm`)."""

import pytest

from tests import cluster, faults, host_faults, slurm, slurm_faults

pytestmark = pytest.mark.distributed
if why := cluster.why_not(*slurm.PROGRAMS):
    pytest.skip(why, allow_module_level=True)

# Ends with the code that is next in the file `codes`, after telling its place.
FALSE_TRAINER = """
import os, socket, sys
from pathlib import Path
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
start = os.environ.get("SLURM_RESTART_COUNT", "0")
place = [start, socket.gethostname(), *(os.environ[name] for name in names)]
Path(f"rank_{start}_{os.environ['RANK']}").write_text(" ".join(place))
sys.exit(int(Path("codes").read_text().split()[int(start)]))
"""


@pytest.mark.slow
def test_ranks_get_their_place_and_the_job_acts_on_their_code(tmp_path):
    """Without training: a stop and a crash are queued again, the third start ends as not a number."""
    job_folder = tmp_path / "job"
    job_folder.mkdir()
    (job_folder / "train.py").write_text(FALSE_TRAINER)
    (job_folder / "codes").write_text("75 1 77")
    flags = [*faults.flags(tmp_path / "in"), "--max_steps", "1"]
    with slurm.build_slurm(tmp_path) as queue:
        job = queue.submit(job_folder, ["--max_restarts", "1"], flags, job_folder / "train.py")
        for starts in (1, 2):
            job.wait(lambda n=starts: len(job.codes) == n and job.state == "PENDING", 60)
            job.start_now()
        assert job.wait_for_end(60) == "FAILED"
        assert job.codes == [75, 1, 77]
    for start in range(3):
        ranks = [(job_folder / f"rank_{start}_{rank}").read_text() for rank in range(2)]
        assert ranks == [f"{start} node1 0 0 2 1 node1 1", f"{start} node2 1 0 2 1 node1 1"]


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", slurm_faults.FAULTS)
def test_every_fault_is_noticed_within_a_minute(fault, tmp_path):
    reference = host_faults.uninterrupted(tmp_path / "reference", host_faults.CONFIG, slurm_faults.LimitTrial.steps)
    row = slurm_faults.measure(fault, tmp_path / "cluster", reference)
    assert row.good, row


@pytest.mark.exhaustive
def test_a_killed_batch_script_ends_the_job_and_the_run_has_saved(tmp_path):
    """Slurm takes it for the end of the job: nothing is queued again (docs/clusters/slurm.md)."""
    with cluster.build_cluster(tmp_path / "cluster", slurm_faults.SlurmTrial.num_hosts) as hosts:
        trial = slurm_faults.SlurmTrial(hosts, "Slurm")
        try:
            trial.wait_for("training", lambda: trial.step() >= host_faults.STRIKE_AT)
            slurm_faults.kill_program(trial, "node1", "slurm_script$")
            assert trial.job.wait_for_end(60) == "FAILED"
            assert [row["exit_code"] for row in trial.rows("summary")] == [75], trial.log()
            assert trial.orphans(hosts.names) == 0
        finally:
            trial.close()
