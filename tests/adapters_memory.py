"""Memory of adapters beside a base in 4 bits and in 16, predicted and measured (docs/adapters.md); about five minutes.

    python -m tests.adapters_memory

A Llama of 16 layers of width 1,024 with made-up weights (209 M parameters), bf16, SGD, two ranks, 20 steps of 8 blocks
of 32 tokens. Prints a JSON line for each layout: GiB of a rank above the imports, and seconds a step.
"""

import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dstrain.data import build_tokenizer
from tests import adapters, launch

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ZeRO-2": (2, ()),
    "ZeRO-2 in 4 bits": (2, ("--load_in_4bit",)),
    "ZeRO-3": (3, ()),
    "ZeRO-3 in 4 bits": (3, ("--load_in_4bit",)),
    "ZeRO-3 in 4 bits, checkpointing": (3, ("--load_in_4bit", "--gradient_checkpointing")),
}


def write_base(folder: Path) -> Path:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16}
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=256, dtype=torch.bfloat16, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer("bytes", False).save_pretrained(folder)
    return folder


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        base = write_base(Path(name, "base"))
        for number, (layout, (stage, more)) in enumerate(LAYOUTS.items()):
            folder = Path(name, f"run_{number}")
            values = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
            argv = adapters.flags(folder, base, "SGD", *more, **values)
            facts = launch.train(folder, *argv, launcher="torchrun", ranks=2, timeout_s=400).check().run_json()
            peak, step_s = (facts["measured"][name] for name in ("peak_above_imports_gib", "step_time_s"))
            found = {"layout": layout, "measured": peak, "step_s": step_s}
            if facts["prediction"]:  # a run that is ready before it starts without
                found["predicted"] = facts["prediction"]["device_gib"]["total"]
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
