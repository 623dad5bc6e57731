"""The report from made-up results: what it says, that it is documented, that `--against` finds regressions."""

import csv
import json
import math
import re

import pytest

from benchmarks.report import build_report, main
from tests.benchmark_results import contents_of
from tests.launch import ROOT


@pytest.fixture
def write(tmp_path):
    def write(suite: str, name: str | None = None, **options):
        path = tmp_path / f"{name or suite}.json"
        path.write_text(json.dumps(contents_of(suite, **options)))
        return path

    return write


def numbers(value):
    """Every number below a value of plain JSON."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_all_four_files(write, tmp_path, capsys):
    paths = [str(write(suite)) for suite in ("cpu", "scaling", "peers", "sequence", "checkpoint", "quick")]
    assert main([*paths, "--out", str(tmp_path / "report")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cases"] > 60
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64") == 8 and "http" not in re.sub(r"xmlns\S*|base64,\S*", "", page)
    markdown = (tmp_path / "report" / "report.md").read_text()
    for heading in ("Speed", "Memory", "Communication", "Peers and baselines", "Scaling", "Saves", "No figures"):
        assert f"## {heading}\n" in markdown
    assert "None" not in markdown and "nan" not in markdown
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert all(math.isfinite(number) for number in numbers(report))
    with open(tmp_path / "report" / "report.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(report["rows"]) and float(lines[0]["tokens_per_second.median"]) > 0


def test_every_field_is_documented(write):
    """docs/benchmarks.md names every key of a report, and of its rows."""
    report = build_report([write("cpu"), write("scaling"), write("sequence")], write("cpu", "before"))
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    named = set(re.findall(r"`(\w+)`", text))
    keys = {*report, *report["rows"][0], *report["scaling"][0], *report["sequences"][0], *report["sources"][0]}
    keys |= {*report["prediction_summary"]["memory"], *report["against"], *report["against"]["changes"][0]}
    assert len(keys) > 70 and not keys - named


def test_predictions_are_held_against_measurements(write):
    report = build_report([write("cpu", above_gib=0.6)])
    memory = report["prediction_summary"]["memory"]
    assert memory["cases"] == 20 and memory["median_error"] == pytest.approx(0.05)
    row = report["rows"][0]
    assert row["memory_above_imports_gib"]["median"] == pytest.approx(0.6)
    assert row["split_s"]["forward"] == pytest.approx(0.2 / 0.7 * row["step_time_s"]["median"])
    assert row["volume_ratio"] == {"data": 1.5}


def test_scaling_has_its_knee(write):
    """Every number of ranks at the same speed: more of them never pay."""
    curves = {curve["series"]: curve for curve in build_report([write("scaling")])["scaling"]}
    assert set(curves) == {"strong", "weak"} and curves["weak"]["knee"] == 1
    assert "each further one brings 0% of what one alone brings" in curves["strong"]["sentence"]


def test_a_peer_whose_losses_differ_is_no_peer(write):
    path = write("peers")
    contents = json.loads(path.read_text())
    entry = contents["cases"]["vocab512 bf16 zero2, 2 ranks: fsdp2"]
    entry["runs"][-1]["losses"][3] *= 1.05
    path.write_text(json.dumps(contents))
    pairs = {pair["name"]: pair for pair in build_report([path])["comparisons"]}
    other, same = pairs["vocab512 bf16 zero2, 2 ranks: fsdp2"], pairs["vocab512 bf16 zero2, 2 ranks: ddp"]
    assert other["agree"] is False and other["speed"] is None and "losses differ by 0.05" in other["reason"]
    assert same["agree"] is True and same["speed"]["median"] == pytest.approx(1.0)


def test_a_sequence_ends_where_memory_does(write):
    path = write("sequence")
    contents = json.loads(path.read_text())
    del contents["cases"]["plain 8192"]
    contents["cases"]["plain 4096"]["runs"] = [
        {"status": "out of memory", "reason": "no", "seconds": 1.0, "command": [], "session": 0}
    ]
    path.write_text(json.dumps(contents))
    curves = {curve["series"]: curve for curve in build_report([path])["sequences"]}
    assert curves["plain"]["longest"] == 2048 and curves["plain"]["ended_by"] == "out of memory"
    assert curves["ulysses"]["longest"] == 8192


def test_against_finds_regressions(write, tmp_path, capsys):
    before, same = write("quick", "before"), write("quick", "same")
    slower, larger = write("quick", "slower", step_s=0.6), write("quick", "larger", above_gib=0.7)
    flags = ["--against", str(before), "--out", str(tmp_path / "report")]
    assert main([str(same), *flags]) == 0
    assert main([str(slower), *flags]) == 1
    assert "tiny zero2" in json.loads(capsys.readouterr().out.splitlines()[-1])["regressed"]
    assert main([str(larger), *flags]) == 1
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    grown = [change for change in report["against"]["changes"] if change["regressed"]]
    assert {change["quantity"] for change in grown} == {"memory_above_imports_gib"}
    assert "REGRESSED" in (tmp_path / "report" / "report.md").read_text()


def test_a_case_that_fails_now_is_a_regression(write, tmp_path):
    before, now = write("quick", "before"), write("quick", "now")
    contents = json.loads(now.read_text())
    name = next(iter(contents["cases"]))
    failure = {"status": "timeout", "reason": "killed", "seconds": 9.0, "command": [], "session": 0}
    contents["cases"][name]["runs"] = [failure]
    now.write_text(json.dumps(contents))
    assert main([str(now), "--against", str(before), "--out", str(tmp_path / "report")]) == 1


def test_files_that_are_none_are_refused_in_a_line(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    assert main([str(tmp_path / "x.json")]) == 2
    assert main([str(tmp_path / "missing.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
