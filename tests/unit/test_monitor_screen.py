"""What reaches the screen, and what goes to the logs instead; every case in a process of its own."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain.monitor.progress import format_count, format_duration, render_loss_curve

NOISE = """
import logging, os, sys, warnings
from dstrain.monitor.logs import QuietOutput, screen
from dstrain.errors import UserError
rank, run_dir, end = int(sys.argv[1]), sys.argv[2], sys.argv[3]
early = logging.getLogger("early"); early.propagate = False; early.addHandler(logging.StreamHandler(sys.stderr))
with QuietOutput(rank) as quiet:
    print("printed-early"); warnings.warn("warned-early"); os.system("echo child-early")
    if end == "refused":
        raise UserError("refused: write something else")
    if end == "crash-early":
        raise RuntimeError("boom")
    quiet.attach(run_dir)
    late = logging.getLogger("late"); late.addHandler(logging.StreamHandler(sys.stdout))
    print("printed-late"); os.system("echo child-late")
    for _ in range(3):
        warnings.warn("warned-late")
        exec("warnings.warn('warned-late')")
    early.warning("early-warning"); late.warning("late-warning"); early.error("early-error")
    print("to-the-screen", file=screen())
    if end == "crash":
        raise RuntimeError("boom")
print("after")
"""

DISPLAY = """
import sys, types
from dstrain.monitor.logs import QuietOutput, screen
from dstrain.monitor.metrics import FIELDS
from dstrain.monitor.progress import build_progress
with QuietOutput(0) as quiet:
    quiet.attach(sys.argv[1])
    progress = build_progress(40, is_main=True)
    print("noise", type(progress).__name__)
    for step in range(1, 41):
        progress.advance(step)
        line = {**dict.fromkeys(FIELDS["train"], 1.0), "step": step, "loss": 2.0 / step, "mfu": 0.452}
        line["tokens_per_second"] = 12345.0
        progress.show_train(line)
        print("noise between")
    progress.show_eval({"step": 40, "loss": 1.5, "perplexity": 4.4817, "tokens": 1})
    progress.show_note("step 40: saved [brackets]")
    print("results", file=screen())
    progress.close()
"""


def run_code(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def test_rank_zero_shows_its_own_words_and_errors(tmp_path):
    done = run_code(NOISE, 0, tmp_path, "fine")
    assert done.returncode == 0
    assert done.stdout.split() == ["to-the-screen", "after"]
    assert done.stderr.split() == ["early:", "early-error"]
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    for words in ("printed-early", "warned-early", "child-early", "printed-late", "child-late", "late-warning"):
        assert words in log
    assert "early-warning" in log
    assert log.count("UserWarning: warned-late") == 2, "each warning once, whatever the filters of a library"


def test_other_ranks_show_nothing(tmp_path):
    done = run_code(NOISE, 3, tmp_path, "fine")
    assert (done.stdout.split(), done.stderr) == (["after"], "")
    assert "early-error" in (tmp_path / "logs" / "rank_3.log").read_text()


def test_a_log_is_appended_to(tmp_path):
    for _ in range(2):
        run_code(NOISE, 0, tmp_path, "fine")
    assert (tmp_path / "logs" / "rank_0.log").read_text().count("--- started") == 2


def test_a_refused_start_writes_nothing_and_shows_no_noise(tmp_path):
    done = run_code(NOISE, 0, tmp_path, "refused")
    assert "noise" not in done.stdout
    assert "printed-early" not in done.stderr
    assert "refused: write something else" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("end", ["crash", "crash-early"])
def test_a_crash_shows_its_traceback_on_every_rank(tmp_path, rank, end):
    done = run_code(NOISE, rank, tmp_path, end)
    assert done.returncode == 1
    assert "RuntimeError: boom" in done.stderr
    assert ("printed-early" in done.stderr) == (end == "crash-early"), (
        "before there is a log, the noise is the only hint"
    )


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    done = run_code(DISPLAY, tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 43
    assert lines[0].startswith("step  1/40  loss 2.0000  lr 1.00e+00  grad norm 1  12.3k tokens/s  mfu 45.2%")
    assert lines[40] == "step 40/40  held-out loss 1.5000  perplexity 4.48"
    assert lines[41] == "step 40: saved [brackets]"
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("columns", [60, 100])
def test_a_bar_in_a_terminal(tmp_path, columns):
    main, side = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "24", "TERM": "xterm-256color"}
    with subprocess.Popen(
        [sys.executable, "-c", DISPLAY, tmp_path], stdout=side, stderr=side, env=environment
    ) as child:
        os.close(side)
        shown = b""
        while True:
            try:
                part = os.read(main, 65536)
            except OSError:  # how Linux reports that the last writer has gone
                break
            if not part:
                break
            shown += part
        assert child.wait(timeout=60) == 0
    os.close(main)
    text = shown.decode()
    assert "RichProgress" in (tmp_path / "logs" / "rank_0.log").read_text()
    assert "noise" not in text
    assert "40/40" in text
    assert "0.0500" in text, "the last loss"
    assert "step 40: saved [brackets]" in text
    assert "\x1b[?25h" in text, "the cursor is back"
    assert "40/40" not in text[text.index("held-out") :], "results stand below the full bar, which is drawn once"
    assert text.rstrip().endswith("results")


def test_logs_are_named_by_rank(tmp_path):
    run_code(NOISE, 12, tmp_path, "fine")
    assert [p.name for p in (tmp_path / "logs").iterdir()] == ["rank_12.log"]
    assert Path(tmp_path / "logs" / "rank_12.log").stat().st_size > 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (999, "999"), (1234567, "1.23M"), (999_900, "1e+03k"), (15_000, "15k"), (2e12, "2T")],
)
def test_counts(value, text):
    assert format_count(value) == text.replace("1e+03k", "1000k")


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0:00"), (75, "1:15"), (3675, "1:01:15")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_the_curve_falls_from_the_top_left_to_the_bottom_right():
    text = render_loss_curve([(step, 10.0 - step) for step in range(1, 10)], width=60, height=8)
    lines = text.splitlines()
    assert len(lines) == 10
    assert all(len(line) <= 60 for line in lines)
    assert lines[0].startswith("9.000 ┤")
    assert lines[7].startswith("1.000 ┤")
    assert lines[0].index("┤") + 1 == next(i for i, c in enumerate(lines[0]) if c > "\u2800")
    assert len(lines[7]) == 60, "the last point is at the right edge"
    assert lines[-1].split() == ["1", "step", "9"]


def test_noise_does_not_fill_the_curve():
    text = render_loss_curve([(step, 3.0 + (-1) ** step) for step in range(1, 5001)])
    assert all(abs(float(line.split()[0]) - 3.0) < 0.1 for line in text.splitlines() if "┤" in line)


@pytest.mark.parametrize("points", [[], [(1, None)], [(1, float("nan"))]])
def test_no_curve_without_a_finite_loss(points):
    assert render_loss_curve(points) == "no finite loss to draw"


@pytest.mark.parametrize("points", [[(5, 1.0)], [(1, 2.0), (2, 2.0)], [(1, 2.0), (2, float("inf")), (3, 1.0)]])
def test_a_short_or_flat_curve(points):
    assert len(render_loss_curve(points, height=6).splitlines()) == 8
