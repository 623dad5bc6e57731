"""The model card of an export: what was trained on what and how, and how it went, as far as the run folder tells."""

import json
from pathlib import Path
from typing import Any

import torch

from dstrain.adapter import is_base_in_4bit
from dstrain.checkpoint.manifest import Manifest
from dstrain.monitor.metrics import read_metrics
from dstrain.monitor.progress import render_loss_curve


def build_card(checkpoint: Path, manifest: Manifest, dtype: torch.dtype, library: str = "transformers") -> str:
    """README.md of the exported folder, with the header that the hub reads. dtype: of the exported weights. library:
    the one that loads them.

    A checkpoint that lies in its run folder is told with the data, the flags and the curves of its run; one that was
    moved, with what its own manifest holds.
    """
    run_folder = checkpoint.parent.parent
    facts = _read_json(run_folder / "run.json")
    lines = [line for line in read_metrics(run_folder) if line.get("step", 0) <= manifest.contents["step"]]
    parts = [
        _header(facts, library),
        "# Model card\n\nTrained with dstrain.\n",
        _table("Result", _result(manifest, lines, facts)),
        _table("Data", facts.get("data", {})),
        _table("Training", _training(checkpoint, manifest, dtype, facts)),
        _curve(lines),
        _configuration(facts),
        _table("Versions", facts.get("versions", {})),
    ]
    return "\n".join(part for part in parts if part)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _header(facts: dict[str, Any], library: str) -> str:
    base = facts.get("arguments", {}).get("model_name_or_path")
    named = f"base_model: {json.dumps(base)}\n" if base else ""
    return f"---\nlibrary_name: {library}\npipeline_tag: text-generation\n{named}tags:\n- dstrain\n---\n"


def _result(manifest: Manifest, lines: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"step": manifest.contents["step"], "samples": manifest.contents["samples_consumed"]}
    for kind, name in (("train", "training loss"), ("eval", "held-out loss")):
        own = [line for line in lines if line["kind"] == kind]
        if own:
            found[name] = own[-1]["loss"]
        if own and kind == "train":
            found["tokens read"] = own[-1]["tokens_total"]
        if own and kind == "eval":
            found["perplexity"] = own[-1]["perplexity"]
    measured = facts.get("measured", {})
    if (energy := measured.get("energy_kwh")) is not None:
        found["energy, kWh (hardware counters, last start)"] = energy
    if (co2 := measured.get("co2_kg")) is not None:
        country = facts["arguments"]["co2_country"]
        found[f"CO2, kg (that energy, mean of the grid of {country} by codecarbon)"] = co2
    return found


def _training(checkpoint: Path, manifest: Manifest, dtype: torch.dtype, facts: dict[str, Any]) -> dict[str, Any]:
    contents = manifest.contents
    in_4bit = is_base_in_4bit(contents.get("identity", {}))
    return {
        "parameters": facts.get("num_parameters"),
        "of them trained": facts.get("num_trainable_parameters"),
        "model beside the adapters": "in 4 bits (nf4, double quantization)" if in_4bit else None,
        "weights": str(dtype).removeprefix("torch."),
        "layout": ", ".join(f"{key} {value}" for key, value in sorted(contents["layout"].items())),
        "optimizer": contents["engine"]["optimizer"],
        "seed": facts.get("identity", {}).get("seed"),
        "global batch": facts.get("identity", {}).get("global_batch"),
        "block size": facts.get("identity", {}).get("block_size"),
        "host": facts.get("host", {}).get("platform"),
        "checkpoint": f"{checkpoint.name} (manifest {manifest.digest[:16]})",
    }


def _curve(lines: list[dict[str, Any]]) -> str:
    points = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    return f"## Training loss\n\n```\n{render_loss_curve(points)}\n```\n" if len(points) > 1 else ""


def _configuration(facts: dict[str, Any]) -> str:
    if "deepspeed_config" not in facts:
        return ""
    return f"## DeepSpeed configuration\n\n```json\n{json.dumps(facts['deepspeed_config'], indent=2)}\n```\n"


def _table(title: str, rows: dict[str, Any]) -> str:
    told = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *told, ""]) if told else ""


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
