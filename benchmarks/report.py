"""The report of one or more results files: HTML, Markdown, CSV and JSON.

    python -m benchmarks.report benchmarks/results/cpu_2cpu_*.json --out runs/report
    python -m benchmarks.report new.json --against old.json

`--against` adds the ratio of every case to the same case of the baseline and ends with exit code 1 where one is worse
by more than the noise of both sides. docs/benchmarks.md describes report.json. The last line is JSON.
"""

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparisons import (
    build_against,
    build_comparisons,
    build_pareto,
    build_prediction_summary,
    build_scaling,
    build_sequences,
)
from benchmarks.results_file import read_results
from benchmarks.rows import build_rows
from benchmarks.tables import build_cards, build_tables

HERE = Path(__file__).resolve().parent
SCHEMA = 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("results", nargs="+", type=Path, help="files that benchmarks.run wrote")
    parser.add_argument("--against", type=Path, help="the results file of before")
    parser.add_argument("--out", type=Path, help="folder (default: the first file's name without .json)")
    args = parser.parse_args(argv)
    try:
        report = build_report(args.results, args.against)
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 2
    out = args.out or args.results[0].with_suffix("")
    write(report, out)
    regressed = report["against"]["regressed"] if report["against"] else []
    print(json.dumps({"report": str(out / "report.html"), "cases": len(report["rows"]), "regressed": regressed}))
    return 1 if regressed else 0


def build_report(paths: Sequence[Path], against: Path | None = None) -> dict[str, Any]:
    """Everything that a report says, plain JSON. Raises OSError and ValueError for files that cannot be read."""
    files = [read_results(path) for path in paths]
    rows_of = [build_rows(contents) for contents in files]
    rows = [row for rows in rows_of for row in rows]
    sources = [
        {
            "file": path.name,
            **{name: contents[name] for name in ("suite", "what", "machine", "sessions")},
            "versions": versions(contents),
        }
        for path, contents in zip(paths, files, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "sources": sources,
        "rows": rows,
        "comparisons": [
            pair for contents, own in zip(files, rows_of, strict=True) for pair in build_comparisons(contents, own)
        ],
        "scaling": [curve for own in rows_of for curve in build_scaling(own)],
        "sequences": [curve for own in rows_of for curve in build_sequences(own)],
        "prediction_summary": build_prediction_summary(rows),
        "pareto": build_pareto(rows),
        "against": build_against(rows, build_rows(read_results(against))) if against else None,
    }


def versions(contents: Mapping[str, Any]) -> dict[str, str]:
    """Of everything that its runs name; where a version changed in between, the last."""
    found: dict[str, str] = {}
    for entry in contents["cases"].values():
        for run in entry["runs"]:
            found |= run.get("versions", {})
    return found


def write(report: Mapping[str, Any], out: Path) -> None:
    """report.json, report.csv, report.md and report.html in `out`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from benchmarks.plots import draw_plots

    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_csv(report["rows"], out / "report.csv")
    environment = Environment(
        loader=FileSystemLoader([HERE / "templates", HERE.parent / "dstrain" / "monitor"]),
        autoescape=lambda name: name is not None and "html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    common = {"report": report, "tables": build_tables(report), "title": title(report)}
    page = {**common, "plots": draw_plots(report), "cards": build_cards(report)}
    for name, contents in (("html", page), ("md", common)):
        text = environment.get_template(f"benchmarks.{name}.jinja").render(contents)
        (out / f"report.{name}").write_text(text, encoding="utf-8")


def title(report: Mapping[str, Any]) -> str:
    suites = dict.fromkeys(source["suite"] for source in report["sources"])
    hardware = dict.fromkeys(source["machine"]["hardware"] for source in report["sources"])
    return f"dstrain benchmarks: {', '.join(suites)} on {', '.join(hardware)}"


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line a case; nested values as dotted columns, lists left out."""
    flat = [dict(_flatten(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(flat)


def _flatten(value: Mapping[str, Any], prefix: str = ""):
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flatten(inner, f"{prefix}{name}.")
        elif not isinstance(inner, list):
            yield f"{prefix}{name}", "" if inner is None else inner


if __name__ == "__main__":
    sys.exit(main())
