"""The benchmark suite without a measurement: its arithmetic, its cases, how a run ends, where a suite goes on."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks.analysis import Spread, compare, goodput, goodput_of_run, knee, marginal_gains, pareto, ratio_in_turns
from benchmarks.cases import Case, deepspeed_json, llama
from benchmarks.machine import build_ops_for
from benchmarks.results_file import Results, read_results, todo
from benchmarks.runner import (
    FAILED,
    OK,
    OUT_OF_MEMORY,
    REFUSED,
    TIMEOUT,
    Ended,
    command_of,
    config_of,
    flags_of,
    how_it_ended,
)
from benchmarks.suites import SUITES
from benchmarks.theory import Shape, data_bytes, measured_bytes, theory_bytes
from dstrain.arguments import parse_arguments
from dstrain.config import RunFacts, load_config, resolve_config
from dstrain.errors import UserError
from dstrain.monitor.comms import CommsTable
from dstrain.monitor.metrics import MetricsWriter
from dstrain.monitor.profiler import split_time
from tests.benchmark_results import MACHINE, run_of
from tests.launch import ROOT, run_command

TINY = llama(64, 2, 4, 128, 512)
ALL = [(suite, case) for make in SUITES.values() for suite in [make()] for case in suite.cases]


def case_named(name: str, **changes) -> Case:
    return Case(**{"name": name, "model": TINY, "ds_config": "zero2.json", "profile": False, **changes})


# --- every case can run


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_every_program_can_be_imported(path):
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


def test_the_suites_are_these():
    assert set(SUITES) == {
        *("quick", "cpu", "prediction", "scaling", "pipeline", "peers", "sequence", "checkpoint", "loader", "gpu"),
    }
    assert len(ALL) >= 113


@pytest.mark.parametrize(("suite", "case"), ALL, ids=[f"{suite.name}: {case.name}" for suite, case in ALL])
def test_flags_and_json_are_accepted(suite, case, tmp_path):
    """As train.py parses and checks them: a case that is to be refused is refused here already."""
    file = config_of(case, tmp_path)
    assert command_of(case, tmp_path)[-1]
    args = parse_arguments(flags_of(dataclasses.replace(case, program="dstrain"), tmp_path, file))
    facts = RunFacts(
        gradient_checkpointing=args.model.gradient_checkpointing,
        compile=args.model.compile is not None,
        device="cuda" if suite.gpus else "cpu",
        device_supports_fp16=bool(suite.gpus),
        device_supports_bf16=True,
        hidden_size=case.model["hidden_size"],
    )

    def resolve():
        options = {"world_size": case.processes, "overrides": args.run.set, "facts": facts}
        return resolve_config(load_config(file), **options).with_total_steps(case.max_steps)

    if "refused" in case.name:
        with pytest.raises(UserError):
            resolve()
        return
    resolved = resolve()
    assert args.run.max_steps == case.max_steps and args.data.block_size <= case.model["max_position_embeddings"]
    dims = resolved.parallel
    assert dims.world_size == case.processes and case.model["num_hidden_layers"] % dims.pp_size == 0


def test_the_gpu_suite_fits_ten_minutes_where_nothing_hangs():
    runs = sum(case.rounds + case.is_traced for case in SUITES["gpu"]().cases)
    assert runs * 45 <= 600  # seconds a run: about 25 of start-up and 10 steps


def test_cases_of_a_turn_train_the_same():
    for suite, case in ALL:
        if case.baseline and case.turn:
            other = next(c for c in suite.cases if c.name == case.baseline)
            same = ("model", "block_size", "max_steps", "warmup_steps", "turn")
            assert all(getattr(case, name) == getattr(other, name) for name in same), case.name


# --- how a run ends


def ended(run: Path, exit_code: int | None, stderr: str = "", *, killed: bool = False) -> tuple[str, str]:
    return how_it_ended(Ended(exit_code, 12.0, stderr, killed), run)


def test_how_a_run_ended(tmp_path):
    assert ended(tmp_path, 0) == (OK, "")
    assert ended(tmp_path, None) == (TIMEOUT, "killed after 12 s")
    line = "[rank0] dstrain: error: zero_optimization.stage is 7: write 0 to 3\n"
    assert ended(tmp_path, 1, line + line + "torchrun says\n") == (
        REFUSED,
        "zero_optimization.stage is 7: write 0 to 3",
    )
    assert ended(tmp_path, 1, "Traceback\nValueError: no\n") == (FAILED, "exit code 1: ValueError: no")
    assert ended(tmp_path, -9, killed=True)[0] == OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes", OUT_OF_MEMORY),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", OUT_OF_MEMORY),
        ("IndexError: list index out of range", FAILED),
    ],
)
def test_the_summary_says_why(tmp_path, reason, status):
    writer = MetricsWriter(tmp_path)
    from dstrain.monitor.metrics import median_fields

    writer.write("summary", exit_code=1, reason=reason, steps=2, **median_fields([]))
    writer.close()
    assert ended(tmp_path, 1, "noise") == (status, reason)


def test_nothing_of_a_run_is_left(tmp_path):
    """A launcher that leaves an orphan, and one that does not end."""
    orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    code = (
        "import sys; from pathlib import Path; from benchmarks.runner import start\n"
        f"a = start([sys.executable, '-c', {orphan!r}], Path({str(tmp_path)!r}), 20.0)\n"
        f"b = start([sys.executable, '-c', 'import time; time.sleep(600)'], Path({str(tmp_path)!r}), 0.5)\n"
        "from dstrain.launch.processes import descendants\n"
        "assert not descendants() and a.exit_code == 0 and b.exit_code is None and b.seconds < 15\n"
    )
    run_command([sys.executable, "-c", code], timeout_s=60.0).check()  # a process of its own: it adopts orphans


# --- where a suite goes on


@pytest.fixture
def results(tmp_path):
    suite = dataclasses.replace(SUITES["quick"](), name="made_up")
    results = Results.open(tmp_path, suite, MACHINE, fresh=True)
    results.begin_session(["python"], {"imports_gib": 0.4, "matmul_tflops": {}})
    return results


def run_all(cases, results, *, status=OK, limit=100):
    """The order in which a suite would run, every run ending so."""
    order = []
    for case, profile in todo(cases, results):
        if len(order) == limit:
            break
        order.append(f"{case.name}{'*' if profile else ''}")
        results.record(case, profile=profile, run=run_of(case) | {"status": status, "reason": "because"})
    return order


def test_turns_and_traces(results):
    a, b = (case_named(name, turn="t", rounds=2, profile=name == "a") for name in "ab")
    assert run_all([a, b, case_named("c")], results) == ["a", "b", "a", "b", "c", "a*"]
    assert run_all([a, b, case_named("c")], results) == []


def test_a_suite_goes_on_where_it_stopped(results, tmp_path):
    cases = [case_named(name, turn="t", rounds=2) for name in "ab"]
    assert run_all(cases, results, limit=3) == ["a", "b", "a"]
    suite = dataclasses.replace(SUITES["quick"](), name="made_up")
    again = Results.open(tmp_path, suite, MACHINE, fresh=False)
    assert run_all(cases, again) == ["b"]
    changed = [dataclasses.replace(case, block_size=128) for case in cases]
    assert run_all(changed, again) == ["a", "b", "a", "b"], "a case that has changed is measured anew"


def test_a_failure_ends_a_case_and_what_follows_it(results):
    ladder = [case_named("1k"), case_named("2k", after="1k", rounds=3), case_named("4k", after="2k")]
    assert run_all(ladder[:1], results) == ["1k"]
    assert run_all(ladder, results, status=OUT_OF_MEMORY) == ["2k"]
    assert run_all(ladder, results) == []


def test_other_files_are_no_results(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match="no results file"):
        read_results(tmp_path / "x.json")


def test_the_file_of_another_program_is_left_alone(tmp_path):
    """`benchmarks.checkpoint` may write into the same folder."""
    suite = SUITES["checkpoint"]()
    path = Results.open(tmp_path, suite, MACHINE, fresh=False).path
    path.write_text('{"medians": {}}')
    with pytest.raises(ValueError, match="another program's file"):
        Results.open(tmp_path, suite, MACHINE, fresh=False)


# --- the arithmetic


def test_the_knee():
    assert knee({1: 100.0, 2: 195.0, 4: 380.0}) == 4
    assert knee({1: 100.0, 2: 190.0, 4: 210.0, 8: 600.0}) == 2, "what lies beyond a step that does not pay is not seen"
    assert knee({1: 100.0, 2: 90.0}) == 1
    assert knee({2: 200.0, 4: 320.0, 8: 420.0}) == 4
    assert marginal_gains({2: 200.0, 4: 320.0, 8: 420.0}) == pytest.approx({4: 0.6, 8: 0.25})
    assert knee({1: 100.0, 2: 160.0}, pays=0.7) == 1


def test_ratios_are_of_each_round():
    drifting = ratio_in_turns([1.0, 2.0, 4.0], [0.5, 1.0, 2.0])
    assert drifting == Spread(2.0, 2.0, 2.0)


def test_goodput():
    assert goodput(1.0, 0.0) == 1.0
    assert goodput(0.5, 50.0, steps=100) == 0.5
    assert goodput_of_run([1.0, 1.0, 1.0, 1.0], [1.0]) == pytest.approx(0.8)


def test_a_regression_is_beyond_the_noise():
    quiet, loud = Spread(100.0, 99.0, 101.0), Spread(100.0, 80.0, 120.0)
    slower = Spread(90.0, 89.0, 91.0)
    assert compare(slower, quiet, higher_is_better=True).regressed
    assert not compare(slower, loud, higher_is_better=True).regressed
    assert not compare(quiet, slower, higher_is_better=True).regressed
    assert compare(quiet, slower, higher_is_better=False).regressed, "memory that grew"
    assert not compare(Spread(99.0, 99.0, 99.0), Spread(100.0, 100.0, 100.0), higher_is_better=True).regressed


def test_pareto():
    points = {"fast": (10.0, 5.0), "small": (4.0, 1.0), "worse": (4.0, 2.0), "between": (7.0, 2.0)}
    assert pareto(points) == ["small", "between", "fast"]


# --- communication


SHAPE = Shape(
    num_parameters=1000,
    num_layers=3,
    hidden_size=8,
    query_width=8,
    key_width=4,
    micro_batch=2,
    block_size=16,
    accumulation=4,
    element_bytes=2,
)
ONE = {"dp_size": 1, "tp_size": 1, "pp_size": 1, "sp_size": 1}


def test_zero_sends_what_its_paper_says():
    """2, 2 and 3 times the parameters for many ranks and one micro-batch."""
    many = 10**6
    assert [round(data_bytes(stage, many, 1.0), 3) for stage in (0, 1, 2, 3)] == [2.0, 2.0, 2.0, 3.0]
    assert data_bytes(2, 2, 100.0, accumulation=4) == 250.0 and data_bytes(3, 2, 100.0, accumulation=4) == 600.0
    assert theory_bytes(SHAPE, stage=3, **ONE) == {}


def test_the_other_kinds():
    assert theory_bytes(SHAPE, stage=1, **ONE | {"tp_size": 2}) == {"tensor": 3 * 4 * 4 * 2 * 16 * 8 * 2}
    assert theory_bytes(SHAPE, stage=1, **ONE | {"pp_size": 2}) == {"pipeline": 4 * 2 * 16 * 8 * 2}
    both = theory_bytes(SHAPE, stage=3, **ONE | {"sp_size": 2})
    assert both == {"data": 3 * 4 * 1000.0, "sequence": 4 * 3 * 2 * 0.5 * 2 * 8 * 2 * (8 + 4) * 2}


def test_measured_bytes_by_kind():
    activation = SHAPE.activation_bytes
    assert activation == 2 * 16 * 8 * 2

    def table(**ops):
        return {op: {"sizes": {str(size): count for size, count in sizes.items()}} for op, sizes in ops.items()}

    zero = table(all_reduce={2000: 1.0}, all_gather_into_tensor={1000: 1.0})
    assert measured_bytes(zero, SHAPE, **ONE | {"dp_size": 2}) == {"data": 2000 + 1000}
    assert measured_bytes(zero, SHAPE, **ONE) == {}, "a group of one rank moves nothing"
    tensor = table(all_reduce={activation: 5.0, 2000: 1.0})
    assert measured_bytes(tensor, SHAPE, **ONE | {"tp_size": 2}) == {"tensor": 5.0 * activation}
    ulysses = table(all_to_all_single={800: 2.0}, reduce_scatter_tensor={1000: 1.0}, send={7: 1.0})
    assert measured_bytes(ulysses, SHAPE, **ONE | {"sp_size": 2}) == {"data": 500.0, "sequence": 800.0}
    assert measured_bytes(table(send={700: 4.0}, recv={700: 4.0}), SHAPE, **ONE | {"pp_size": 2}) == {
        "pipeline": 2800.0
    }


def test_the_table_of_collectives(tmp_path):
    """Without the first step, and per step of those after it."""

    class Logger:
        def __init__(self):
            self.data: dict = {}

        def get_raw_data(self):
            return self.data

    logger = Logger()
    with CommsTable(tmp_path / "comms.json", logger) as table:
        logger.data = {"broadcast": {8: [3, [0.1]]}, "all_reduce": {100: [1, [0.1]]}}
        table.step()
        logger.data = {"broadcast": {8: [3, [0.1]]}, "all_reduce": {100: [3, [0.1]], 50: [2, [0.1]]}}
        table.step()
        logger.data["all_reduce"] = {100: [5, [0.1]], 50: [2, [0.1]]}
        table.step()
    found = json.loads((tmp_path / "comms.json").read_text())
    assert found == {
        "rank": 0,
        "steps": 2,
        "per_step": {"all_reduce": {"count": 3.0, "bytes": 250.0, "sizes": {"50": 1.0, "100": 2.0}}},
    }


def test_the_split_of_a_step():
    """Two steps of 10 s; a collective takes 2 s of each backward pass and goes on 1 s beyond it."""
    events = []
    for start_s in (0.0, 10.0):
        events += [
            ("ProfilerStep#3", (start_s, start_s + 10)),
            ("data", (start_s, start_s + 1)),
            ("forward", (start_s + 1, start_s + 3)),
            ("backward", (start_s + 3, start_s + 8)),
            ("gloo:all_reduce", (start_s + 6, start_s + 9)),
            ("c10d::allreduce_", (start_s + 6, start_s + 6.5)),
            ("optimizer", (start_s + 9, start_s + 9.5)),
            ("aten::mm", (start_s + 1, start_s + 8)),
        ]
    split = split_time([*events, ("forward", (-5.0, -4.0)), ("ProfilerStep#3", (0.0, 10.0))])
    expected = {"data": 1.0, "forward": 2.0, "backward": 3.0, "optimizer": 0.5, "communication": 3.0, "other": 0.5}
    assert split["step_time_s"] == 10.0 and split["steps"] == 2
    assert split["seconds"] == pytest.approx(expected)


def test_deepspeed_json_is_what_it_says():
    config = deepspeed_json(3, batch=8, micro=4, precision="fp32", zero={"overlap_comm": True})
    assert config["zero_optimization"] == {"stage": 3, "overlap_comm": True} and "bf16" not in config


def test_an_op_that_cannot_be_built_does_not_stop_a_suite(monkeypatch, capsys):
    """Its cases are refused by the run itself, which is their result."""
    asked = []

    def build_ops(builders):
        asked.append(builders)
        if "AsyncIOBuilder" in builders:
            raise UserError("no libaio")

    monkeypatch.setattr("dstrain.launch.ops.build_ops", build_ops)
    build_ops_for([str(ROOT / "ds_configs" / name) for name in ("zero3_offload_nvme.json", "zero2.json")])
    assert len(asked) == 2 and capsys.readouterr().err == "no libaio\n"
