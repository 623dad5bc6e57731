"""Monitor: windows, rates, memory, resume in the middle of a window, ends by agreement and alone."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dstrain.errors import ExitCode
from dstrain.monitor.devices import (
    PEAK_TFLOPS,
    find_peak,
    host_peak_memory_gib,
    measure_matmul_peak,
    peak_from_table,
    peak_memory_gib,
)
from dstrain.monitor.metrics import read_metrics, truncate_to_step
from dstrain.monitor.monitor import Monitor, RunScale
from dstrain.monitor.progress import NullProgress

CPU = torch.device("cpu")


@dataclass
class Result:
    loss: Any
    grad_norm: Any = 2.0
    learning_rate: float = 0.1
    tokens: Any = 30
    tokens_processed: Any = 32
    skipped: bool = False


def build(run_dir, **options):
    return Monitor(run_dir, **{"device": CPU, **options})


def lines_of(run_dir, kind):
    return [line for line in read_metrics(run_dir) if line["kind"] == kind]


def test_a_line_is_the_mean_of_its_window_and_counts_are_sums(tmp_path):
    monitor = build(tmp_path, logging_steps=2, scale=RunScale(4, flops_per_token=1e9, peak_tflops=0.5))
    monitor.on_step(1, Result(torch.tensor(3.0), torch.tensor(1.0), 0.1, torch.tensor(30), torch.tensor(32)), 0.4, 0.1)
    assert read_metrics(tmp_path) == []
    monitor.on_step(2, Result(2.0, 2.0, 0.3), 0.6, 0.3)
    (line,) = read_metrics(tmp_path)
    assert line["step"] == 2
    assert (line["loss"], line["grad_norm"], line["tokens"], line["tokens_processed"]) == (2.5, 1.5, 60, 64)
    assert line["learning_rate"] == pytest.approx(0.2)
    assert line["step_time_s"] == pytest.approx(0.5)
    assert line["data_time_s"] == pytest.approx(0.2)
    assert line["tokens_per_second"] == pytest.approx(64.0)
    assert line["tokens_per_second_per_device"] == pytest.approx(16.0)
    assert line["model_tflops_per_second_per_device"] == pytest.approx(0.016)
    assert line["mfu"] == pytest.approx(0.032)
    assert line["tokens_total"] == 64


def test_tensors_are_read_at_logging_steps_only(tmp_path):
    class OnDevice:
        reads = 0
        device = torch.device("meta")

        def __float__(self):
            OnDevice.reads += 1
            return 1.0

        __int__ = lambda self: int(float(self))  # noqa: E731

    monitor = build(tmp_path, logging_steps=3)
    for step in (1, 2):
        monitor.on_step(step, Result(OnDevice(), OnDevice(), 0.1, OnDevice(), OnDevice()), 0.1, 0.0)
    assert OnDevice.reads == 0
    monitor.on_step(3, Result(OnDevice()), 0.1, 0.0)
    assert OnDevice.reads == 9


def test_without_norm_flops_or_peak_there_are_nulls_and_no_event(tmp_path):
    monitor = build(tmp_path)
    monitor.on_step(1, Result(1.0, grad_norm=None), 0.1, 0.0)
    (line,) = read_metrics(tmp_path)
    assert line["grad_norm"] is line["mfu"] is line["model_tflops_per_second_per_device"] is None


def test_a_skipped_step_is_an_event_and_not_a_step(tmp_path):
    monitor = build(tmp_path)
    monitor.on_step(1, Result(1.0), 0.1, 0.0)
    monitor.on_step(1, Result(math.nan, grad_norm=math.inf, skipped=True), 0.1, 0.0)
    monitor.on_step(2, Result(1.0), 0.1, 0.0)
    monitor.close(0, "finished")
    kinds = [(x["kind"], x.get("name")) for x in read_metrics(tmp_path)]
    assert kinds == [("train", None), ("event", "skipped_step"), ("train", None), ("summary", None)]
    assert lines_of(tmp_path, "train")[-1]["tokens_total"] == 64


def test_memory_is_the_largest_ranks_and_asked_for_at_logging_steps(tmp_path):
    asked = []

    def max_over_ranks(values):
        asked.append(values)
        return [value + 1.0 for value in values]

    monitor = build(tmp_path, logging_steps=2, max_over_ranks=max_over_ranks)
    for step in range(1, 6):
        monitor.on_step(step, Result(1.0), 0.1, 0.0)
    assert len(asked) == 2
    line = lines_of(tmp_path, "train")[-1]
    assert line["host_memory_gib"] == line["peak_device_memory_gib"] == pytest.approx(asked[-1][1] + 1.0)


@pytest.mark.parametrize(("exit_code", "collectives"), [(0, 2), (75, 2), (1, 1), (76, 1), (77, 1)])
def test_close_flushes_the_window_and_waits_for_others_only_by_agreement(tmp_path, exit_code, collectives):
    calls = []
    monitor = build(tmp_path, logging_steps=2, max_over_ranks=lambda values: calls.append(1) or values)
    for step in (1, 2, 3):
        monitor.on_step(step, Result(float(step)), 0.1, 0.0)
    monitor.close(ExitCode(exit_code), "because")
    monitor.close(1, "again")
    assert len(calls) == collectives
    *_, train, summary = read_metrics(tmp_path)
    assert (train["step"], train["loss"]) == (3, 3.0)
    assert (summary["exit_code"], summary["reason"], summary["steps"]) == (exit_code, "because", 3)
    assert summary["median_step_time_s"] == pytest.approx(0.1)


def test_a_crash_does_not_wait_for_a_dead_device(tmp_path):
    class Dead:
        device = torch.device("meta")

        def __float__(self):
            raise AssertionError("read")

    monitor = build(tmp_path, logging_steps=2)
    monitor.on_step(1, Result(Dead()), 0.1, 0.0)
    monitor.close(76, "hung")
    assert [line["kind"] for line in read_metrics(tmp_path)] == ["summary"]


@pytest.mark.parametrize("known_end", [False, True])
@pytest.mark.parametrize("stop_at", [4, 5, 6, 8])
def test_a_resume_inside_a_window_writes_the_lines_of_the_whole_run(tmp_path, stop_at, known_end):
    def run(monitor, steps):
        for step in steps:
            monitor.on_step(step, Result(torch.tensor(1.0 / step, dtype=torch.float32)), 0.1, 0.0)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(monitor := build(whole, logging_steps=4), range(1, 11))
    monitor.close(0, "finished")

    run(first := build(parts, logging_steps=4, total_steps=stop_at if known_end else None), range(1, stop_at + 1))
    assert (len(lines_of(parts, "train")) == math.ceil(stop_at / 4)) == (known_end or stop_at % 4 == 0)
    state = first.state_dict()
    first.close(75, "stopped")  # writes a partial line
    second = build(parts, logging_steps=4)
    open_steps = second.load_state_dict(state)
    truncate_to_step(parts, stop_at, open_steps)
    run(second, range(stop_at + 1, 11))
    second.close(0, "finished")

    def numbers(run_dir):
        names = ("step", "loss", "tokens", "tokens_processed", "tokens_total", "grad_norm")
        return [tuple(line[name] for name in names) for line in lines_of(run_dir, "train")]

    assert numbers(parts) == numbers(whole)


def test_summary_counts_steps_when_a_resumed_run_made_none(tmp_path):
    first = build(tmp_path)
    first.on_step(1, Result(1.0), 0.1, 0.0)
    second = build(tmp_path)
    second.load_state_dict(first.state_dict())
    second.close(75, "stopped")
    summary = read_metrics(tmp_path)[-1]
    assert summary["steps"] == 1
    assert summary["median_step_time_s"] is None


def test_eval_save_and_overflowing_perplexity(tmp_path):
    monitor = build(tmp_path)
    monitor.on_eval(5, torch.tensor(2.0), torch.tensor(100))
    monitor.on_save(5, 12, 0.1, 0.2)
    monitor.on_eval(6, 1000.0, 100)
    first, save, second, event = read_metrics(tmp_path)
    assert first == {"kind": "eval", "step": 5, "loss": 2.0, "perplexity": math.exp(2.0), "tokens": 100}
    assert save == {"kind": "save", "step": 5, "bytes": 12, "stall_s": 0.1, "total_s": 0.2}
    assert second["perplexity"] is None
    assert event["name"] == "non_finite"


def test_other_ranks_write_nothing_but_know_the_lines(tmp_path):
    monitor = build(tmp_path, is_main=False)
    monitor.on_step(1, Result(1.0), 0.1, 0.0)
    monitor.event(1, "x", "y")
    monitor.close(0, "finished")
    assert list(tmp_path.iterdir()) == []
    assert monitor.train_lines[0]["loss"] == 1.0


def test_null_progress_takes_every_call():
    progress = NullProgress()
    progress.start(0)
    progress.advance(1)
    progress.show_train({})
    progress.show_eval({})
    progress.show_note("")
    progress.close()


@pytest.mark.parametrize(
    ("device", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H200", "float16", 989.4),
        ("NVIDIA L4", "bfloat16", 121.0),
        ("NVIDIA L40S", "bfloat16", 362.0),
        ("NVIDIA A10G", "bfloat16", 70.0),
        ("Tesla V100-SXM2-32GB", "float16", 125.0),
        ("Tesla T4", "float16", 65.0),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("AMD Instinct MI300X", "bfloat16", 1307.4),
        ("AMD Instinct MI250X", "float16", 191.5),
    ],
)
def test_peaks_of_known_devices(device, dtype, tflops):
    peak = peak_from_table(device, dtype)
    assert peak.peak_tflops == tflops
    assert device in peak.peak_source


@pytest.mark.parametrize(("device", "dtype"), [("Tesla V100-SXM2-32GB", "bfloat16"), ("Unknown 9000", "float16")])
def test_no_peak_is_guessed(device, dtype):
    assert peak_from_table(device, dtype) is None


def test_half_precision_is_never_slower_than_single():
    for pattern, bf16, fp16, fp32 in PEAK_TFLOPS:
        assert fp16 >= fp32, pattern
        assert bf16 is None or bf16 == fp16, pattern


def test_a_cpu_is_measured():
    peak = find_peak(CPU, torch.float32)
    assert 0.001 < peak.peak_tflops < 100
    assert "float32" in peak.peak_source
    assert f"{torch.get_num_threads()} threads" in peak.peak_source
    assert peak.flops_per_second == peak.peak_tflops * 1e12
    assert measure_matmul_peak(CPU, torch.bfloat16, seconds=0.01).peak_tflops > 0


def test_host_memory_is_a_peak_and_counts_what_was_freed():
    before = host_peak_memory_gib()
    block = torch.ones(int((before + 0.25) * 2**30) // 4)  # larger than the whole peak so far
    del block
    device, host = peak_memory_gib(CPU)
    assert host == device >= before + 0.2
