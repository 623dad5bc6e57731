"""Every layout's checkpoint resumed under every other layout, compared with the uninterrupted run.

    python -m tests.crossings                        # all; writes docs/crossings.md and the figures as JSON
    python -m tests.crossings --only zero0-1 zero3-2 # those among each other

For each world size, one start of that many processes trains every layout of that size and saves on the way; another
loads every checkpoint under every layout, trains to the end and reports the losses, which are compared with the
uninterrupted run of the layout that saved.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests import checkpoints as ck
from tests.launch import ROOT, run_workers

STEPS, SAVED = ck.STEPS, ck.SAVED
MODEL = {**ck.MODEL, "tie_word_embeddings": True}
_SMALL_GROUPS = {"stage3_param_persistence_threshold": 100, "sub_group_size": 4000}
_CPU = {"offload_optimizer": {"device": "cpu"}}
# Name -> (ranks, DeepSpeed JSON).
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0-1": (1, ck.config(0)),
    "zero0-2": (2, ck.config(0)),
    "zero1-2": (2, ck.config(1)),
    "zero2-1": (1, ck.config(2)),
    "zero2-2": (2, ck.config(2)),
    "zero2-4": (4, ck.config(2)),
    "zero3-1": (1, ck.config(3)),
    "zero3-2": (2, ck.config(3, zero=_SMALL_GROUPS)),
    "zero3-4": (4, ck.config(3)),
    "zero2-cpu-2": (2, ck.config(2, zero=_CPU)),
    "zero3-cpu-2": (2, ck.config(3, zero={**_CPU, "offload_param": {"device": "cpu"}})),
    "pp2-2": (2, ck.config(1, pipeline={"stages": 2})),
    "pp2-dp2-4": (4, ck.config(1, pipeline={"stages": 2})),
    "tp2-2": (2, ck.config(1, tensor_parallel={"autotp_size": 2})),
    "sp2-2": (2, ck.config(3, sequence_parallel_size=2)),
    "zero1-bf16-1": (1, ck.config(1, "bf16")),
    "zero3-bf16-1": (1, ck.config(3, "bf16")),
    "zero1-bf16-2": (2, ck.config(1, "bf16")),
    "zero2-bf16-2": (2, ck.config(2, "bf16")),
    "zero3-bf16-2": (2, ck.config(3, "bf16")),
    "pp2-bf16-2": (2, ck.config(1, "bf16", pipeline={"stages": 2})),
    "tp2-bf16-2": (2, ck.config(1, "bf16", tensor_parallel={"autotp_size": 2})),
}


def is_fp32(name: str) -> bool:
    return "bf16" not in name


def tolerance(source: str, target: str) -> float:
    """Relative: DESIGN's 1e-5 where everything is fp32, 2e-2 where 16 bits are in it."""
    return 1e-5 if is_fp32(source) and is_fp32(target) else 2e-2


def build(name: str, seed: int = 7) -> tuple[Any, Any]:
    """(engine, resolved configuration) of a layout; weights are a function of the seed. A collective."""
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig

    from dstrain.arguments import ModelArguments
    from dstrain.config import resolve_config
    from dstrain.engine import build_engine
    from dstrain.models.build import build_model
    from dstrain.models.pipeline_build import build_stage

    resolved = resolve_config(json.loads(json.dumps(LAYOUTS[name][1])), world_size=dist.get_world_size())
    resolved = resolved.with_total_steps(STEPS)
    values = {key: value for key, value in MODEL.items() if key != "model_type"}
    common = {"seed": seed, "dtype": torch.float32 if resolved.precision == "fp32" else torch.bfloat16}
    margs, dims = ModelArguments(config_name="tiny"), resolved.parallel
    if dims.pp_size > 1:
        index = dims.pp_rank(dist.get_rank())
        model = build_stage(margs, LlamaConfig(**values), index=index, num_stages=dims.pp_size, **common)
    else:
        zero3_config = resolved.deepspeed if resolved.zero_stage == 3 else None
        model = build_model(margs, LlamaConfig(**values), zero3_config=zero3_config, **common)
    return build_engine(model, resolved), resolved


