"""Every causal-LM type of the installed transformers, tiny: initial and pretrained weights and loss against its own.

    python tests/sweep_models.py                     # all, about two minutes on two cores
    python tests/sweep_models.py llama gpt2 mamba    # these

One line for each type that differs, then a JSON line of counts. `skipped` are types of which no tiny model exists.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dstrain.arguments import ModelArguments
from dstrain.models.build import build_model, build_skeleton
from dstrain.models.loss import check_loss_head, install_fused_loss, shift_labels, token_loss
from dstrain.models.pretrained import find_checkpoint, load
from tests.architectures import VOCABULARY, model_types, tiny_config, tiny_inputs

LARGEST = 30_000_000
SCRATCH = ModelArguments(config_name="x")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def compare_initial(model_type: str, usual: torch.nn.Module) -> str | None:
    """Names, shapes, constants, and mean and deviation of the larger parameters; buffers to the bit."""
    model = build_model(SCRATCH, tiny_config(model_type), seed=1, dtype=torch.float32)
    if [n for n, _ in model.named_parameters()] != [n for n, _ in usual.named_parameters()]:
        return "other parameters"
    for name, expected in usual.named_parameters():
        parameter = model.get_parameter(name)
        if parameter.is_meta or parameter.shape != expected.shape or parameter.isnan().any():
            return f"{name} is not initialised"
        if expected.numel() > 1 and expected.std() == 0 and not same(parameter, expected):
            return f"{name} is not constant"
        if expected.numel() >= 64 and expected.std() > 0 and not 0.65 < parameter.std() / expected.std() < 1.5:
            return f"{name} has deviation {parameter.std():.3g}, not {expected.std():.3g}"
    wrong = [name for name, buffer in usual.named_buffers() if not same(model.get_buffer(name), buffer)]
    return f"buffers {wrong[:3]}" if wrong else None


def compare_pretrained(model_type: str, usual: torch.nn.Module) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        usual.save_pretrained(folder)
        model = build_skeleton(SCRATCH, tiny_config(model_type), torch.float32)
        load(model, find_checkpoint(folder), torch.float32, None)
    state = model.state_dict()
    wrong = [name for name, tensor in usual.state_dict().items() if not same(state[name], tensor)]
    return f"weights {wrong[:3]}" if wrong else None


def compare_loss(model_type: str, usual: torch.nn.Module) -> str | None:
    """Value and gradients, with logits large enough for caps to matter; a head that is not fused is right too."""
    batch = {name: tensor.clone() for name, tensor in tiny_inputs(model_type).items()}
    batch["labels"][0, :3] = -100
    usual.config.get_text_config().output_router_logits = False
    for parameter in usual.get_output_embeddings().parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    logits = usual(input_ids=batch["input_ids"]).logits.float()
    target = shift_labels(batch["labels"])
    expected = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
    expected.backward()
    grads = {name: p.grad.clone() for name, p in usual.named_parameters() if p.grad is not None}
    usual.zero_grad()
    head = install_fused_loss(usual)
    reason = check_loss_head(usual, head, VOCABULARY)
    loss, _ = token_loss(usual, head, batch)
    loss.backward()
    error = sum((usual.get_parameter(name).grad - grad).square().sum() for name, grad in grads.items())
    size = sum(grad.square().sum() for grad in grads.values())
    if abs(loss / expected - 1) > 1e-6 or (error / size).sqrt() > 2e-6:
        return f"{loss.item()} for {expected.item()}, gradients off by {(error / size).sqrt():.1e}"
    return f"not fused: {reason}" if reason else None


def sweep_one(model_type: str) -> dict[str, str | None]:
    """What differs, by part; `skipped` where no tiny model exists."""
    try:
        usual = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    except Exception as error:
        return {"skipped": f"{type(error).__name__}"}
    if sum(p.numel() for p in usual.parameters()) > LARGEST:
        return {"skipped": "large"}
    results: dict[str, str | None] = {}
    for part, compare in (("initial", compare_initial), ("pretrained", compare_pretrained), ("loss", compare_loss)):
        try:
            results[part] = compare(model_type, usual)
        except Exception as error:
            results[part] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return results


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    counts: Counter[str] = Counter()
    for model_type in sys.argv[1:] or model_types():
        torch.manual_seed(0)
        results = sweep_one(model_type)
        counts["types"] += 1
        for part, problem in results.items():
            counts[part] += part == "skipped" or problem is None
        if any(results.values()):
            print(model_type, json.dumps({part: problem for part, problem in results.items() if problem}), flush=True)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
