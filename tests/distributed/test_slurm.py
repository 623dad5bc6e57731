"""`dstrain launch --to slurm` on a real Slurm of two hosts (`tests.slurm`)."""

import pytest

from tests import cluster, slurm

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
    with slurm.build_slurm(tmp_path) as queue:
        job = queue.submit(
            job_folder, ["--max_restarts", "1"], slurm.training(tmp_path / "in", 1), job_folder / "train.py"
        )
        for starts in (1, 2):
            job.wait(lambda n=starts: len(job.codes) == n and job.state == "PENDING", 60)
            job.start_now()
        assert job.wait_for_end(60) == "FAILED"
        assert job.codes == [75, 1, 77]
    for start in range(3):
        ranks = [(job_folder / f"rank_{start}_{rank}").read_text() for rank in range(2)]
        assert ranks == [f"{start} node1 0 0 2 1 node1 1", f"{start} node2 1 0 2 1 node1 1"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", ["usr1", "kill"])
def test_a_run_that_was_queued_again_has_the_curve_of_the_uninterrupted_one(fault, tmp_path):
    steps = slurm.STEPS[fault]
    losses = slurm.uninterrupted(tmp_path / "plain", steps)
    with slurm.build_slurm(tmp_path) as queue:
        job, row = slurm.measure(queue, fault, tmp_path / "job", steps, at_step=60)
    assert (row["state"], row["exit_codes"][-1]) == ("COMPLETED", 0)
    assert row["noticed_s"] < 60
    if fault == "kill":
        assert row["exit_codes"][0] == 137 and row["steps_lost"] <= 50 + 10
    else:
        assert row["exit_codes"][0] == 75 and row["steps_lost"] == 0
    assert slurm.largest_difference([row["loss"] for row in job.metrics()], losses) <= 1e-5
