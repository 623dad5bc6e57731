"""The gate: this very configuration, on a shallower model and a smaller batch, against plain torch in one process.

    dstrain verify --deepspeed_config ds_configs/zero2.json --config_name examples/llama_10m.json --world_size 2

Real processes train a few steps through the real entry; `PlainEngine` takes the same steps from the same weights on the
same samples, every document alone. Loss, gradient norm, and what the steps did to every parameter must agree; then the
run is resumed in its middle and must give the very numbers of the uninterrupted one. Exit code 78 names the first
difference.
"""

import argparse
import dataclasses
import itertools
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
from dstrain.config import ResolvedConfig, RunFacts, apply_overrides, load_config, resolve_config
from dstrain.errors import ExitCode, UserError

STEPS, RESUME_AT = 4, 2
MAX_LAYERS, MAX_MICRO_BATCH, MAX_ACCUMULATION = 4, 2, 2
# Largest relative difference by precision: of the loss, of the gradient norm, and of what the steps did to one
# parameter (L2 of the difference over L2 of the change). Adam's first steps have the size of the sign of a gradient, so
# where a gradient is near zero rounding decides: hence the wide bound on changes in 16 bits.
BOUNDS = {"fp32": (1e-5, 1e-4, 1e-2), "bf16": (2e-2, 5e-2, 0.5), "fp16": (2e-2, 5e-2, 0.5)}

Starter = Callable[[list[str], int], int]


@dataclass(frozen=True)
class Comparison:
    """One number that must be at most `bound`; larger, or not a number, is a difference."""

    what: str
    error: float
    bound: float

    @property
    def equal(self) -> bool:
        return self.error <= self.bound  # False for NaN too


def verify(args: Arguments, world_size: int, start: Starter | None = None) -> list[Comparison]:
    """Compare `world_size` processes of the shrunk run with one plain process.

    start(argv of train.py, world_size) -> exit code; by default torchrun's launcher on this machine.
    Raises UserError for what the run itself would refuse, and RuntimeError when the run does not end well.
    """
    start = start or start_processes
    with tempfile.TemporaryDirectory(prefix="dstrain_verify_") as scratch:
        shrunk, resolved = shrink(args, world_size, Path(scratch))
        whole, interrupted = Path(scratch, "whole"), Path(scratch, "interrupted")
        _run(start, shrunk, world_size, whole, STEPS)
        parallel_lines, parallel_weights = _train_lines(whole), _weights(whole)
        plain_lines, before, after = run_plain(shrunk, resolved)
        results = _compare(resolved, parallel_lines, plain_lines, parallel_weights, before, after)
        _run(start, shrunk, world_size, interrupted, RESUME_AT)
        _run(start, shrunk, world_size, interrupted, STEPS)
        return [*results, _compare_resumed(parallel_lines, _train_lines(interrupted))]


def shrink(args: Arguments, world_size: int, scratch: Path) -> tuple[Arguments, ResolvedConfig]:
    """The same run with at most `MAX_LAYERS` layers (or one a stage), dropout off, and a smaller batch."""
    from dstrain.models.config import load_model_config

    raw = apply_overrides(load_config(args.run.deepspeed_config), args.run.set)
    facts = RunFacts(
        source=str(args.run.deepspeed_config),
        gradient_checkpointing=args.model.gradient_checkpointing,
        compile=args.model.compile is not None,
        total_steps=STEPS,
    )
    asked = resolve_config(raw, world_size=world_size, facts=facts)
    raw.pop("train_batch_size", None)
    raw["train_micro_batch_size_per_gpu"] = min(asked.micro_batch, MAX_MICRO_BATCH)
    raw["gradient_accumulation_steps"] = min(
        asked.gradient_accumulation_steps, max(MAX_ACCUMULATION, 2 * asked.parallel.pp_size)
    )
    config = load_model_config(args.model)
    _shrink_model(config, max(MAX_LAYERS, asked.parallel.pp_size))
    (scratch / "ds.json").write_text(json.dumps(raw))
    config.save_pretrained(scratch / "model")
    source = args.model.model_name_or_path or args.model.config_name or ""
    tokenizer = args.model.tokenizer_name or ("bytes" if source.endswith(".json") else source)
    model = dataclasses.replace(
        args.model,
        model_name_or_path=None,
        config_name=str(scratch / "model"),
        config_overrides=None,
        tokenizer_name=tokenizer,
    )
    run = dataclasses.replace(
        args.run,
        deepspeed_config=str(scratch / "ds.json"),
        set=[],
        logging_steps=1,
        eval_steps=None,
        max_eval_batches=1,
        save_steps=0,
        max_time=None,
        profile=False,
        verify=False,
        report_to=["none"],
        resume_from_checkpoint="auto",
        overwrite_output_dir=False,
    )
    return Arguments(model, args.data, run), resolve_config(raw, world_size=world_size, facts=facts)


