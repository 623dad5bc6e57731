"""A run that hangs, or that lost a rank, ends by itself and says what every rank was doing."""

import signal
import time

from dstrain.resilience.postmortem import examine
from tests import faults, forked

FLAGS = ("--max_steps", "1000", "--save_steps", "0")


def test_a_hang_ends_every_rank_with_its_stacks(tmp_path):
    """Rank 1 sleeps in its step, rank 0 waits for it in a collective."""
    with faults.start(tmp_path, "hang@4:1", *FLAGS, "--hang_timeout", "3", ranks=2) as run:
        assert run.wait() == [76, 76], run.stderr(0)
    texts = [(run.folder / "logs" / f"hang_rank_{rank}.txt").read_text() for rank in range(2)]
    assert "in strike" in texts[1] and "in train_batch" in texts[0]
    assert all('"step": 3' in text and "batch under way: samples [" in text for text in texts)
    (summary,) = run.metrics("summary")
    assert summary["exit_code"] == 76 and summary["steps"] == 3
    assert len(run.events("hang")) == 1
    page = examine(run.folder).write()
    assert "the watchdog ended it" in page and "hang_rank_1.txt: step 4" in page and "in strike" in page


def stuck_at_the_start(rank: int) -> None:
    from dstrain import engine
    from dstrain.resilience import watchdog

    def stand_here(*_: object, **__: object) -> None:
        time.sleep(600)

    watchdog.FLOOR_S["start"] = 5.0
    if rank == 1:
        engine.build_engine = stand_here


def test_a_hang_before_the_first_step_ends_every_rank(tmp_path):
    """Rank 0 waits for rank 1 in the first collective of `deepspeed.initialize`. Nothing is written."""
    processes = forked.start([*faults.flags(tmp_path), *FLAGS], 2, tmp_path, stuck_at_the_start)
    with faults.FaultyRun(tmp_path, processes) as run:
        assert run.wait() == [76, 76], run.stderr(0)
    assert "before the first step" in run.stderr(0) and "in initialize" in run.stderr(0)
    assert "in stand_here" in run.stderr(1) and not run.folder.exists()


def test_a_killed_rank_ends_the_others(tmp_path):
    with faults.start(tmp_path, "", *FLAGS, ranks=2) as run:
        run.wait_for_step(3)
        run.processes[1].kill()
        start = time.monotonic()
        assert run.wait(30) == [1, -signal.SIGKILL]
        assert time.monotonic() - start < 10
    (summary,) = run.metrics("summary")
    assert summary["exit_code"] == 1 and "rank 1 has died without a word" in summary["reason"]


def test_an_error_in_one_rank_is_the_reason_of_all(tmp_path):
    with faults.start(tmp_path, "raise@4:1", *FLAGS, ranks=2) as run:
        assert run.wait(45) == [1, 1]
    (summary,) = run.metrics("summary")
    assert "rank 1: RuntimeError: a fault on purpose" in summary["reason"]
    assert "rank_1.log: RuntimeError: a fault on purpose" in examine(run.folder).write()
