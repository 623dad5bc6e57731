"""The gate: this very configuration, on a shallower model and a smaller batch, against plain torch in one process.

    dstrain verify --deepspeed_config ds_configs/zero2.json --config_name examples/llama_10m.json --world_size 2

Real processes train a few steps through the real entry; `PlainEngine` takes the same steps from the same weights on the
same samples, every document alone. Loss, gradient norm, and what the steps did to every parameter must agree; then the
run is resumed in its middle and must give the very numbers of the uninterrupted one. Exit code 78 names the first
difference. `--verify` on train.py does the same before it trains. docs/verify.md says what is changed and compared.
"""

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.arguments import Arguments, parse_arguments
from dstrain.config import ResolvedConfig
from dstrain.errors import ExitCode, UserError, VerifyError
from dstrain.parallel import Launch
from dstrain.shrink import RESUME_AT, STEPS, shrink

Starter = Callable[[list[str], int], int]


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences: of the loss, of the gradient norm, of what the steps did to one parameter and to
    all together (L2 of the difference over L2 of the change), and of the length of that change."""

    loss: float
    norm: float
    parameter: float
    change: float
    length: float

    @classmethod
    def of(cls, resolved: ResolvedConfig) -> "Bounds":
        """By precision. Adam's first steps have the size of a gradient's sign, so where a gradient is near zero,
        rounding decides: in 16 bits that leaves little to say of a single parameter, and much of the length."""
        if resolved.precision == "fp32" and not resolved.autocast_dtype:
            return cls(1e-5, 1e-4, 1e-2, 2e-3, 1e-3)
        if resolved.optimizer_type.lower() == "sgd":
            return cls(2e-2, 5e-2, 0.2, 0.1, 3e-2)
        return cls(2e-2, 5e-2, 0.5, 0.3, 3e-2)


@dataclass(frozen=True)
class Comparison:
    """One number that must be at most `bound`; larger, or not a number, is a difference."""

    what: str
    error: float
    bound: float
    is_parameter: bool = False

    @property
    def equal(self) -> bool:
        return self.error <= self.bound  # False for NaN too


def verify(args: Arguments, world_size: int, start: Starter | None = None) -> list[Comparison]:
    """Compare `world_size` processes of the shrunk run with one plain process, then its resume with itself.

    start(argv of train.py, world_size) -> exit code; by default fresh processes on this machine. After a difference
    from the plain run nothing is resumed. Raises UserError for what the run itself would refuse, VerifyError when it is
    not finite, and RuntimeError when it does not end well otherwise.
    """
    from dstrain.plain import run_plain

    start = start or start_processes
    with tempfile.TemporaryDirectory(prefix="dstrain_verify_") as scratch:
        shrunk, resolved = shrink(args, world_size, Path(scratch))
        whole, resumed = Path(scratch, "whole"), Path(scratch, "resumed")
        _run(start, shrunk, world_size, whole)
        lines, weights = _train_lines(whole), _weights(whole)
        plain = run_plain(shrunk, resolved, STEPS)
        if not any(line["learning_rate"] for line in plain.lines):
            raise UserError(f"the learning rate of the first {STEPS} steps is 0, so there is nothing to compare")
        results = list(_compare(Bounds.of(resolved), lines, weights, plain))
        if first_difference(results) is None:
            checkpoint = whole / "checkpoints" / f"step_{RESUME_AT:08d}"
            _run(start, shrunk, world_size, resumed, resume_from_checkpoint=str(checkpoint))
            results += _compare_resumed(lines[RESUME_AT:], _train_lines(resumed), weights, _weights(resumed))
        return results


def _write_flags(path: Path, args: Arguments, **changes: Any) -> list[str]:
    """argv with all flags of `args` in a file."""
    values = args.to_dict() | changes
    values.pop("num_train_epochs" if values["max_steps"] > 0 else "max_steps")  # not both
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return [str(path)]


def _run(start: Starter, args: Arguments, world_size: int, folder: Path, **changes: Any) -> None:
    """Train to the last step and save there."""
    argv = _write_flags(folder.with_suffix(".json"), args, output_dir=str(folder), **changes)
    exit_code = start(argv, world_size)
    if exit_code == ExitCode.USER_ERROR:
        raise UserError("the run to verify is refused: see the lines above")
    if exit_code == ExitCode.NON_FINITE:
        raise VerifyError("the run to verify is not finite: see the lines above")
    if exit_code:
        raise RuntimeError(f"the run to verify ended with exit code {exit_code}")


def _environment() -> dict[str, str]:
    """This process's, without what a launcher around it has put there."""
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    prefixes = ("TORCHELASTIC_", "ACCELERATE_", "CROSS_", "GROUP_", "ROLE_", "OMPI_COMM_WORLD_")
    return {name: v for name, v in os.environ.items() if name not in names and not name.startswith(prefixes)}


