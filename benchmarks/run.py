"""Measure a suite; it goes on where it stopped.

    python -m benchmarks.run --suite quick --out runs/benchmarks
    python -m benchmarks.run --suite cpu --cases 'vocab512 zero'
    python -m benchmarks.report runs/benchmarks/cpu_2cpu_*.json

Every case runs through its real launcher on the real `dstrain/train.py` (or on a peer); what it left in metrics.jsonl
and run.json goes into `OUT/<suite>_<hardware>_<date>.json`. A case that runs out of memory, takes too long or is
refused is a result. The last line is JSON: the file and how many cases ended how.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.analysis import DISTURBED
from benchmarks.cases import Case
from benchmarks.machine import gpu_names, machine_facts
from benchmarks.results_file import Results, todo
from benchmarks.runner import OK, config_of, run_case, start
from benchmarks.suites import SUITES


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    suite = SUITES[args.suite]()
    cases = [case for case in suite.cases if re.search(args.cases, case.name)]
    if not cases:
        print(f"--cases {args.cases!r} names none of: {', '.join(case.name for case in suite.cases)}", file=sys.stderr)
        return 2
    if suite.gpus > len(gpu_names()):
        print(f"suite {suite.name} needs {suite.gpus} GPU, and nvidia-smi shows {len(gpu_names())}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    try:
        results = Results.open(args.out, suite, machine_facts(), fresh=args.fresh)
    except ValueError as error:
        print(f"benchmarks.run: error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="benchmarks_") as name:
        measure(cases, results, Path(name), max_time=args.max_time)
    counts = Counter(state_of(case, results) for case in cases)
    print(
        json.dumps({"results": str(results.path), "cases": counts, "seconds": round(time.monotonic() - begin, 1)}),
        flush=True,
    )
    return 0


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--suite", choices=tuple(SUITES), default="quick", help="default: quick")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the results file")
    parser.add_argument("--fresh", action="store_true", help="a new file of today, instead of going on with the newest")
    parser.add_argument("--max_time", type=float, help="begin no run after this many seconds: go on another time")
    return parser.parse_args(argv)


def measure(cases: list[Case], results: Results, folder: Path, *, max_time: float | None = None) -> None:
    """Run what the file lacks, one run at a time."""
    begin, session = time.monotonic(), False
    for case, profile in todo(cases, results):
        if max_time is not None and time.monotonic() - begin > max_time:
            break
        if not session:
            results.begin_session(["python", "-m", "benchmarks.run", *sys.argv[1:]], measure_machine(cases, folder))
            session = True
        run = run_case(case, folder / "case", profile=profile)
        results.record(case, profile=profile, run=run)
        print(line_of(case, run, profile), flush=True)


def measure_machine(cases: list[Case], folder: Path) -> dict[str, Any]:
    """What the machine can do now (`benchmarks.machine`), with the ops built that these cases need."""
    path = folder / "machine.json"
    configs = sorted({str(config_of(case, folder / f"case{i}")) for i, case in enumerate(cases)})
    command = [sys.executable, "-m", "benchmarks.machine", str(path), *configs]
    ended = start(command, folder, timeout_s=1800.0)
    if ended.exit_code != 0:
        raise RuntimeError(f"the machine cannot be measured: {ended.stderr[-2000:]}")
    return json.loads(path.read_text())


def line_of(case: Case, run: dict[str, Any], profile: bool) -> str:
    what = f"{case.name}{', traced' if profile else ''}"
    if run["status"] != OK:
        return f"{what}: {run['status']}: {run['reason']}"
    if "step_time_s" not in run:
        return f"{what}: {run['seconds']:.0f} s"
    step_s, gib = median(run["step_time_s"]), run["host_memory_gib"]
    text = f"{what}: {step_s:.3f} s a step, {gib:.2f} GiB, {run['seconds']:.0f} s in all"
    return text + (f"; others used {run['disturbance']:.0%} of the cores" if run["disturbance"] > DISTURBED else "")


def state_of(case: Case, results: Results) -> str:
    """The worst of its runs, or that it has not run."""
    runs = results.entry(case)["runs"]
    return next((run["status"] for run in runs if run["status"] != OK), OK) if runs else "not run"


if __name__ == "__main__":
    sys.exit(main())
