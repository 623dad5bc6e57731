"""A checkpoint of adapters as peft's folder, or merged into its base as a plain Hugging Face folder."""

import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dstrain.adapter import peft_name
from dstrain.checkpoint.files import Entry, write_safetensors
from dstrain.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"


def base_of(folder: Path) -> str:
    """The name of the model that the adapters of a folder belong to."""
    return json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]


def write_adapter(entries: Iterable[Entry], folder: Path) -> None:
    """Their weights as peft reads them, in a folder that is to have their configuration too."""
    named = [replace(entry, key=peft_name(entry.key)) for entry in entries]
    write_safetensors(folder / "adapter_model.safetensors", named, {"format": "pt"})


def write_merged(
    entries: Iterable[Entry], folder: Path, base: str, sha256: str | None, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Add the adapters (entries in fp32, configuration in `folder`) to the weights of their base, written there.

    Adds in fp32 and rounds once, so it takes the base in fp32 in memory. sha256: of the base's weights in training.
    Raises UserError for another base.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError("--merge needs the package peft: pip install peft") from None
    from transformers import AutoModelForCausalLM

    from dstrain.models.adapters import weights_sha256

    if weights_sha256(base) != sha256:
        raise UserError(f"{base} has other weights than the model of these adapters: name that one with --base_model")
    with tempfile.TemporaryDirectory() as name:
        adapter = Path(name)
        (folder / ADAPTER_CONFIG).rename(adapter / ADAPTER_CONFIG)
        write_adapter(entries, adapter)
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged = PeftModel.from_pretrained(model, name).merge_and_unload()
    merged.to(dtype).save_pretrained(folder, max_shard_size=max_shard_bytes)
