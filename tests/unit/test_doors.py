"""The house plan, enforced: who imports whom, what stays light, which names are safe, how long a file may be."""

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import ROOT, environment

PACKAGE = ROOT / "dstrain"
# A room may import a room of a lower number. A new room is entered here.
LEVELS = {
    "errors": 0,
    "adapter": 0.5,
    "contradictions": 0.6,
    **dict.fromkeys(["arguments", "parallel"], 1),
    "config": 2,
    **dict.fromkeys(["distributed", "phases"], 3),
    **dict.fromkeys(["models", "data"], 4),
    **dict.fromkeys(["engine", "meeting", "run_lock"], 5),
    "monitor": 5.5,  # what the others of this floor write and read
    **dict.fromkeys(["checkpoint", "resilience"], 6),
    "generate": 6.2,  # reads checkpoints
    "evaluate": 6.4,  # lets models write
    "launch": 6.5,  # reads what a run left behind
    "planner": 6.6,  # asks hosts for their network
    **dict.fromkeys(["run_folder", "plain", "best", "shrink"], 6),
    "alike": 6.5,
    **dict.fromkeys(["run", "verify"], 7),
    "begin": 7.5,
    "prepare": 8,
    "show": 8.5,  # takes tokenizer and block from `prepare`
    **dict.fromkeys(["train", "cli"], 9),
}
ONE_ROOM = {"pipe_engine": "engine"}  # the two engines, in two files
LIGHT = ("errors", "adapter", "contradictions", "arguments", "parallel", "config", "run_folder", "run_lock")
HEAVY = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def modules(folder: Path = PACKAGE) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def room(path: Path) -> str:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return ONE_ROOM.get(name, name)


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported dotted name (also inside functions) with its line; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import: write it from dstrain"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def dotted_module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_every_room_has_a_level():
    rooms = {room(path) for path in modules()} - {"__init__"}
    assert rooms <= LEVELS.keys(), f"say in LEVELS where these stand: {sorted(rooms - LEVELS.keys())}"
    assert len(rooms) >= 15


def test_doors_open_downward():
    wrong = []
    for path in modules():
        here = room(path)
        for name, line in imports(path):
            package, _, rest = name.partition(".")
            there = ONE_ROOM.get(rest.split(".")[0], rest.split(".")[0])
            if package != "dstrain" or there == here:
                continue
            if there not in LEVELS:  # `from dstrain import UserError`: the lazy table is for users
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name} through the table of public names")
            elif LEVELS[there] >= LEVELS[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} {here} imports {there}, which is not below it")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_the_entry():
    callers = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules()
        for name, line in imports(path)
        if name == "dstrain.train" or name.startswith("dstrain.train.")
    ]
    assert not callers


def test_light_rooms_name_no_heavy_module():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules()
        if room(path) in LIGHT
        for name, line in imports(path)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_light_rooms_load_no_heavy_module():
    """Also not through others: what they import is imported here."""
    names = [dotted_module(path) for path in modules() if room(path) in LIGHT]
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_names_hide_no_other_module():
    """Run by path, `dstrain/` comes first on sys.path: a `logging.py` in it would replace the real one."""
    names = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()} - {"__init__", "__pycache__"}
    assert not names & set(sys.stdlib_module_names)
    assert not names & set(importlib.metadata.packages_distributions())


@pytest.mark.parametrize("script", ["train.py"])
def test_entries_take_their_folder_off_the_path(script):
    """Another package's own `import data` or `import config` must not find ours."""
    code = (
        f"import runpy, sys\nsys.argv = [{script!r}, '--help']\nsys.path.insert(0, {str(PACKAGE)!r})\n"
        f"try: runpy.run_path({str(PACKAGE / script)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
        f"print('on the path:', {str(PACKAGE)!r} in sys.path)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert "on the path: False" in done.stdout, done.stdout[-500:] + done.stderr[-500:]


@pytest.mark.parametrize("path", [p for p in modules() if p.name == "__init__.py"], ids=dotted_module)
def test_package_files_hold_one_lazy_table(path):
    """A docstring, the version, `_PUBLIC`, `__getattr__`, `__dir__`: importing a room must cost nothing."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assert {t.id for t in targets} <= {"_PUBLIC", "__version__", "__all__"}, f"{path}:{node.lineno}"
        elif isinstance(node, ast.FunctionDef):
            assert node.name in ("__getattr__", "__dir__"), f"{path}:{node.lineno}: {node.name}"
        elif isinstance(node, ast.ImportFrom):
            assert node.module == "importlib", f"{path}:{node.lineno}: imports {node.module}"
        else:
            assert isinstance(node, ast.Expr), f"{path}:{node.lineno}"


def test_files_and_functions_are_short():
    long = []
    folders = ("dstrain", "tests", "benchmarks", "examples")
    for path in [path for folder in folders for path in modules(ROOT / folder)]:
        source = path.read_text()
        if (lines := source.count("\n")) > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines (at most {MAX_FILE_LINES})")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert not long, "\n".join(long)


def test_no_environment_variable_is_an_option():
    """What dstrain reads from the environment was put there by a launcher or another tool: there is no DSTRAIN_*."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("DSTRAIN_")
    ]
    assert not wrong, "\n".join(wrong)
