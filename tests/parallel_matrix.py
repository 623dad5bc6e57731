"""Every kind of parallelism, for several models and optimizers, against one rank; two stages of a dozen more model
types; and every pair of features.

    python -m tests.parallel_matrix              # all; writes docs/parallelism.md and the table in ds_configs/README.md
    python -m tests.parallel_matrix --only pairs
    python -m tests.parallel_matrix --work /tmp/matrix.json      # keeps each result, and goes on after an interruption

A run is the real trainer's, 20 steps in forked ranks. Compared with the run of one rank at ZeRO-1 from the same weights
and samples are loss, gradient norm and held-out loss of every step, and the weights of the exported model.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from tests.architectures import tiny_config
from tests.distributed import parity
from tests.distributed.parity import ADAMW, BF16, MICRO, deep, zero
from tests.launch import ROOT

PAGE, README = ROOT / "docs" / "parallelism.md", ROOT / "ds_configs" / "README.md"
BEGIN, END = "<!-- support matrix: python -m tests.parallel_matrix -->", "<!-- end of the support matrix -->"
# A larger step lets rounding grow past the bound within 20 steps, whatever the engine.
SGD = parity.SGD | {"optimizer": {"type": "SGD", "params": {"lr": 0.03}}}
SGD_CLIPPED = SGD | {"gradient_clipping": 0.5}
MATRIX_MODELS = ("llama", "llama_tied", "gpt2", "qwen3", "gemma3", "mixtral", "gpt_neox")
# Of every family that docs/architectures.md cuts in one process: other positions, attention, experts, no attention.
STAGED_TYPES = ("bloom", "opt", "olmo2", "phi3", "falcon", "gptj", "stablelm", "cohere2", "deepseek_v3", "qwen2_moe",
                "granitemoehybrid", "mamba2")  # fmt: skip


def pp(n: int) -> dict[str, Any]:
    return {"pipeline": {"stages": n}}


TP2, SP2 = {"tensor_parallel": {"autotp_size": 2}}, {"sequence_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "PP2": (2, pp(2)),
    "PP3": (3, pp(3)),
    "PP4": (4, pp(4)),
    "PP2xDP2": (4, pp(2)),
    "TP2": (2, TP2),
    "TP2xDP2": (4, TP2),
    "SP2": (2, SP2),
    "SP2xDP2": (4, SP2),
}
OPTIMIZERS = {"SGD": SGD, "SGD clipped": SGD_CLIPPED, "AdamW": ADAMW, "AdamW bf16": ADAMW | BF16}


@dataclass(frozen=True)
class Feature:
    """config, flags: what it adds. ranks: what it multiplies them by. reference: whether one rank must have it too."""

    config: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    ranks: int = 1
    reference: bool = False
    model: str = "llama_tied"


FEATURES = {
    "ZeRO-0": Feature(zero(0)),
    "ZeRO-1": Feature(zero(1)),
    "ZeRO-2": Feature(zero(2)),
    "ZeRO-3": Feature(zero(3)),
    "pipeline": Feature(pp(2), ranks=2),
    "tensor": Feature(TP2, ranks=2),
    "sequence": Feature(SP2, ranks=2),
    "bf16": Feature(BF16, reference=True),
    "autocast": Feature({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, reference=True),
    "offload": Feature({"offload_optimizer": {"device": "cpu"}}),
    "accumulation": Feature({"train_micro_batch_size_per_gpu": 1}),
    "checkpointing": Feature(flags=("--gradient_checkpointing",)),
    "packing": Feature(flags=("--packing",), reference=True),
    "experts": Feature(model="mixtral", reference=True),
}


@dataclass(frozen=True)
class Outcome:
    """error: largest relative difference of a number or weight; None: refused, and why."""

    error: float | None
    bound: float
    text: str = ""

    @property
    def is_exact(self) -> bool:
        return self.error is not None and self.error <= self.bound

    @property
    def cell(self) -> str:
        if self.error is None:
            return "refused" if self.text else "**crash**"
        return f"{self.error:.0e}" if self.is_exact else f"**{self.error:.0e}**"


def weights_error(run: Path, reference: Path, initial: dict[str, Any] | None) -> float:
    """Of the exported weights: the largest difference in units of the largest value of its tensor; or, with `initial`,
    the length of the difference of all in units of the length of what the steps changed.

    The second is for Adam, which makes whole steps of the rounding of gradients that are zero in exact arithmetic, as
    those of GPT-2's key biases are, and for OPT, where such biases are tensors of their own.
    """
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "run" / "export" / "model.safetensors") for folder in (run, reference))
    assert ours.keys() == theirs.keys()
    differences = {name: (ours[name].float() - theirs[name].float()) for name in theirs}
    if initial is None:
        return max(float(d.abs().max() / theirs[name].abs().max()) for name, d in differences.items())
    changes = {name: theirs[name].float() - initial[name] for name in theirs}
    length, changed = (sum(float(d.square().sum()) for d in parts.values()) ** 0.5 for parts in (differences, changes))
    return length / changed


def initial_weights(model: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What every run of `model` starts from, by parameter name."""
    import torch

    from dstrain.arguments import ModelArguments, RunArguments
    from dstrain.models.build import build_model
    from dstrain.models.config import load_model_config

    (folder / "model.json").write_text(json.dumps(model))
    arguments = ModelArguments(config_name=str(folder / "model.json"))
    built = build_model(arguments, load_model_config(arguments), seed=RunArguments().seed, dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in built.named_parameters()}


