"""A folder of adapters as peft writes it, ours or another's: what it holds, and merged into its base.

The base is loaded in fp32, the adapters are added to it by peft and the sum is rounded once, so merging takes the base
in fp32 in memory.
"""

import json
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dstrain.adapter import NAME, peft_name, unknown_settings
from dstrain.arguments import ModelArguments
from dstrain.checkpoint.files import Entry, write_safetensors
from dstrain.errors import UserError
from dstrain.models.adapters import lora_layers, weights_sha256
from dstrain.models.config import load_model_config, one_line
from dstrain.models.pretrained import Checkpoint, find_checkpoint
from dstrain.models.quantized import round_to_4bit

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# In the metadata of the weights: of the base that they were trained beside, and what of it was quantized to 4 bits.
BASE_SHA256, IN_4BIT_OF = "base_sha256", "load_in_4bit_of"
# Beyond what is trained here: what peft merges as it computes it (tests/unit/test_peft_folder.py).
_MERGED = ("bias", "modules_to_save", "use_dora")
# Initial weights that leave the base as it is.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


def is_peft_folder(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The name of the model that the adapters of a folder belong to. Raises UserError."""
    base = _settings(folder).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder / ADAPTER_CONFIG} names no base model: name it with --base_model")
    return base


def adapter_dtype(folder: Path) -> torch.dtype:
    """The widest type of the adapters' weights. Raises UserError."""
    weights = Checkpoint(str(folder), [str(_weights(folder))])
    weights.open()
    try:
        return reduce(torch.promote_types, (t.dtype for t in weights.shapes().values()))
    finally:
        weights.close()


def write_adapters(
    entries: Iterable[Entry], folder: Path, base_sha256: str | None, in_4bit_of: torch.dtype | None
) -> None:
    """Their weights as peft reads them, in a folder that is to have their configuration too.

    in_4bit_of: the type of the base's weights that were quantized in training, if they were.
    """
    named = [replace(entry, key=peft_name(entry.key)) for entry in entries]
    metadata = {"format": "pt"} | ({BASE_SHA256: base_sha256} if base_sha256 else {})
    if in_4bit_of is not None:
        metadata[IN_4BIT_OF] = str(in_4bit_of).removeprefix("torch.")
    write_safetensors(folder / ADAPTER_WEIGHTS, named, metadata)


def write_merged(
    folder: Path,
    out: Path,
    base: str,
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * 10**9,
    trust_remote_code: bool = False,
) -> None:
    """The adapters of `folder` added to the weights of `base`, as a Hugging Face folder in `dtype`, without tokenizer.

    Raises UserError for adapters that cannot be added, and for a base that is not theirs.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("merging adapters needs the package peft: pip install peft") from None
    _check_settings(folder)
    model = _load_base(folder, base, trust_remote_code)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is compared below
            adapted: Any = get_peft_model(model, LoraConfig.from_pretrained(str(folder)), NAME)
            found = adapted.load_adapter(str(folder), NAME, torch_device="cpu")
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the adapters of {folder} do not fit {base}: {one_line(error)}") from None
    if wrong := [*found.missing_keys, *found.unexpected_keys]:
        raise UserError(f"the adapters of {folder} do not fit {base}: {len(wrong)} of other names, such as {wrong[0]}")
    _check_ties(folder, adapted)
    adapted.merge_and_unload().to(dtype).save_pretrained(out, max_shard_size=max_shard_bytes)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else None
        raise UserError(f"{path}: peft_type is {kind!r}, and only LORA can be merged here: merge it with peft")
    return values


def _check_settings(folder: Path) -> None:
    path, values = folder / ADAPTER_CONFIG, _settings(folder)
    refused = {name: values[name] for name in unknown_settings(values, _MERGED)}
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        refused["task_type"] = values["task_type"]
    if values.get("init_lora_weights", True) not in _PLAIN_STARTS:
        refused["init_lora_weights"] = values["init_lora_weights"]  # PiSSA, OLoRA, ... change the base
    if values.get("revision") not in (None, "main"):
        refused["revision"] = values["revision"]
    if refused:
        raise UserError(
            [f"{path}: {name} {value!r} cannot be merged here: merge it with peft" for name, value in refused.items()]
        )


def _weights(folder: Path) -> Path:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder} has no {ADAPTER_WEIGHTS}: write the adapters again with save_pretrained")
    return path


def _load_base(folder: Path, base: str, trust_remote_code: bool) -> Any:
    """In fp32, with what 4 bits left of its weights where the adapters were trained beside that.

    Raises UserError for one that is not there, not whole, stored quantized, or not that of the training.
    """
    from transformers import AutoModelForCausalLM

    try:
        config = load_model_config(ModelArguments(model_name_or_path=base, trust_remote_code=trust_remote_code))
        find_checkpoint(base)
    except UserError as error:
        reason = error.problems[0].removeprefix("--model_name_or_path ")
        raise UserError(f"the base of the adapters, {reason}; say with --base_model where it is now") from None
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{base} holds quantized weights: name the unquantized model with --base_model")
    try:
        with safe_open(_weights(folder), framework="pt") as stream:
            metadata = stream.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{folder / ADAPTER_WEIGHTS} cannot be read: {one_line(error)}") from None
    if BASE_SHA256 in metadata and weights_sha256(base) != metadata[BASE_SHA256]:
        raise UserError(f"{base} has other weights than the model of these adapters: name that one with --base_model")
    model, info = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{base} lacks weights of the model, such as {missing[0]}: name its base with --base_model")
    if IN_4BIT_OF in metadata:
        round_to_4bit(model, getattr(torch, metadata[IN_4BIT_OF]))
    return model


def _check_ties(folder: Path, adapted: Any) -> None:
    """peft computes tied embeddings apart once one of them has an adapter, but would merge it into both."""
    model = adapted.get_base_model()
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.get_text_config().tie_word_embeddings and any(m in both for _, m in lora_layers(adapted)):
        raise UserError(f"{folder} has an adapter of tied embeddings, which cannot be merged: train it without")
