"""Every ZeRO stage, offload, rank count and accumulation gives the loss curve of plain torch in one process.

SGD with clipping off shows what Adam and clipping hide: a gradient that is too large by a factor. The rows are padded
and carry unequal numbers of label tokens, so a mean of means would show.
"""

import json
from pathlib import Path

import pytest

from dstrain.arguments import DataArguments, ModelArguments
from dstrain.config import resolve_config
from tests.distributed import parity

COSINE = {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 20, "warmup_num_steps": 5}}}
# A larger step lets rounding grow past the tolerance within 20 steps, whatever the engine.
SGD = parity.SGD | {"optimizer": {"type": "SGD", "params": {"lr": 0.03}}}
OPTIMIZERS = {"sgd": SGD, "adamw": parity.ADAMW | COSINE}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """96 prompt-completion rows of 8 to 60 bytes, of which between a tenth and nine tenths carry loss."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away"]
    with path.open("w") as file:
        for i in range(96):
            text = " ".join(words[(i * 7 + k) % len(words)] for k in range(2 + i % 9))
            cut = max(1, len(text) * (1 + i % 9) // 10)
            file.write(json.dumps({"prompt": text[:cut], "completion": text[cut:] or "."}) + "\n")
    return path


def plain_run(model: dict, config: dict, rows: Path, folder: Path, micro_batch: int = 8) -> parity.Run:
    """The same steps by `PlainEngine`, from the same weights and samples."""
    import torch

    from dstrain.data import build_data, build_loader, build_tokenizer, eval_batches
    from dstrain.models.build import build_model, load_model_config
    from dstrain.plain import PlainEngine

    (folder / "model.json").write_text(json.dumps(model))
    margs = ModelArguments(config_name=str(folder / "model.json"))
    resolved = resolve_config(config, world_size=1).with_total_steps(parity.STEPS)
    torch.manual_seed(0)
    built = build_model(margs, load_model_config(margs), seed=42, dtype=torch.float32)
    data = build_data(
        DataArguments(train_file=[str(rows)]),
        build_tokenizer("bytes"),
        seed=42,
        block_size=64,
        is_main_per_host=True,
        barrier=lambda: None,
    )
    split = {"global_batch": resolved.global_batch, "micro_batch": micro_batch, "dp_rank": 0, "dp_size": 1}
    engine, lines = PlainEngine(built, resolved), []
    with build_loader(data.train, seed=42, **split) as loader:
        for step in range(1, parity.STEPS + 1):
            result = engine.train_batch(next(loader))
            numbers = {
                name: float(getattr(result, name)) for name in ("loss", "grad_norm", "tokens", "tokens_processed")
            }
            lines.append({"step": step, "learning_rate": result.learning_rate, **numbers})
    sums = [engine.eval_batch(batches) for batches in eval_batches(data.validation, max_batches=2, **split)]
    loss = sum(float(s) for s, _ in sums) / sum(float(n) for _, n in sums)
    return parity.Run(0, "", lines, [{"loss": loss}])


@pytest.fixture(scope="module")
def plain_runs(rows, tmp_path_factory) -> dict[str, parity.Run]:
    return {
        name: plain_run(parity.LLAMA, config, rows, tmp_path_factory.mktemp("plain"))
        for name, config in OPTIMIZERS.items()
    }


def offload(device: str, folder: Path) -> dict:
    return {"device": device, **({"nvme_path": str(folder)} if device == "nvme" else {})}


CASES = [
    (f"zero{stage}_x{ranks}_acc{accumulation}", stage, ranks, accumulation, None)
    for stage in range(4)
    for ranks, accumulation in ((1, 1), (1, 4), (2, 1), (2, 4), (4, 1))
] + [
    (f"zero{stage}_{device}_x2", stage, 2, 2, device)
    for stage, device in ((1, "cpu"), (2, "cpu"), (3, "cpu"), (3, "nvme"))
]
SGD_KEPT = [c for c in CASES if c[0].endswith("_x2_acc4") or c[0] in ("zero0_x1_acc4", "zero3_x4_acc1")]
ADAMW_KEPT = [c for c in CASES if c[0] in ("zero1_x2_acc4", "zero2_cpu_x2", "zero3_cpu_x2")]
MATRIX = [(*case, optimizer) for optimizer in OPTIMIZERS for case in CASES]
KEPT = [(*case, "sgd") for case in SGD_KEPT] + [(*case, "adamw") for case in ADAMW_KEPT]


@pytest.mark.parametrize(
    ("name", "stage", "ranks", "accumulation", "device", "optimizer"), parity.thinned(MATRIX, *KEPT)
)
def test_equals_plain_torch(name, stage, ranks, accumulation, device, optimizer, plain_runs, rows, tmp_path, request):
    if device == "nvme":
        request.getfixturevalue("libaio")
    more = {}
    if device:
        more["offload_optimizer"] = offload(device, tmp_path)
        if stage == 3:
            more["offload_param"] = offload(device, tmp_path)
    config = OPTIMIZERS[optimizer] | parity.zero(stage, **more) | {"gradient_accumulation_steps": accumulation}
    run = parity.run(tmp_path / "x", parity.LLAMA, config, "--train_file", str(rows), ranks=ranks)
    run.assert_equals(plain_runs[optimizer], TOLERANCE)
    for ours, theirs in zip(run.train, plain_runs[optimizer].train, strict=True):
        assert ours["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-12)


def test_every_case_is_there():
    assert (len(MATRIX), len(KEPT)) == (2 * (4 * 5 + 4), 6 + 3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("ranks", [2, 4])
def test_hpz_equals_plain_torch(ranks, plain_runs, rows, tmp_path):
    """A second copy of the parts for every two ranks, of which all passes but the first of a step are gathered."""
    more = {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    config = OPTIMIZERS["adamw"] | parity.zero(3, **more) | {"gradient_accumulation_steps": 2}
    run = parity.run(tmp_path / "x", parity.LLAMA, config, "--train_file", str(rows), ranks=ranks)
    run.assert_equals(plain_runs["adamw"], TOLERANCE)


# At stage 0 bf16 runs as stage 1: DeepSpeed's numbers are wrong there.
@pytest.mark.parametrize("stage", parity.thinned(range(4), 0, 3))
def test_bf16_stays_near_plain_fp32(stage, rows, tmp_path, tmp_path_factory):
    plain = plain_run(parity.LLAMA, SGD, rows, tmp_path_factory.mktemp("plain"))
    config = SGD | parity.BF16 | parity.zero(stage)
    run = parity.run(tmp_path / "x", parity.LLAMA, config, "--train_file", str(rows), ranks=2)
    errors = run.errors_against(plain)
    assert errors["loss"] <= 2e-2, errors