class Comparison:
    """Runs under `folder`, each reference once; results in `work`, where one is named."""

    def __init__(self, folder: Path, work: Path | None):
        self.folder, self.work = folder, work
        kept = json.loads(work.read_text()) if work and work.exists() else {}
        self.found = {name: Outcome(**values) for name, values in kept.items()}
        self.references: dict[str, tuple[Path, parity.Run]] = {}

    def reference(
        self, model: dict[str, Any], config: dict[str, Any], flags: tuple[str, ...]
    ) -> tuple[Path, parity.Run]:
        key = json.dumps([model, config, flags])
        if key not in self.references:
            where = self.folder / f"reference{len(self.references)}"
            self.references[key] = where, parity.run(where, model, config, "--export", *flags)
        return self.references[key]

    def compare(self, name: str, *args: Any) -> Outcome:
        """`outcome`, once for each name."""
        if name not in self.found:
            self.found[name] = self.outcome(*args)
            print(name, self.found[name].cell, self.found[name].text[:100], flush=True)
            if self.work:
                self.work.write_text(json.dumps({name: asdict(o) for name, o in self.found.items()}, indent=1))
        return self.found[name]

    def outcome(
        self, model: dict[str, Any], config: dict[str, Any], plain: dict[str, Any], ranks: int,
        flags: tuple[str, ...] = (), plain_flags: tuple[str, ...] = (), zero_gradients: bool = False,
    ) -> Outcome:  # fmt: skip
        low = "bf16" in config or "torch_autocast" in config
        bound = 2e-2 if low else 1e-5
        where = self.folder / "run"
        shutil.rmtree(where, ignore_errors=True)
        run = parity.start(where, model, config, "--export", *flags, ranks=ranks)
        if run.exit_code != 0:
            said = [line for line in run.stderr.splitlines() if line.startswith("dstrain: error: ")]
            print(run.stderr[-1500:] if run.exit_code != 2 else "", file=sys.stderr)
            return Outcome(None, bound, "; ".join(said).replace("dstrain: error: ", "") if run.exit_code == 2 else "")
        folder, reference = self.reference(model, plain, plain_flags)
        errors = run.errors_against(reference)
        errors["grad_norm"] /= 10  # its bound is ten times wider: a norm adds up what the loss averages
        of_change = zero_gradients or config["optimizer"]["type"] == "AdamW"
        initial = initial_weights(model, self.folder) if of_change else None
        errors["weights"] = weights_error(where, folder, initial) / 10
        return Outcome(max(errors.values()), bound)


def matrix(comparison: Comparison) -> dict[str, Outcome]:
    """ "layout | model | optimizer" -> outcome."""
    found = {}
    for model in MATRIX_MODELS:
        for optimizer, config in OPTIMIZERS.items():
            plain = config | MICRO | zero(1)
            for layout, (ranks, more) in LAYOUTS.items():
                name = f"{layout} | {model} | {optimizer}"
                found[name] = comparison.compare(name, deep(model), plain | more, plain, ranks)
    return found


def staged(comparison: Comparison) -> dict[str, Outcome]:
    """ "PP2 | model type" -> outcome of two stages in two processes, in fp32 with SGD."""
    plain = SGD | MICRO | zero(1)
    found = {}
    for model_type in STAGED_TYPES:
        tiny = tiny_config(model_type).to_diff_dict() | {"vocab_size": 320, "model_type": model_type}
        model = tiny | {name: 256 for name in ("max_position_embeddings", "n_positions") if name in tiny}
        found[f"PP2 | {model_type}"] = comparison.compare(
            f"PP2 | {model_type}", model, plain | pp(2), plain, 2, (), (), model_type == "opt"
        )
    return found


def merged(*configs: dict[str, Any]) -> dict[str, Any]:
    """The configurations in one; offload goes into the ZeRO block."""
    result: dict[str, Any] = {}
    for config in configs:
        result |= config
    if offload := result.pop("offload_optimizer", None):
        result["zero_optimization"] = result.get("zero_optimization", zero(1)["zero_optimization"]) | {
            "offload_optimizer": offload
        }
    return result


