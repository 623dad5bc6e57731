"""The benchmark suite as a user runs it: the quick suite through real launchers, and its report."""

import json
import math
import sys

import pytest

from benchmarks.results_file import read_results
from benchmarks.rows import PHASES
from benchmarks.suites import SUITES
from tests.benchmark_results import run_of
from tests.launch import run_command

SPREADS = (
    *("step_time_s", "data_time_s", "tokens_per_second", "tokens_per_second_per_device"),
    *("model_tflops_per_second_per_device", "mfu", "host_memory_gib", "peak_device_memory_gib"),
    "memory_above_imports_gib",
)
NUMBERS = ("imports_gib", "pinned_gib", "nvme_gib", "tokens_per_step", "num_parameters", "peak_tflops", "of_matmul")
OF_DSTRAIN = ("time_to_first_step_s", "checkpoint_gib", "goodput")


@pytest.mark.slow
def test_the_quick_suite_and_its_report(tmp_path):
    """Every number of the report is there and finite; the peer trains the same; what is refused is a result."""
    done = run_command(
        [sys.executable, "-m", "benchmarks.run", "--suite", "quick", "--out", str(tmp_path)], timeout_s=280.0
    ).check()
    last = json.loads(done.stdout.splitlines()[-1])
    cases = read_results(last["results"])["cases"]
    assert last["cases"] == {"ok": 3, "refused": 1}, json.dumps(cases)[:5000]
    made_up = run_of(SUITES["quick"]().cases[0])  # what the report's unit tests stand on
    assert set(made_up) == set(cases["tiny zero2"]["runs"][0])
    flags = [last["results"], "--out", str(tmp_path / "report"), "--against", last["results"]]
    run_command([sys.executable, "-m", "benchmarks.report", *flags]).check()
    report = json.loads((tmp_path / "report" / "report.json").read_text(), parse_constant=pytest.fail)
    rows = {row["name"]: row for row in report["rows"]}
    assert "zero_optimization.stage" in rows["tiny refused"]["reason"]
    trained = [row for row in rows.values() if row["status"] == "ok"]
    for row in trained:
        assert all(positive(row[name][part]) for name in SPREADS for part in ("median", "low", "high")), row
        assert all(is_number(row[name]) for name in NUMBERS), row
        assert 0 < row["mfu"]["median"] < 1.5 and row["losses"][-1] < row["losses"][0]
    ours = [row for row in trained if row["program"] == "dstrain"]
    assert all(positive(row[name]) for row in ours for name in OF_DSTRAIN)
    check_traced(rows)
    (peer,) = [pair for pair in report["comparisons"] if pair["name"] == "tiny ddp"]
    assert peer["agree"] and positive(peer["speed"]["median"]) and positive(peer["memory"])
    assert len(report["against"]["changes"]) == 6 and not report["against"]["regressed"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/svg+xml") >= 4 and all(name in page for name in rows)


def check_traced(rows):
    """The time of a step adds up; two ranks send what the theory of their parallelism says, or known more."""
    for name in ("tiny zero2", "tiny pp2"):
        split = rows[name]["split_s"]
        assert set(split) == set(PHASES) and all(seconds >= 0 for seconds in split.values())
        assert sum(split.values()) == pytest.approx(rows[name]["step_time_s"]["median"], rel=1e-6)
        assert all(split[phase] > 0 for phase in ("forward", "backward", "optimizer", "communication"))
    # DeepSpeed's ZeRO-2 all-reduces its gradients (`use_multi_rank_bucket_allreduce`) where a reduce-scatter would do.
    assert rows["tiny zero2"]["volume_ratio"]["data"] == pytest.approx(1.5, rel=0.05)
    assert rows["tiny pp2"]["volume_ratio"]["pipeline"] == pytest.approx(1.0, rel=0.01)


def is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def positive(value) -> bool:
    return is_number(value) and value > 0
