"""Every layout's checkpoint resumed under every other layout, compared with the uninterrupted run.

    python -m tests.crossings                        # all; writes docs/crossings.md and the figures as JSON
    python -m tests.crossings --only zero0-1 zero3-2 # those among each other

Every run is the real trainer's: each layout trains to the end, saving on the way; a copy of its run folder, cut back
to that checkpoint, is then started under each layout, and its losses are compared with the uninterrupted run's.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests import checkpoints as ck
from tests.launch import ROOT, Result

STEPS, SAVED = ck.STEPS, ck.SAVED
_SMALL_GROUPS = {"stage3_param_persistence_threshold": 100, "sub_group_size": 4000}
_CPU = {"offload_optimizer": {"device": "cpu"}}
# Name -> (ranks, DeepSpeed JSON).
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0-1": (1, ck.config(0)),
    "zero1-2": (2, ck.config(1)),
    "zero2-2": (2, ck.config(2)),
    "zero2-4": (4, ck.config(2)),
    "zero3-2": (2, ck.config(3, zero=_SMALL_GROUPS)),
    "zero3-4": (4, ck.config(3)),
    "zero3-cpu-2": (2, ck.config(3, zero={**_CPU, "offload_param": {"device": "cpu"}})),
    "pp2-2": (2, ck.config(1, pipeline={"stages": 2})),
    "pp2-dp2-4": (4, ck.config(1, pipeline={"stages": 2})),
    "tp2-2": (2, ck.config(1, tensor_parallel={"autotp_size": 2})),
    "tp2-zero3-2": (2, ck.config(3, tensor_parallel={"autotp_size": 2})),
    "sp2-2": (2, ck.config(3, sequence_parallel_size=2)),
    "zero1-bf16-2": (2, ck.config(1, "bf16")),
    "zero3-bf16-2": (2, ck.config(3, "bf16")),
    "pp2-bf16-2": (2, ck.config(1, "bf16", pipeline={"stages": 2})),
}


def is_fp32(name: str) -> bool:
    return "bf16" not in name


def tolerance(source: str, target: str) -> float:
    """Relative: DESIGN's 1e-5 where everything is fp32, 2e-2 where 16 bits are in it."""
    return 1e-5 if is_fp32(source) and is_fp32(target) else 2e-2


def start(run: Path, name: str) -> Result:
    ranks, values = LAYOUTS[name]
    return ck.start(run, values, ranks, model={"tie_word_embeddings": True})


def exported_loss(run: Path) -> float:
    """The loss of the first held-out batch from plain transformers, after an export of the last checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    from dstrain.arguments import DataArguments
    from dstrain.checkpoint.export import export
    from dstrain.data import build_data, build_tokenizer, eval_batches

    out = run / "hf"
    shutil.rmtree(out, ignore_errors=True)
    export(run / "checkpoints" / f"step_{STEPS:08d}", out, max_shard_bytes=20_000)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    text = str(run.parent / f"{run.name}_inputs" / "text.txt")
    data = build_data(
        DataArguments(train_file=[text], validation_file=[text]),
        build_tokenizer("bytes"),
        seed=42,
        block_size=ck.BLOCK_SIZE,
        is_main_per_host=True,
        barrier=lambda: None,
    )
    split = {"global_batch": ck.GLOBAL_BATCH, "micro_batch": ck.GLOBAL_BATCH, "dp_rank": 0, "dp_size": 1}
    ((batch,),) = eval_batches(data.validation, max_batches=1, **split)
    with torch.no_grad():
        return float(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss)


def cross(names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """ "source > target" -> {error, bound} for every pair of `names`, and "source > export"."""
    results: dict[str, dict[str, Any]] = {}
    for source in names:
        run = folder / source
        first = start(run, source).check()
        held_out = first.metrics("eval")[-1]["loss"]
        error = abs(exported_loss(run) - held_out) / held_out
        results[f"{source} > export"] = {"error": error, "bound": 1e-5 if is_fp32(source) else 2e-2}
        for target in names:
            copied = ck.interrupt(run, folder / "crossing")
            second = start(copied, target)
            refused = second.exit_code == 2
            losses = second.stderr.strip() if refused else second.check().losses()
            results[f"{source} > {target}"] = _compare(losses, first.losses(), tolerance(source, target))
            shutil.rmtree(copied)
    return results


def _compare(losses: list[float] | str, curve: list[float], bound: float) -> dict[str, Any]:
    if isinstance(losses, str):
        return {"error": None, "bound": bound, "text": losses}
    assert losses[:SAVED] == curve[:SAVED]  # the copied lines
    errors = [abs(a - b) / abs(b) for a, b in zip(losses[SAVED:], curve[SAVED:], strict=True)]
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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="crossings_") as folder:
        results = cross(args.only, Path(folder))
    target = args.write or (ROOT / "docs" / "crossings.md" if args.only == list(LAYOUTS) else None)
    if target:
        target.write_text(_markdown(args.only, results))
    print(json.dumps(results, indent=1))
    return int(any(r["error"] is None or not r["error"] <= r["bound"] for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