def pairs(comparison: Comparison) -> dict[str, Outcome]:
    """ "feature | feature" -> outcome, at ZeRO-1 unless one of them says otherwise."""
    found = {}
    for (one, a), (two, b) in combinations(FEATURES.items(), 2):
        if one.startswith("ZeRO") and two.startswith("ZeRO"):
            continue
        both = (a, b)
        model = "mixtral" if "experts" in (one, two) else "llama_tied"
        plain = merged(SGD, MICRO, zero(1), *(f.config for f in both if f.reference))
        config = merged(SGD, MICRO, zero(1), a.config, b.config)
        flags = tuple(flag for f in both for flag in f.flags)
        plain_flags = tuple(flag for f in both if f.reference for flag in f.flags)
        ranks = max(2, a.ranks * b.ranks)
        name = f"{one} | {two}"
        found[name] = comparison.compare(name, deep(model), config, plain, ranks, flags, plain_flags)
    return found


def support_table(found: dict[str, Outcome]) -> str:
    names = list(FEATURES)
    lines = ["| | " + " | ".join(names[1:]) + " |", "|---" * len(names) + "|"]
    for i, row in enumerate(names[:-1]):
        cells = []
        for j, column in enumerate(names[1:], 1):
            outcome = found.get(f"{row} | {column}")
            state = "" if j <= i or outcome is None else "exact" if outcome.is_exact else outcome.cell
            cells.append(state)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parity_table(found: dict[str, Outcome]) -> str:
    lines = ["| model | optimizer | " + " | ".join(LAYOUTS) + " |", "|---" * (len(LAYOUTS) + 2) + "|"]
    for model in MATRIX_MODELS:
        for optimizer in OPTIMIZERS:
            cells = [found[f"{layout} | {model} | {optimizer}"].cell for layout in LAYOUTS]
            lines.append(f"| {model} | {optimizer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def refusals(found: dict[str, Outcome]) -> str:
    reasons: dict[str, list[str]] = {}
    for name, outcome in found.items():
        if outcome.error is None:
            reasons.setdefault(
                outcome.text.split(": ", 1)[-1] if ".json: " in outcome.text else outcome.text, []
            ).append(name.replace(" | ", " + "))
    return "\n".join(f"- {', '.join(names)}: {text}" for text, names in reasons.items())


def staged_table(found: dict[str, Outcome]) -> str:
    rows = [f"| {name.split(' | ')[1]} | {outcome.cell} |" for name, outcome in found.items()]
    return "\n".join(["| model type | PP2 |", "|---|---|", *rows])


def page(parts: dict[str, dict[str, Outcome]]) -> str:
    everything = [outcome for found in parts.values() for outcome in found.values()]
    ran = [outcome for outcome in everything if outcome.error is not None]
    return f"""# Parallelism, measured

Written by `python -m tests.parallel_matrix`. Each cell is a run of 20 steps compared with one rank at ZeRO-1 from the
same weights and samples: the largest relative difference of loss and held-out loss, and a tenth of that of gradient
norm and exported weights (SGD: the largest of any element, in units of its tensor's largest; AdamW and OPT: of the
change of all together). Bounds: 1e-5 in fp32, 2e-2 with bf16. Tiny models of 4 layers, CPU, gloo.

{sum(outcome.is_exact for outcome in ran)} of {len(ran)} runs within their bound; {len(everything) - len(ran)} refused.

## Models, layouts, optimizers

{parity_table(parts["matrix"])}

## More model types, two stages in two processes

fp32, SGD, clipping off. All types, cut in one process: [architectures.md](architectures.md).

{staged_table(parts["staged"])}

## Pairs of features

At ZeRO-1 where neither says otherwise, with SGD, clipping off.

{support_table(parts["pairs"])}

## What is refused, and why

{refusals(parts["matrix"] | parts["staged"] | parts["pairs"])}
"""


PARTS = {"matrix": matrix, "staged": staged, "pairs": pairs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="that part; docs/parallelism.md needs all")
    parser.add_argument("--work", type=Path, help="JSON file of the results so far")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="parallel_matrix_") as folder:
        comparison = Comparison(Path(folder), args.work)
        parts = {name: part(comparison) for name, part in PARTS.items() if args.only in (None, name)}
    if args.only is None:
        PAGE.write_text(page(parts))
    if "pairs" in parts:
        text = README.read_text()
        before, rest = text.split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n\n{support_table(parts['pairs'])}\n\n{END}{rest.split(END)[1]}")
    outcomes = {name: outcome for found in parts.values() for name, outcome in found.items()}
    bad = [name for name, o in outcomes.items() if not o.is_exact and not o.text]
    print(json.dumps({"runs": len(outcomes), "wrong": bad}))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
