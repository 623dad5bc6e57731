"""The file of a suite's measurements: one entry a case, written after every run, so that a suite goes on where it was.

docs/benchmarks.md describes every field.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Suite

SCHEMA = 1


class Results:
    """A results file. What an interrupted run had not finished is not in it."""

    def __init__(self, path: Path, contents: dict[str, Any]):
        self.path, self.contents = path, contents

    @classmethod
    def open(cls, folder: Path, suite: Suite, machine: dict[str, Any], *, fresh: bool) -> "Results":
        """The newest file of this suite and hardware in `folder`, or with `fresh` a new one of today.

        Raises ValueError where another program's file is in the way.
        """
        stem = f"{suite.name}_{machine['hardware']}"
        found = [path for path in sorted(folder.glob(f"{stem}_*.json")) if is_results(path)]
        if found and not fresh:
            return cls(found[-1], read_results(found[-1]))
        path = folder / f"{stem}_{date.today().isoformat()}.json"
        if path.exists() and not is_results(path):
            raise ValueError(f"{path} is another program's file: name another folder")
        contents = {"schema": SCHEMA, "suite": suite.name, "what": suite.what, "machine": machine}
        return cls(path, {**contents, "sessions": [], "cases": {}})

    def begin_session(self, command: list[str], measured: dict[str, Any]) -> None:
        """A session is one start of `benchmarks.run`: machine-wide figures hold for the runs inside it."""
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.contents["sessions"].append({"started": started, "command": command, **measured})

    def entry(self, case: Case) -> dict[str, Any]:
        """The case's entry; an empty one where there is none, or where it is of a case that has changed since."""
        entry = self.contents["cases"].get(case.name)
        if entry is None or entry["digest"] != case.digest:
            entry = {"digest": case.digest, "case": dataclasses.asdict(case), "runs": [], "profile": None}
        return entry

    def record(self, case: Case, *, profile: bool, run: dict[str, Any]) -> None:
        entry = self.entry(case)
        run = {**run, "session": len(self.contents["sessions"]) - 1}
        if profile:
            entry["profile"] = run
        else:
            entry["runs"].append(run)
        self.contents["cases"][case.name] = entry
        self.write()

    def write(self) -> None:
        """Whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.contents, indent=1, allow_nan=False) + "\n")
        scratch.replace(self.path)


def read_results(path: Path) -> dict[str, Any]:
    """Raises ValueError for what is no results file of this version."""
    contents = json.loads(Path(path).read_text())
    if not isinstance(contents, dict) or contents.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no results file of benchmarks.run (schema {SCHEMA})")
    return contents


def is_results(path: Path) -> bool:
    try:
        read_results(path)
    except ValueError:
        return False
    return True


def is_settled(entry: dict[str, Any], rounds: int) -> bool:
    """All rounds are there; after a failure no further round is tried."""
    return len(entry["runs"]) >= rounds or any(run["status"] != "ok" for run in entry["runs"])


def todo(cases: Iterable[Case], results: Results) -> Iterator[tuple[Case, bool]]:
    """(case, with a trace) in the order in which they are to run, from what the file lacks.

    Cases of one turn go round by round (A B A B); the traces follow all figures. Ask for the next one only after the
    last is recorded: a case whose `after` failed is left out, since a longer one would fail too.
    """
    cases = list(cases)
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.turn or f"alone: {case.name}", []).append(case)
    for group in groups.values():
        for number in range(max(case.rounds for case in group)):
            for case in group:
                runs = results.entry(case)["runs"]
                due = number < case.rounds and len(runs) <= number and not is_settled({"runs": runs}, case.rounds)
                if due and follows(case, results):
                    yield case, False
    for case in cases:
        entry = results.entry(case)
        if case.is_traced and entry["profile"] is None and entry["runs"] and entry["runs"][0]["status"] == "ok":
            yield case, True


def follows(case: Case, results: Results) -> bool:
    if case.after is None:
        return True
    before = results.contents["cases"].get(case.after)
    return bool(before and before["runs"] and all(run["status"] == "ok" for run in before["runs"]))