def rows() -> list[dict[str, Any]]:
    """Samples of unequal lengths, the same in every process."""
    import numpy as np

    draw = np.random.default_rng(3)
    found = [draw.integers(0, MODEL["vocab_size"], 17 + i % 8) for i in range(24)]
    return [{"input_ids": row, "labels": row} for row in found]


def _loader(resolved: Any, state: Any, rank: int) -> Any:
    from dstrain.data.loader import build_loader

    dims = resolved.parallel
    return build_loader(
        rows(),
        seed=5,
        global_batch=resolved.global_batch,
        micro_batch=resolved.micro_batch,
        dp_rank=dims.dp_rank(rank),
        dp_size=dims.dp_size,
        samples_consumed=state.samples_consumed,
    )


def losses_from(engine: Any, resolved: Any, state: Any, until: int) -> list[float]:
    """Train from `state` to step `until`. A collective."""
    import torch.distributed as dist

    with _loader(resolved, state, dist.get_rank()) as loader:
        return [float(engine.train_batch(next(loader)).loss) for _ in range(state.step, until)]


def held_out(engine: Any, resolved: Any, state: Any) -> float:
    """Loss of the global batch after `state`, without training. A collective."""
    import torch.distributed as dist

    with _loader(resolved, state, dist.get_rank()) as loader:
        loss_sum, tokens = engine.eval_batch(next(loader))
    return float(loss_sum / tokens)


def exported_loss(checkpoint: Path, out: Path, samples_consumed: int) -> float:
    """The same loss from plain transformers, after `export`."""
    import torch
    from transformers import AutoModelForCausalLM

    from dstrain.checkpoint.export import export
    from dstrain.data.order import Order

    model = AutoModelForCausalLM.from_pretrained(export(checkpoint, out, max_shard_bytes=20_000))
    samples, total, count = rows(), 0.0, 0
    order = Order(len(samples), 5)
    for i in range(samples_consumed, samples_consumed + ck.GLOBAL_BATCH):
        ids = torch.tensor(samples[order[i]]["input_ids"])[None]
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def _manager(engine: Any, folder: Path) -> Any:
    from dstrain.checkpoint.export import model_files
    from dstrain.checkpoint.manager import CheckpointManager
    from dstrain.data.tokenization import build_tokenizer

    def files() -> dict[str, bytes]:
        return model_files(engine.model, build_tokenizer("bytes"))

    return CheckpointManager(folder, engine.deepspeed, save_steps=0, save_total_limit=None, model_files=files)


def save_all(folder: str, names: list[str]) -> dict[str, tuple[list[float], float]]:
    """Layout -> losses of all steps, uninterrupted but for the save after SAVED; and a held-out loss at the save."""
    from dstrain.checkpoint.manager import TrainState

    curves = {}
    for name in names:
        engine, resolved = build(name)
        first = losses_from(engine, resolved, TrainState(), SAVED)
        state = TrainState(SAVED, SAVED * resolved.global_batch)
        _manager(engine, Path(folder) / name).save(state, {"from": name})
        held = held_out(engine, resolved, state)
        curves[name] = first + losses_from(engine, resolved, state, STEPS), held
        _release(engine)
    return curves


def load_all(folder: str, names: list[str], sources: list[str]) -> dict[str, list[float] | str]:
    """ "source > target" -> losses of the steps after SAVED, or what went wrong."""
    curves: dict[str, list[float] | str] = {}
    for target in names:
        for source in sources:
            engine, resolved = build(target, seed=8)  # other weights: what is not loaded shows
            try:
                state, extra = _manager(engine, Path(folder) / target).load(Path(folder) / source / f"step_{SAVED:08d}")
                assert extra == {"from": source}
                curves[f"{source} > {target}"] = losses_from(engine, resolved, state, STEPS)
            except ValueError as error:  # a refusal; anything else ends the command
                curves[f"{source} > {target}"] = str(error)
            _release(engine)
    return curves


def _release(engine: Any) -> None:
    import gc

    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    engine.deepspeed.destroy()
    parallel_state_sp._release_sequence_parallel_groups()  # else a second engine of one process asserts
    gc.collect()