def start_processes(argv: list[str], world_size: int) -> int:
    """train.py in `world_size` processes of this machine, out of reach of the variables of any launcher around us."""
    environment = _environment()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    cpus = max(1, (os.cpu_count() or 1) // world_size)
    environment.setdefault("OMP_NUM_THREADS", str(cpus))
    script = str(Path(__file__).with_name("train.py"))
    codes, processes = [], []
    for rank in range(world_size):
        own = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        own |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), str(world_size))
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [sys.executable, script, *argv],
                env=environment | own,
                stdout=subprocess.DEVNULL,
            )
        )
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    return next((code for code in codes if code), 0)


def _train_lines(folder: Path) -> list[dict[str, Any]]:
    from dstrain.monitor.metrics import read_metrics

    return [line for line in read_metrics(folder) if line["kind"] == "train"]


def _weights(folder: Path) -> dict[str, Any]:
    """Name -> fp32 weight after the run, whatever its layout."""
    from safetensors.torch import load_file

    from dstrain.checkpoint.export import export
    from dstrain.checkpoint.manager import choose_checkpoint

    checkpoint = choose_checkpoint(folder / "checkpoints", "auto")
    assert checkpoint is not None, "a run that ended well has saved"
    out = export(checkpoint, folder / "export", dtype="fp32")
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _compare(bounds: Bounds, lines: list[dict[str, Any]], weights: dict[str, Any], plain: Any) -> Iterator[Comparison]:
    assert len(lines) == len(plain.lines) == STEPS
    pairs = list(zip(lines, plain.lines, strict=True))
    for name, what, bound in (("tokens", "label tokens", 0.0), ("learning_rate", "learning rate", 1e-6)):
        yield Comparison(f"{what} of any step", max(_relative(a[name], b[name]) for a, b in pairs), bound)
    for step, (a, b) in enumerate(pairs, 1):
        yield Comparison(f"loss of step {step}", _relative(a["loss"], b["loss"]), bounds.loss)
        yield Comparison(f"gradient norm of step {step}", _relative(a["grad_norm"], b["grad_norm"]), bounds.norm)
    yield from _compare_changes(bounds, weights, plain)


def _compare_changes(bounds: Bounds, weights: dict[str, Any], plain: Any) -> Iterator[Comparison]:
    """What the steps did: to each parameter, and to all together."""
    parameters, sums = [], [0.0, 0.0, 0.0]
    for name, end in plain.after.items():
        if name not in weights:
            parameters.append(Comparison(f"{name} (missing)", math.inf, bounds.parameter, True))
            continue
        own = (weights[name].float() - plain.before[name]).norm().item()
        change = (end - plain.before[name]).norm().item()
        difference = (weights[name].float() - end).norm().item()
        # A change below what fp32 resolves in the weight itself is rounding.
        floor = 1e-6 * end.norm().item()
        parameters.append(Comparison(name, difference / max(change, floor, 1e-30), bounds.parameter, True))
        sums = [total + x**2 for total, x in zip(sums, (own, change, difference), strict=True)]
    own, change, difference = (math.sqrt(total) for total in sums)
    yield Comparison("length of the change of all parameters", _relative(own, change), bounds.length)
    yield Comparison("change of all parameters", _relative(difference + change, change), bounds.change)
    yield from parameters


def _compare_resumed(
    whole: list[dict[str, Any]], resumed: list[dict[str, Any]], weights: dict[str, Any], again: dict[str, Any]
) -> Iterator[Comparison]:
    """To the bit, at the same layout."""
    pairs, what = list(zip(whole, resumed, strict=True)), f"resumed after step {RESUME_AT} against uninterrupted"
    for name, words in (("loss", "loss"), ("grad_norm", "gradient norm"), ("learning_rate", "learning rate")):
        yield Comparison(f"{words}, {what}", max(_relative(b[name], a[name]) for a, b in pairs), 0.0)
    largest = max((weights[name] - again[name]).abs().max().item() for name in weights)
    yield Comparison(f"any weight, {what}", largest, 0.0)


