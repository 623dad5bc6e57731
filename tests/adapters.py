"""LoRA runs of the real trainer, and plain peft in this process: the same base, adapters, batches and optimizer.

    python -m tests.adapters ../shared/data/models/stories15M-hf-bf16      # 20 steps at ZeRO-3 x 2, SGD and AdamW
    python -m tests.adapters ../shared/data/models/stories15M-hf-bf16 --stage 2 --ranks 1 --load_in_4bit

Prints, as a JSON line for each optimizer, the largest relative difference of the losses and of the trained adapters,
and the largest difference of the logits of the merged export.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from dstrain.adapter import is_adapter, peft_name
from dstrain.arguments import parse_arguments
from dstrain.data import build_data, build_loader, build_tokenizer
from dstrain.data.tokenization import pad_token_id
from dstrain.models.build import build_model, load_model_config
from tests import forked
from tests.checkpoints import MODEL
from tests.launch import Result

STEPS, GLOBAL_BATCH, BLOCK_SIZE = 20, 8, 32
LORA = ("--lora_rank", "4", "--lora_alpha", "16")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"type": "SGD", "params": {"lr": 2e-3}},
    "AdamW": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1, "torch_adam": True}},
}
Lora = dict[str, torch.Tensor]


def write_base(folder: Path, seed: int = 0) -> Path:
    """A Llama of two layers with made-up weights, and a tokenizer of bytes."""
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in MODEL.items() if k != "model_type"})).save_pretrained(folder)
    build_tokenizer("bytes", False).save_pretrained(folder)
    return folder


def flags(folder: Path, base: Path, optimizer: str, *more: str, **values: Any) -> list[str]:
    """Write the inputs of a run beside its folder, and name them."""
    inputs = folder.parent / f"{folder.name}_inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    deepspeed = {"train_batch_size": GLOBAL_BATCH, "gradient_clipping": 0.0, "optimizer": OPTIMIZERS[optimizer]}
    (inputs / "ds.json").write_text(json.dumps({**deepspeed, **values}))
    text = "\n".join(f"the {n} old cats sat on {n * n} red mats and ran {7 * n % 31} miles away" for n in range(300))
    (inputs / "text.txt").write_text(text)
    return [
        *("--deepspeed_config", str(inputs / "ds.json"), "--model_name_or_path", str(base)),
        *("--train_file", str(inputs / "text.txt"), "--block_size", str(BLOCK_SIZE), "--report_to", "none"),
        *("--max_steps", str(STEPS), *LORA, *more),
    ]


def train(folder: Path, argv: list[str], ranks: int) -> Result:
    return forked.train(folder, *argv, ranks=ranks)


def load_plain(base: str, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **how)


def plain_base_in_4bit(base: str) -> Any:
    """As transformers and peft make it: the base that every guide to QLoRA makes, frozen."""
    from peft import prepare_model_for_kbit_training

    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    plain = load_plain(base, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **how))
    for layer in plain.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # a kernel that computes in bf16 once gradients are off
            layer.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(plain, use_gradient_checkpointing=False)


def plain_peft(argv: list[str], optimizer: str, steps: int = STEPS) -> tuple[list[float], Lora, nn.Module]:
    """Losses, trained adapters (by the names of their file) and model of peft's own, in fp32 in this process."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    args = parse_arguments(argv)
    base, settings = str(args.model.model_name_or_path), args.model.adapter
    assert settings is not None
    started = build_model(args.model, load_model_config(args.model), seed=args.run.seed, dtype=torch.float32)
    first = {peft_name(name): p.detach() for name, p in started.named_parameters() if is_adapter(name)}
    plain = plain_base_in_4bit(base) if args.model.load_in_4bit else load_plain(base)
    model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **settings))
    assert not set_peft_model_state_dict(model, first).unexpected_keys
    assert get_peft_model_state_dict(model).keys() == first.keys()
    params = {name: v for name, v in OPTIMIZERS[optimizer]["params"].items() if name != "torch_adam"}
    update = getattr(torch.optim, optimizer)([p for p in model.parameters() if p.requires_grad], **params)
    losses = []
    tokenizer = build_tokenizer(base, False)
    data = build_data(
        args.data, tokenizer, seed=args.run.seed, block_size=BLOCK_SIZE, is_main_per_host=True, barrier=lambda: None
    )
    batch = {"global_batch": GLOBAL_BATCH, "micro_batch": GLOBAL_BATCH, "dp_rank": 0, "dp_size": 1}
    with build_loader(data.train, seed=args.run.seed, pad_token_id=pad_token_id(tokenizer), **batch) as loader:
        for _ in range(steps):
            (micro,) = next(loader)
            labels = micro.pop("labels")[:, 1:].flatten()
            loss = nn.functional.cross_entropy(model(**micro).logits[:, :-1].flatten(0, 1).float(), labels)
            loss.backward()
            update.step()
            update.zero_grad()
            losses.append(loss.item())
    return losses, get_peft_model_state_dict(model), model


def relative(got: list[float], expected: list[float]) -> float:
    assert len(got) == len(expected) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))


def largest_difference(got: Lora, expected: Lora) -> float:
    """Of any matrix, of its length."""
    assert got.keys() == expected.keys()
    return max(((got[name] - value).norm() / value.norm()).item() for name, value in expected.items())


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=(torch.arange(24) * 7 % 250).reshape(2, 12)).logits


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    args, more = parser.parse_known_args()  # the others are train.py's

    from safetensors.torch import load_file

    from dstrain.checkpoint.export import export

    for optimizer in OPTIMIZERS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, "run")
            argv = flags(folder, Path(args.base), optimizer, "--export", *more, zero_optimization={"stage": args.stage})
            result = train(folder, argv, ranks=args.ranks).check()
            losses, adapters, model = plain_peft(argv, optimizer)
            checkpoint = folder / "checkpoints" / f"step_{STEPS:08d}"
            merged = AutoModelForCausalLM.from_pretrained(export(checkpoint, Path(name, "merged"), merge=True))
            own = load_file(folder / "export" / "adapter_model.safetensors")
            found = {
                "optimizer": optimizer,
                "losses": [result.losses()[0], result.losses()[-1]],
                "loss": relative(result.losses(), losses),
                "adapters": largest_difference(own, adapters),
                "logits": (logits(merged) - logits(model)).abs().max().item(),
                "largest_logit": logits(model).abs().max().item(),
                "checkpoint_bytes": sum(p.stat().st_size for p in checkpoint.glob("rank_*")),
                "parameters": [result.run_json()[f"num_{kind}parameters"] for kind in ("", "trainable_")],
            }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
