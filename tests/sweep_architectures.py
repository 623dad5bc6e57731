"""Cut every causal-LM model type of the installed transformers into pipeline stages and compare with the whole model.

    python -m tests.sweep_architectures            # all types, 2 and 3 stages; writes docs/architectures.md
    python -m tests.sweep_architectures --types llama,gpt2 --stages 2

One process per type: a tiny random model in fp32, planned on meta as in training, each stage with its own parameters
only, hidden states and gradients handed over as the pipe engine does. The last line is JSON.
"""

import argparse
import copy
import json
import multiprocessing
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from dstrain.models.pipeline import PipelinePlan, plan_stages
from dstrain.models.pipeline_graph import NotAChainError
from dstrain.models.pipeline_probe import PROBE_BATCH, PROBE_LENGTH, probe_layers
from dstrain.models.stage import Stage
from tests.architectures import KNOWN, model_types, tiny_inputs, tiny_model

TABLE = Path(__file__).parents[1] / "docs" / "architectures.md"
BOUND, LIMIT_S = 1e-5, 60.0


@dataclass(frozen=True)
class Outcome:
    """One type at one number of stages. Errors are relative to the largest value of the tensor compared."""

    model_type: str
    num_stages: int
    exact: bool
    reason: str = ""
    logits_error: float = 0.0
    loss_error: float = 0.0
    grad_error: float = 0.0
    wall_s: float = 0.0


def relative_error(value: Tensor | None, reference: Tensor | None, floor: float = 0.0) -> float:
    if value is None and reference is None:
        return 0.0
    if value is None or reference is None:
        return float((value if reference is None else reference).abs().max())
    if not (value.isfinite().all() and reference.isfinite().all()):
        return float("inf")
    scale = max(float(reference.abs().max()), floor)
    return float((value - reference).abs().max()) / scale if scale else float(value.abs().max())


