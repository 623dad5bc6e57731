"""report.html: one file without outside resources that shows what run.json and metrics.jsonl hold."""

import base64
import html
import json
import re
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from dstrain.monitor.charts import MAX_POINTS, column, smooth, thin
from dstrain.monitor.monitor import Monitor, RunScale
from dstrain.monitor.report import write_report

RUN_JSON = {
    "arguments": {"max_steps": 60, "set": ["optimizer.params.lr=1e-3"], "profile": False, "config_name": None},
    "identity": {"model": {"model_type": "llama", "rope_parameters": {"rope_theta": 10000.0}}, "seed": 42},
    "deepspeed_config": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "bf16": {"enabled": True}},
    "origins": {
        "optimizer": "user",
        "optimizer.params.lr": "--set",
        "bf16.enabled": "derived: the file <says> auto",
    },
    "world": {"world_size": 2},
    "num_parameters": 10_624_128,
    "data": {"source": "built-in corpus", "sha256": "abc123"},
    "versions": {"torch": "2.13.0"},
    "host": {"name": "vm"},
    "startup_s": {"imports": 4.2, "total": 75.0},
    "sample": {"prompt": "def f(", "text": "x):\n    return '<script>'"},
}


def make_run(run_dir, steps=60, exit_code=0):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps(RUN_JSON))
    monitor = Monitor(run_dir, device=torch.device("cpu"), scale=RunScale(2, 1e7, 0.5))
    for step in range(1, steps + 1):
        loss = float("nan") if step == 7 else 5.0 / step
        result = SimpleNamespace(
            loss=loss, grad_norm=1.0, learning_rate=0.1, tokens=31, tokens_processed=32, skipped=False
        )
        monitor.on_step(step, result, 0.5, 0.001)
    monitor.event(steps // 2, "resume", "from <there>")
    monitor.on_eval(steps, 0.25, 1000)
    monitor.on_save(steps, 5_000_000, 0.1, 0.2)
    monitor.close(exit_code, "finished" if exit_code == 0 else "RuntimeError: boom")
    return run_dir


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "my-run")).read_text()


def test_the_page_needs_nothing_from_outside(page):
    sources = re.findall(r'(?:src|href|srcset)\s*=\s*"([^"]*)"', page)
    assert len(sources) == 7
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "@import" not in page
    assert "url(" not in page
    assert "<script" not in page, "the sample's own <script> is escaped"
    for source in sources:
        svg = ElementTree.fromstring(base64.b64decode(source.split(",")[1]))
        links = [v for x in svg.iter() for k, v in x.attrib.items() if k.endswith("href")]
        assert all(link.startswith("#") for link in links)


def test_the_page_shows_the_figures(page):
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for words in (
        "my-run",
        "finished · 60 steps · exit code 0",
        "llama · 10.6M parameters · built-in corpus · ZeRO-0, bf16 · 2 devices",
        "0.2500",  # held-out loss
        "1.28",  # its perplexity
        "step 60, from 5.0000",
        "1,920",  # tokens
        "500 ms",
        "5MB",
        "train line: loss is nan",
        "from <there>",
        "the file <says> auto",
        "abc123",
        "rope_parameters.rope_theta",
        "2.13.0",
        "1:15",
        "return '<script>'",
    ):
        assert words in text, words
    for title in ("Loss", "Learning rate", "Gradient norm", "Throughput", "Peak memory", "Step time"):
        assert f"<h2>{title}</h2>" in page


def test_every_value_has_its_origin(page):
    rows = re.findall(r'<tr><td class="key">(.*?)</td><td class="value">(.*?)</td><td><span class="tag (.*?)">', page)
    assert rows == [
        ("optimizer.type", "AdamW", "user"),
        ("optimizer.params.lr", "0.001", "set"),
        ("bf16.enabled", "true", "derived"),
    ]


def test_a_failed_run_says_so(tmp_path):
    page = write_report(make_run(tmp_path, steps=3, exit_code=1)).read_text()
    assert "RuntimeError: boom" in page
    assert "badge bad" in page


def test_a_folder_without_steps_or_run_json(tmp_path):
    page = write_report(tmp_path).read_text()
    assert "No step was logged" in page
    assert "no summary: running, or killed" in page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_same_run_gives_the_same_file(tmp_path):
    make_run(tmp_path, steps=5)
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


def test_a_long_run_gives_a_small_file(tmp_path):
    make_run(tmp_path, steps=5000)
    assert write_report(tmp_path).stat().st_size < 2_000_000


def test_plotting_is_imported_only_for_the_report():
    code = (
        "import sys, dstrain.monitor.monitor, dstrain.monitor.report, dstrain.monitor.progress\n"
        "print([m for m in ('matplotlib', 'jinja2', 'torch', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_thinning_keeps_the_mean_and_the_length():
    xs, ys = thin(([float(i) for i in range(8000)], [float(i) for i in range(8000)]))
    assert len(xs) == len(ys) == MAX_POINTS
    assert sum(ys) / len(ys) == pytest.approx(3999.5)
    assert thin(([1.0], [2.0])) == ([1.0], [2.0])


def test_smoothing_neither_lags_nor_shifts_the_ends():
    line = ([float(i) for i in range(20)], [2.0 * i for i in range(20)])
    assert smooth(line, 4)[1] == pytest.approx(line[1])


def test_columns_leave_nulls_out():
    assert column([{"step": 1, "a": None}, {"step": 2, "a": 0.5}], "a", 100.0) == ([2.0], [50.0])
