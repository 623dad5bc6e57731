"""metrics.jsonl: strict JSON, whole lines, exact fields; what a resume and a kill leave of it."""

import json
import math
import os
import threading

import pytest

from dstrain.monitor.metrics import (
    FIELDS,
    MEDIANS,
    MetricsWriter,
    append_missing_summary,
    median_fields,
    read_metrics,
    truncate_to_step,
)


def train_line(step, **values):
    return "train", {**dict.fromkeys(FIELDS["train"], 1.0), "step": step, **values}


def summary_line(exit_code=0):
    return "summary", {
        "exit_code": exit_code,
        "reason": "finished",
        "steps": 1,
        **dict.fromkeys(MEDIANS, 1.0),
    }


def eval_line(step):
    return "eval", {"step": step, "loss": 1.0, "perplexity": math.e, "tokens": 7}


def write_all(run_dir, *lines):
    writer = MetricsWriter(run_dir)
    for kind, fields in lines:
        writer.write(kind, **fields)
    writer.close()


def test_fields_are_the_contract():
    assert " ".join(FIELDS["train"]) == (
        "step loss learning_rate grad_norm tokens tokens_processed tokens_total step_time_s tokens_per_second "
        "tokens_per_second_per_device model_tflops_per_second_per_device mfu "
        "peak_device_memory_gib host_memory_gib data_time_s"
    )
    assert FIELDS["eval"] == ("step", "loss", "perplexity", "tokens")
    assert FIELDS["save"] == ("step", "bytes", "stall_s", "total_s")
    assert FIELDS["event"] == ("step", "name", "text")
    assert FIELDS["summary"][:3] == ("exit_code", "reason", "steps")
    assert len(MEDIANS) == 6
    assert {name.removeprefix("median_") for name in MEDIANS} <= set(FIELDS["train"])


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing is made before the first line"
    writer.write("event", step=0, name="start", text="größer")
    assert read_metrics(tmp_path / "run") == [{"kind": "event", "step": 0, "name": "start", "text": "größer"}]


def test_other_ranks_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, enabled=False)
    writer.write("event", step=0, name="start", text="")
    writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"extra": 1}, {"loss": ...}])
def test_wrong_fields_are_refused(tmp_path, change):
    fields = {**train_line(1)[1], **change}
    fields = {name: value for name, value in fields.items() if value is not ...}
    with pytest.raises(AssertionError, match="fields differ"):
        MetricsWriter(tmp_path).write("train", **fields)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_is_null_and_an_event(tmp_path, value):
    write_all(tmp_path, train_line(3, loss=value, mfu=None))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    train, event = read_metrics(tmp_path)
    assert train["loss"] is None
    assert train["mfu"] is None
    assert event == {"kind": "event", "step": 3, "name": "non_finite", "text": f"train line: loss is {value}"}


def test_truncate_keeps_up_to_the_step_and_drops_summaries(tmp_path):
    write_all(
        tmp_path,
        *(train_line(step) for step in (1, 2)),
        eval_line(2),
        train_line(3),
        ("save", {"step": 2, "bytes": 1, "stall_s": 0.0, "total_s": 0.0}),  # written late, by a thread
        ("event", {"step": 3, "name": "x", "text": ""}),
        summary_line(exit_code=75),
    )
    ended = truncate_to_step(tmp_path, 2)
    assert ended["exit_code"] == 75
    kept = [(line["kind"], line["step"]) for line in read_metrics(tmp_path)]
    assert kept == [("train", 1), ("train", 2), ("eval", 2), ("save", 2)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]
    assert truncate_to_step(tmp_path, 2) is None
    assert len(read_metrics(tmp_path)) == 4


def test_truncate_drops_the_part_of_a_window(tmp_path):
    write_all(tmp_path, train_line(5), eval_line(7), train_line(7))
    truncate_to_step(tmp_path, 7, open_steps=2)
    assert [(line["kind"], line["step"]) for line in read_metrics(tmp_path)] == [("train", 5), ("eval", 7)]


def test_truncate_without_a_file(tmp_path):
    assert truncate_to_step(tmp_path, 5) is None
    assert list(tmp_path.iterdir()) == []


def test_half_a_line_of_a_killed_writer_goes(tmp_path):
    write_all(tmp_path, train_line(1))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "train", "st')
    assert [line["step"] for line in read_metrics(path)] == [1]
    write_all(tmp_path, train_line(2))
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    path.write_bytes(whole[:20])
    truncate_to_step(tmp_path, 5)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("broken", [b"rot\n", b'{"kind": "train", "loss": NaN}\n'])
def test_a_broken_line_is_named(tmp_path, broken):
    write_all(tmp_path, train_line(1))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(broken)
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path)


def test_a_line_that_the_disk_refuses_is_taken_back(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path)
    writer.write(*train_line(1)[:1], **train_line(1)[1])
    real = os.write

    def full(fd, data):
        if len(data) < 30:
            raise OSError(28, "No space left on device")
        return real(fd, data[:25])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            writer.write("event", step=2, name="long", text="x" * 40)
    writer.write("event", step=2, name="after", text="")
    assert [line["kind"] for line in read_metrics(tmp_path)] == ["train", "event"]


def test_threads_do_not_mix_lines(tmp_path):
    writer = MetricsWriter(tmp_path)

    def work(name):
        for step in range(200):
            writer.write("event", step=step, name=name, text="x" * 50)

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_metrics(tmp_path)) == 800


def test_medians_leave_nulls_out():
    lines = [{name.removeprefix("median_"): value for name in MEDIANS} for value in (1.0, 9.0, 2.0, None, math.nan)]
    assert set(median_fields(lines).values()) == {2.0}
    assert set(median_fields([]).values()) == {None}


def test_a_killed_run_gets_its_summary_later(tmp_path):
    assert not append_missing_summary(tmp_path, 137, "killed")
    lines = [train_line(1, step_time_s=9.0), ("event", {"step": 1, "name": "resume", "text": ""})]
    write_all(tmp_path, *lines, train_line(2, step_time_s=3.0))
    assert append_missing_summary(tmp_path, 137, "killed")
    assert not append_missing_summary(tmp_path, 137, "killed")
    summary = read_metrics(tmp_path)[-1]
    assert (summary["exit_code"], summary["steps"]) == (137, 2)
    assert summary["median_step_time_s"] == 3.0, "medians are of the attempt that was killed"


def test_lines_are_strict_json(tmp_path):
    write_all(tmp_path, train_line(1, loss=1e-7), summary_line())
    for text in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=pytest.fail)