def _relative(a: float | None, b: float | None) -> float:
    if a is None or b is None:  # metrics.jsonl has null for what is not finite
        return math.nan
    return 0.0 if a == b else abs(a - b) / max(abs(b), 1e-30)


def report(results: list[Comparison], *, shown: int = 12) -> str:
    """A table of what was compared: every number of a step, and of the parameters those that differ most."""
    numbers = [r for r in results if not r.is_parameter]
    parameters = sorted((r for r in results if r.is_parameter), key=lambda r: (r.equal, -r.error))
    rows = [*numbers, *parameters[:shown]]
    width = max(len(r.what) for r in rows)
    lines = [f"{'compared':{width}}  {'error':>9}  {'bound':>9}"]
    lines += [f"{r.what:{width}}  {r.error:9.2e}  {r.bound:9.2e}{'' if r.equal else '  DIFFERS'}" for r in rows]
    if len(parameters) > shown:
        lines.append(f"... and {len(parameters) - shown} more parameters, each nearer")
    return "\n".join(lines)


def first_difference(results: list[Comparison]) -> Comparison | None:
    return next((result for result in results if not result.equal), None)


def gate(args: Arguments) -> None:
    """`--verify`: rank 0 runs `dstrain verify` with these flags while the others wait. A collective.

    In a process of its own, so that neither its memory nor what it does to torch is this run's. Raises, on every rank,
    VerifyError for a difference and UserError for what verify refuses; RuntimeError when it ends otherwise.
    """
    from dstrain.distributed import gather_objects

    launch = Launch.from_environment()
    hosts = gather_objects(launch.local_rank).count(0)
    if hosts > 1:
        raise UserError(
            f"--verify starts its processes on one machine, and this run has {hosts}: leave it out, and run "
            f"`dstrain verify --world_size {launch.world_size}` with the same flags on one machine before"
        )
    exit_code, said = gather_objects(_verify_elsewhere(args, launch.world_size) if launch.is_main else None)[0]
    prefix = "dstrain: error: "
    problems = [line.removeprefix(prefix) for line in said.splitlines() if line.startswith(prefix)]
    if exit_code == ExitCode.VERIFY_FAILED and problems:
        raise VerifyError(problems)
    if exit_code == ExitCode.USER_ERROR and problems:
        raise UserError(problems)
    if exit_code:
        raise RuntimeError(f"dstrain verify ended with exit code {exit_code}\n{said[-4000:]}")


def _verify_elsewhere(args: Arguments, world_size: int) -> tuple[int, str]:
    """Exit code and stderr of `dstrain verify`; its table goes to the screen."""
    from dstrain.monitor.logs import screen

    print("comparing this configuration with plain torch on a shallower model", file=screen())
    with tempfile.TemporaryDirectory(prefix="dstrain_verify_") as scratch:
        argv = _write_flags(Path(scratch, "flags.json"), args, verify=False, local_rank=-1)
        done = subprocess.run(
            [*command(), "--world_size", str(world_size), *argv],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    print(done.stdout, end="", file=screen())
    return done.returncode, done.stderr


def command() -> list[str]:
    """`dstrain verify`, from this installation, whatever lies in the working directory."""
    code = "import sys; sys.path[:1] == [''] and sys.path.pop(0); from dstrain.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code, "verify"]


def main(argv: list[str]) -> int:
    """`dstrain verify [--world_size N] FLAGS`, the flags of dstrain/train.py. Prints the table.

    Raises VerifyError, which names the first number that differs.
    """
    parser = argparse.ArgumentParser(prog="dstrain verify", add_help=False, allow_abbrev=False)
    parser.add_argument("--world_size", nargs="?", default="2")
    own, train_flags = parser.parse_known_args(argv)
    if not (own.world_size or "").isdecimal() or not int(own.world_size):
        raise UserError(f"--world_size is {own.world_size!r}: write a number of processes")
    results = verify(parse_arguments(train_flags), int(own.world_size))
    print(report(results))
    wrong = first_difference(results)
    if wrong is not None:
        of = "the uninterrupted run" if "resumed" in wrong.what else "plain torch"
        raise VerifyError(f"verify: {wrong.what} differs from {of} by {wrong.error:.2e} (bound {wrong.bound:.0e})")
    print(f"{len(results)} numbers equal those of plain torch and of the resumed run")
    return ExitCode.FINISHED
