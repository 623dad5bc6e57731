"""`dstrain tune`: a few short runs of the best plans on this machine, which correct the prediction and choose.

dstrain tune --config_name examples/llama_10m.json --block_size 512 --ranks 2 --write tuned.json

Each probe is a real run of train.py under torchrun on the built-in corpus; its run.json holds what was predicted and
what was measured. The ratios correct the plans that were not run, and the fastest that fits is chosen. The last line
of `--json` is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.arguments import ModelArguments, is_taken
from dstrain.errors import ExitCode, UserError
from dstrain.parallel import free_port

PROBE_TIMEOUT_S = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config_name", required=True, help="a hub name, a folder, or a JSON file with model_type")
    parser.add_argument("--config_overrides", help="changes to the model's configuration")
    parser.add_argument("--tokenizer_name", help="as in train.py")
    parser.add_argument("--block_size", type=int, required=True, help="tokens of a sample")
    parser.add_argument("--global_batch", type=int, help="samples of a step (default: 4 times the ranks)")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--ranks", type=int, default=1, help="processes on this machine")
    parser.add_argument("--probes", type=int, default=3, help="plans that are tried (default: 3)")
    parser.add_argument("--steps", type=int, default=6, help="steps of each probe (default: 6)")
    parser.add_argument("--write", metavar="F", help="write the choice as a DeepSpeed JSON")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


@dataclass(frozen=True)
class Probe:
    """One short run: GiB and seconds, predicted at its start and measured at its end. problem: why it did not end."""

    option: Any  # Option
    predicted_gib: float = 0.0
    measured_gib: float = 0.0
    predicted_s: float = 0.0
    measured_s: float = 0.0
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "option": str(self.option.choice)}


def run(args: argparse.Namespace) -> int:
    for name in ("block_size", "global_batch", "ranks", "probes", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}: write a positive number")
    if args.write and is_taken(Path(args.write)):
        raise UserError(f"--write {args.write} is there already: name a new file")
    planner = _planner(args)
    global_batch = args.global_batch or 4 * args.ranks
    options = [option for option in planner.options(global_batch) if option.reason is None]
    if not options:
        raise UserError("no plan fits on this machine: `dstrain plan` with the same flags says why")
    probes = []
    for option in options[: args.probes]:
        probes.append(probe := _try(option, args, global_batch))
        if not args.json:
            print(_line(probe), flush=True)
    done = [probe for probe in probes if probe.problem is None]
    if not done:
        raise UserError([f"{probe.option.choice}: {probe.problem}" for probe in probes])
    memory = statistics.median(probe.measured_gib / probe.predicted_gib for probe in done)
    seconds = statistics.median(probe.measured_s / probe.predicted_s for probe in done)
    best = min(done, key=lambda probe: probe.measured_s)
    untried = [o for o in options[args.probes :] if o.step_time_s * seconds < best.measured_s]
    if args.write:
        deepspeed = best.option.choice.deepspeed(global_batch, args.precision)
        Path(args.write).write_text(json.dumps(deepspeed, indent=2) + "\n")
    answer = {
        "memory_ratio": memory,
        "time_ratio": seconds,
        "probes": [probe.to_json() for probe in probes],
        "best": str(best.option.choice),
        "gradient_checkpointing": best.option.choice.gradient_checkpointing,
        "tokens_per_second": global_batch * args.block_size / best.measured_s,
        "faster_if_corrected": [str(option.choice) for option in untried],
        "written": args.write,
    }
    print(json.dumps(answer) if args.json else _conclusion(answer))
    return ExitCode.FINISHED


def _planner(args: argparse.Namespace) -> Any:
    import torch

    from dstrain.models.config import check_block_size, load_model_config
    from dstrain.planner.hardware import DEVICES, device_here, find_device
    from dstrain.planner.memory import Flags
    from dstrain.planner.strategy import Cluster, Planner

    margs = ModelArguments(config_name=args.config_name, config_overrides=args.config_overrides)
    config = load_model_config(margs)
    check_block_size(config, args.block_size)
    device = find_device("cpu", args.ranks)
    if torch.cuda.is_available():
        device = device_here(torch.device("cuda:0"), args.precision, 0.0) or DEVICES["a100-40g"]
    return Planner(config, margs, Cluster(1, args.ranks, device), Flags(args.block_size), args.precision)


def _try(option: Any, args: argparse.Namespace, global_batch: int) -> Probe:
    """Run one plan for a few steps."""
    with tempfile.TemporaryDirectory(prefix="dstrain_tune_") as name:
        folder = Path(name)
        deepspeed = option.choice.deepspeed(global_batch, args.precision)
        (folder / "plan.json").write_text(json.dumps(deepspeed))
        flags = ["--deepspeed_config", str(folder / "plan.json"), "--output_dir", str(folder / "run")]
        flags += ["--block_size", str(args.block_size), "--max_steps", str(args.steps), "--save_steps", "0"]
        flags += ["--max_eval_batches", "1", "--report_to", "none", "--config_name", args.config_name]
        for flag in ("config_overrides", "tokenizer_name"):
            if getattr(args, flag):
                flags += [f"--{flag}", getattr(args, flag)]
        if option.choice.gradient_checkpointing:
            flags.append("--gradient_checkpointing")
        problem = _start(flags, args.ranks)
        if problem is None:
            facts = json.loads((folder / "run" / "run.json").read_text())
    if problem is not None:
        return Probe(option, problem=problem)
    predicted, measured = facts["prediction"], facts["measured"]
    if predicted is None:
        return Probe(option, problem="the run began without a prediction")
    return Probe(
        option,
        predicted_gib=predicted["device_gib"]["total"],
        measured_gib=measured["peak_above_imports_gib" if facts_are_of_a_cpu(facts) else "peak_device_memory_gib"],
        predicted_s=predicted["step_time_s"],
        measured_s=measured["step_time_s"],
    )


def facts_are_of_a_cpu(facts: dict[str, Any]) -> bool:
    """On a CPU the device's peak is the process's."""
    return facts["measured"]["peak_device_memory_gib"] == facts["measured"]["host_memory_gib"]


def _start(flags: list[str], ranks: int) -> str | None:
    """train.py under torchrun; returns the last line of what went wrong."""
    train = Path(__file__).resolve().parent.parent / "train.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--master_port", str(free_port())]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    try:
        done = subprocess.run(
            [*command, str(train), *flags], env=threads | os.environ, capture_output=True, text=True,
            timeout=PROBE_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it took more than {PROBE_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return None
    ours = [line for line in done.stderr.splitlines() if line.startswith("dstrain: error: ")]
    return (ours or done.stderr.splitlines() or ["it ended without a word"])[-1].removeprefix("dstrain: error: ")


def _line(probe: Probe) -> str:
    if probe.problem:
        return f"{probe.option.choice}: {probe.problem}"
    return (
        f"{probe.option.choice}: {probe.measured_s:.3g} s a step ({probe.predicted_s:.3g} predicted), "
        f"{probe.measured_gib:.2f} GiB ({probe.predicted_gib:.2f})"
    )


def _conclusion(answer: dict[str, Any]) -> str:
    flags = " --gradient_checkpointing" if answer["gradient_checkpointing"] else ""
    lines = [
        f"measured / predicted here: memory {answer['memory_ratio']:.2f}, time {answer['time_ratio']:.2f}",
        f"best: {answer['best']}, {answer['tokens_per_second']:,.0f} tokens/s",
    ]
    if answer["faster_if_corrected"]:
        lines.append("not tried, and faster by the corrected prediction: " + "; ".join(answer["faster_if_corrected"]))
    if answer["written"]:
        lines.append(f"start it with --deepspeed_config {answer['written']}{flags}")
    return "\n".join(lines)