def _shrink_model(config: Any, max_layers: int) -> None:
    """In place: fewer layers, lists of one entry a layer cut to match, dropout off."""
    text = config.get_text_config()
    depth = text.num_hidden_layers
    layers = min(depth, max_layers)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:layers])
        elif isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(text, name, 0.0)
    text.num_hidden_layers = layers


def _run(start: Starter, args: Arguments, world_size: int, folder: Path, steps: int) -> None:
    """Train `steps` steps in all (also of a run that the folder already holds) and save at the end."""
    values = {name: value for name, value in args.to_dict().items() if value is not None}
    values |= {"output_dir": str(folder), "max_steps": steps}
    for name in ("local_rank", "num_train_epochs"):
        values.pop(name, None)
    flags = folder.with_suffix(".json")
    flags.write_text(json.dumps(values))
    exit_code = start([str(flags)], world_size)
    if exit_code == ExitCode.USER_ERROR:
        raise UserError("the run to verify is refused: see the lines above")
    if exit_code:
        raise RuntimeError(f"the run to verify ended with exit code {exit_code}")


def start_processes(argv: list[str], world_size: int) -> int:
    """train.py in `world_size` processes of this machine, out of reach of the variables of any launcher around us."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in names and not name.startswith(("TORCHELASTIC_", "ACCELERATE_"))
    }
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    cpus = max(1, (os.cpu_count() or 1) // world_size)
    environment.setdefault("OMP_NUM_THREADS", str(cpus))
    script = str(Path(__file__).with_name("train.py"))
    codes, processes = [], []
    for rank in range(world_size):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, script, *argv],
                env=environment | {name: str(value) for name, value in own.items()},
                stdout=subprocess.DEVNULL,
            )
        )
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    return next((code for code in codes if code), 0)


def run_plain(
    args: Arguments, resolved: ResolvedConfig
) -> tuple[list[dict[str, float]], dict[str, Any], dict[str, Any]]:
    """The same steps in plain torch: (loss and grad_norm of each step, weights before, weights after) by name."""
    import torch

    from dstrain.data import build_data, build_loader, build_tokenizer
    from dstrain.data.tokenization import pad_token_id
    from dstrain.models.build import build_model
    from dstrain.models.config import load_model_config, max_positions
    from dstrain.plain import PlainEngine

    config = load_model_config(args.model)
    tokenizer = build_tokenizer(args.model.tokenizer_name, args.model.trust_remote_code)
    data = build_data(
        args.data,
        tokenizer,
        seed=args.run.seed,
        block_size=args.data.block_size or min(1024, max_positions(config) or 1024),
        is_main_per_host=True,
        barrier=lambda: None,
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float32}[resolved.precision]
    plain_model = dataclasses.replace(args.model, gradient_checkpointing=False)
    model = build_model(plain_model, config, seed=args.run.seed, dtype=dtype)
    engine = PlainEngine(model, resolved)
    before, lines = _named(model, engine.masters), []
    with build_loader(
        data.train,
        seed=args.run.seed,
        global_batch=resolved.global_batch,
        micro_batch=resolved.micro_batch,
        dp_rank=0,
        dp_size=1,
        pad_token_id=pad_token_id(tokenizer),
    ) as loader:
        for _ in range(STEPS):
            result = engine.train_batch([_unpacked(batch) for batch in next(loader)])
            lines.append({"loss": float(result.loss), "grad_norm": float(result.grad_norm)})
    return lines, before, _named(model, engine.masters)


def _named(model: Any, masters: list[Any]) -> dict[str, Any]:
    """Parameter name -> a copy of its fp32 master."""
    return {name: m.detach().clone() for (name, _), m in zip(model.named_parameters(), masters, strict=True)}


def _unpacked(batch: dict[str, Any]) -> dict[str, Any]:
    """A packed micro-batch as one padded row per document; any other as it is."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    if "position_ids" not in batch:
        return batch
    ids, labels = [], []
    for row in range(len(batch["input_ids"])):
        starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist() + [batch["input_ids"].shape[1]]
        for a, b in itertools.pairwise(starts):
            if b - a > 1:  # a real document has at least two tokens: the rest is padding
                ids.append(batch["input_ids"][row, a:b])
                labels.append(batch["labels"][row, a:b])
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
    }


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