def _groups(names: list[str]) -> dict[str, list[str]]:
    """Layouts that one start of processes can hold: DeepSpeed's groups are global, so one kind of parallelism each."""
    found: dict[str, list[str]] = {}
    for name in names:
        kind = "zero" if name.startswith("zero") else name[:3]
        found.setdefault(f"{kind}-{LAYOUTS[name][0]}", []).append(name)
    return found


def _once(path: Path, target: str, world: int, *args: Any) -> Any:
    """Rank 0's result of a start of `world` processes, kept in a file: an interrupted matrix goes on where it was."""
    if not path.exists():
        result = run_workers(f"tests.crossings:{target}", world, *args, group="dstrain", timeout_s=900)[0]
        path.write_text(json.dumps(result))
    return json.loads(path.read_text())


def cross(names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """ "source > target" -> {error, bound} for every pair of `names`, and "source > export"."""
    curves: dict[str, tuple[list[float], float]] = {}
    for key, members in _groups(names).items():
        curves |= _once(folder / f"save_{key}.json", "save_all", LAYOUTS[members[0]][0], str(folder), members)
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        out = folder / f"{name}_hf"
        shutil.rmtree(out, ignore_errors=True)
        loss = exported_loss(folder / name / f"step_{SAVED:08d}", out, SAVED * ck.GLOBAL_BATCH)
        bound = 1e-5 if is_fp32(name) else 2e-2
        results[f"{name} > export"] = {"error": abs(loss - curves[name][1]) / loss, "bound": bound}
    for key, members in _groups(names).items():
        path, world = folder / f"load_{key}.json", LAYOUTS[members[0]][0]
        for pair, losses in _once(path, "load_all", world, str(folder), members, names).items():
            source, target = pair.split(" > ")
            results[pair] = _compare(losses, curves[source][0], tolerance(source, target))
    return results


def _compare(losses: list[float] | str, curve: list[float], bound: float) -> dict[str, Any]:
    if isinstance(losses, str):
        return {"error": None, "bound": bound, "text": losses}
    errors = [abs(a - b) / abs(b) for a, b in zip(losses, curve[SAVED:], strict=True)]
    return {"error": max(errors), "bound": bound}


def _markdown(names: list[str], results: dict[str, dict[str, Any]]) -> str:
    good = sum(r["error"] is not None and r["error"] <= r["bound"] for r in results.values())
    lines = [
        "# Crossings of layouts, measured",
        "",
        f"Written by `python -m tests.crossings`: a checkpoint after step {SAVED} of each row, resumed under each",
        f"column and trained to step {STEPS}. The figure is the largest relative difference of a loss from the",
        "uninterrupted run of the row. Bounds: 1e-5 where both are fp32, 2e-2 where 16 bits are in it. `=`: the very",
        "bits. The last number of a name is the number of ranks; `cpu` offloads to the host, `pp2`, `tp2`, `sp2` are",
        "two stages or ranks. `export`: the loss of plain transformers after the export against the engine's.",
        "",
        f"{good} of {len(results)} within their bound.",
        "",
        "| from \\ to | " + " | ".join([*names, "export"]) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for source in names:
        cells = [_cell(results[f"{source} > {target}"]) for target in [*names, "export"]]
        lines.append(f"| {source} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(result: dict[str, Any]) -> str:
    if result["error"] is None:
        return "refused"
    text = "=" if result["error"] == 0 else f"{result['error']:.0e}"
    return text if result["error"] <= result["bound"] else f"**{text}**"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--write", type=Path, default=None, help="Markdown table (default: docs/crossings.md when all)")
    parser.add_argument("--work", type=Path, help="keep results here, and go on with those that are there")
    args = parser.parse_args()
    folder = args.work or Path(tempfile.mkdtemp(prefix="crossings_"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        results = cross(args.only, folder)
    finally:
        if args.work is None:
            shutil.rmtree(folder)
    target = args.write or (ROOT / "docs" / "crossings.md" if args.only == list(LAYOUTS) else None)
    if target:
        target.write_text(_markdown(args.only, results))
    print(json.dumps(results, indent=1))
    return int(any(r["error"] is None or not r["error"] <= r["bound"] for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