def _loss(output, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own loss where it got labels."""
    if "labels" in inputs:
        return output.loss
    return nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())


def run_stages(stages: list[Stage], inputs: dict[str, Tensor]):
    """Forward and backward through all stages as the pipe engine does. Returns the model's output of the last stage."""
    received: list[tuple[Tensor, ...]] = [()]
    sent: list[tuple[Tensor, ...]] = []
    for stage in stages[:-1]:
        sent.append(stage.run(received[-1], **inputs))
        received.append(tuple(t.detach().requires_grad_(t.is_floating_point()) for t in sent[-1]))
    output = stages[-1].run(received[-1], **inputs)
    _loss(output, inputs).backward()
    for outputs, inputs_of_next in zip(reversed(sent), reversed(received), strict=False):
        pairs = [
            (o, i.grad) for o, i in zip(outputs, inputs_of_next, strict=True) if i.grad is not None and o.requires_grad
        ]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    return output


def gradients(stages: list[Stage]) -> dict[str, Tensor]:
    """Gradients by the model's own names; copies of a tied parameter are summed."""
    total: dict[str, Tensor] = {}
    for stage in stages:
        for name, p in stage.model.named_parameters():
            if p.grad is not None:
                total[name] = total[name] + p.grad if name in total else p.grad
    return total


def compare(model: nn.Module, plan: PipelinePlan, inputs: dict[str, Tensor]) -> tuple[float, float, float]:
    """Errors of logits, loss and gradients of the model cut by `plan`, against `model` itself."""
    whole = copy.deepcopy(model)
    torch.manual_seed(0)
    expected = whole(**inputs)
    expected_loss = _loss(expected, inputs)
    expected_loss.backward()
    stages = [Stage(copy.deepcopy(model), plan, k) for k in range(plan.num_stages)]
    torch.manual_seed(0)
    output = run_stages(stages, inputs)
    found = gradients(stages)
    reference = {name: p.grad for name, p in whole.named_parameters()}
    held = {name for stage in stages for name, _ in stage.model.named_parameters()}
    assert held == reference.keys(), f"parameters of no stage: {sorted(reference.keys() - held)[:3]}"
    largest = max(float(g.abs().max()) for g in reference.values() if g is not None)
    worst = max(relative_error(found.get(name), g, floor=1e-3 * largest) for name, g in reference.items())
    return (
        relative_error(output.logits.detach(), expected.logits.detach()),
        relative_error(_loss(output, inputs).detach(), expected_loss.detach()),
        worst,
    )


def examine(model_type: str, stages: list[int]) -> list[Outcome]:
    started = time.perf_counter()
    try:
        meta = tiny_model(model_type, device="meta")
        model, inputs = tiny_model(model_type), tiny_inputs(model_type)
        graph = probe_layers(meta, tiny_inputs(model_type, PROBE_BATCH, PROBE_LENGTH))
    except Exception as error:
        reason = f"{KNOWN[model_type]} ({_reason(error)})" if model_type in KNOWN else _reason(error)
        return [Outcome(model_type, n, False, reason, wall_s=time.perf_counter() - started) for n in stages]
    outcomes = []
    for num_stages in stages:
        errors, reason = (0.0, 0.0, 0.0), ""
        try:
            errors = compare(model, plan_stages(meta, graph, num_stages), inputs)
            reason = "" if max(errors) <= BOUND else "differs"
        except Exception as error:
            reason = _reason(error)
        wall_s, started = time.perf_counter() - started, time.perf_counter()
        outcomes.append(Outcome(model_type, num_stages, not reason, reason, *errors, wall_s=wall_s))
    return outcomes


def _reason(error: Exception) -> str:
    kind = "refused" if isinstance(error, NotAChainError) else type(error).__name__
    return " ".join(f"{kind}: {error}".split())[:300]


def _child(connection, model_type: str, stages: list[int]) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    connection.send(examine(model_type, stages))


def examine_apart(model_type: str, stages: list[int]) -> list[Outcome]:
    """`examine` in a process of its own: a crash or a hang of one type is that type's result."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, model_type, stages))
    process.start()
    sender.close()
    try:
        if receiver.poll(LIMIT_S):
            return receiver.recv()
        reason = f"took more than {LIMIT_S:.0f} s"
    except EOFError:
        process.join()
        reason = f"the process ended with code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return [Outcome(model_type, n, False, reason) for n in stages]


def write_table(outcomes: list[Outcome], stages: list[int], path: Path) -> None:
    by_type: dict[str, dict[int, Outcome]] = {}
    for outcome in outcomes:
        by_type.setdefault(outcome.model_type, {})[outcome.num_stages] = outcome
    exact = sum(all(o.exact for o in found.values()) for found in by_type.values())
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    cut = " and ".join(map(str, stages))
    lines = [
        "# Which models the pipeline can cut",
        "",
        f"Written by `python -m tests.sweep_architectures` ({versions}).",
        f"{exact} of {len(by_type)} causal-LM model types give, cut into {cut} stages, the loss, logits and all",
        f"gradients of the whole model (fp32; largest error at most {BOUND:g} of the tensor's largest value).",
        "",
        "| model type | " + " | ".join(f"{n} stages" for n in stages) + " | logits error | gradient error | reason |",
        "|---|" + "---|" * (len(stages) + 3),
    ]
    for model_type, found in by_type.items():
        cells = ["exact" if found[n].exact else "no" for n in stages]
        ran = [o for o in found.values() if o.exact or o.reason == "differs"]
        errors = [f"{max(getattr(o, key) for o in ran):.1e}" if ran else "" for key in ("logits_error", "grad_error")]
        reasons = dict.fromkeys(o.reason for o in found.values() if o.reason)
        lines.append("| " + " | ".join([model_type, *cells, *errors, "; ".join(reasons).replace("|", "/")]) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="comma-separated model types (default: all, and the table is written)")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--output", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    chosen = arguments.types.split(",") if arguments.types else model_types()
    torch.set_num_threads(1)
    probe_layers(tiny_model("llama", device="meta"))  # what torch imports on first use is then there in every fork
    outcomes = []
    for model_type in chosen:
        for o in examine_apart(model_type, arguments.stages):
            outcomes.append(o)
            verdict = "exact" if o.exact else f"NO ({o.reason})"
            print(f"{o.model_type} x{o.num_stages}: {verdict} logits {o.logits_error:.1e} loss {o.loss_error:.1e} "
                  f"grad {o.grad_error:.1e} {o.wall_s:.1f} s", flush=True)  # fmt: skip
    output = arguments.output or (TABLE if not arguments.types else None)
    if output:
        write_table(outcomes, arguments.stages, output)
    failed = sorted({o.model_type for o in outcomes if not o.exact})
    print(json.dumps({"types": len(chosen), "exact": len(chosen) - len(failed), "not_exact": failed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