def _compare(
    resolved: ResolvedConfig,
    parallel: list[dict[str, Any]],
    plain: list[dict[str, Any]],
    weights: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any],
) -> list[Comparison]:
    precision = "bf16" if resolved.autocast_dtype else resolved.precision
    loss_bound, norm_bound, change_bound = BOUNDS[precision]
    results = []
    for step, (a, b) in enumerate(zip(parallel, plain, strict=True), 1):
        results.append(Comparison(f"loss of step {step}", _relative(a["loss"], b["loss"]), loss_bound))
        results.append(
            Comparison(f"gradient norm of step {step}", _relative(a["grad_norm"], b["grad_norm"]), norm_bound)
        )
    results.extend(_changes(weights, before, after, change_bound))
    return results


def _changes(
    weights: dict[str, Any], before: dict[str, Any], after: dict[str, Any], bound: float
) -> Iterator[Comparison]:
    for name, end in after.items():
        if name not in weights:
            yield Comparison(f"{name} (missing)", math.inf, bound)
            continue
        change = (end - before[name]).norm().item()
        difference = (weights[name].float() - end).norm().item()
        # A change below what fp32 resolves in the weight itself is rounding.
        floor = 1e-6 * end.norm().item()
        yield Comparison(name, difference / max(change, floor, 1e-30), bound)


def _compare_resumed(whole: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> Comparison:
    errors = [_relative(b["loss"], a["loss"]) for a, b in zip(whole, resumed, strict=True)]
    return Comparison(f"loss, resumed after step {RESUME_AT} against uninterrupted", max(errors), 0.0)


def _relative(a: float | None, b: float | None) -> float:
    if a is None or b is None:  # metrics.jsonl has null for what is not finite
        return math.nan
    return abs(a - b) / max(abs(b), 1e-30)


def report(results: list[Comparison], *, shown: int = 12) -> str:
    """A table of what was compared: every step, and of the parameters those that differ most."""
    steps = [r for r in results if " of step " in r.what or "resumed" in r.what]
    parameters = sorted((r for r in results if r not in steps), key=lambda r: (r.equal, -r.error))
    rows = [*steps, *parameters[:shown]]
    width = max(len(r.what) for r in rows)
    lines = [f"{'compared':{width}}  {'error':>9}  {'bound':>9}"]
    lines += [f"{r.what:{width}}  {r.error:9.2e}  {r.bound:9.2e}{'' if r.equal else '  DIFFERS'}" for r in rows]
    if len(parameters) > shown:
        lines.append(f"... and {len(parameters) - shown} more parameters, each nearer")
    return "\n".join(lines)


def first_difference(results: list[Comparison]) -> Comparison | None:
    return next((result for result in results if not result.equal), None)


def main(argv: list[str]) -> int:
    """`dstrain verify [--world_size N] FLAGS`, the flags of dstrain/train.py. Prints the table; 78 when anything differs."""
    parser = argparse.ArgumentParser(prog="dstrain verify", add_help=False, allow_abbrev=False)
    parser.add_argument("--world_size", type=int, default=2)
    own, train_flags = parser.parse_known_args(argv)
    results = verify(parse_arguments(train_flags), own.world_size)
    print(report(results))
    wrong = first_difference(results)
    if wrong is not None:
        print(f"dstrain: error: {wrong.what} differs from plain torch by {wrong.error:.2e}", file=sys.stderr)
        return ExitCode.VERIFY_FAILED
    print(f"{len(results)} numbers equal those of plain torch")
    return ExitCode.FINISHED
