"""The suites: which cases are measured together. Pure functions, so that a test can look at every case."""

from collections.abc import Callable
from typing import Any

from benchmarks.cases import (
    DEEP,
    LLAMA_1_3B,
    LLAMA_8B,
    LLAMA_10M,
    LLAMA_10M_32K,
    LLAMA_38M,
    LLAMA_125M,
    LLAMA_350M,
    TINY,
    Case,
    Suite,
    deepspeed_json,
)

NVME = (
    "zero_optimization.offload_optimizer.nvme_path={folder}/nvme",
    "zero_optimization.offload_param.nvme_path={folder}/nvme",
)
WAYS = (
    "zero0",
    "zero1",
    "zero2",
    "zero3",
    "zero2_offload_cpu",
    "zero3_offload_cpu",
    "zero3_offload_nvme",
    "pp2_zero1",
    "tp2_zero1",
    "sp2_zero3",
)


TINY_JSON = deepspeed_json(2, batch=8, micro=4)


def quick() -> Suite:
    """Seconds a case: what CI runs. One of each kind, a refusal among them."""
    common: dict[str, Any] = {"model": TINY, "block_size": 64, "max_steps": 7, "warmup_steps": 3}
    return Suite(
        "quick",
        "a tiny model, one case of each kind: whether the suite works",
        (
            Case("tiny zero2", ds_config=TINY_JSON, turn="tiny", **common),
            Case("tiny ddp", ds_config=TINY_JSON, program="ddp", turn="tiny", baseline="tiny zero2", **common),
            Case("tiny pp2", ds_config="pp2_zero1.json", **common),
            Case("tiny refused", ds_config="zero2.json", overrides=("zero_optimization.stage=7",), **common),
        ),
    )


def cpu() -> Suite:
    """Every shipped way of training that two CPU ranks can take, with a small and a large vocabulary."""
    return Suite(
        "cpu",
        "a Llama with 10 M parameters in its layers under every way of training, 2 ranks of one thread",
        tuple(
            Case(
                f"{size} {way}",
                model=model,
                ds_config=f"{way}.json",
                overrides=NVME if way.endswith("nvme") else (),
                max_steps=7,
                profile=size == "vocab512",  # the way decides where time goes and what is sent
            )
            for size, model in (("vocab512", LLAMA_10M), ("vocab32000", LLAMA_10M_32K))
            for way in WAYS
        ),
    )


def prediction() -> Suite:
    """The planner's cases: every file of ds_configs/ that two CPU ranks run, and checkpointing, fp32, accumulation."""
    fp32: dict[str, Any] = {"overrides": ("bf16.enabled=false",)}
    checkpointing: dict[str, Any] = {"flags": ("--gradient_checkpointing",)}
    more = ("zero3_torch_autocast", "tp2_zero2", "sp2_zero1")
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        **{way: (way, {"overrides": NVME} if way.endswith("nvme") else {}) for way in (*WAYS, *more)},
        **{f"zero{stage}_fp32": (f"zero{stage}", fp32) for stage in (1, 2, 3)},
        **{f"zero{stage}_checkpointing": (f"zero{stage}", checkpointing) for stage in (2, 3)},
        "zero2_accumulation": ("zero2", {"overrides": ("gradient_accumulation_steps=4",)}),
    }
    return Suite(
        "prediction",
        "what the planner says against what runs use: 10 M Llama, blocks of 512, 2 ranks of one thread",
        tuple(
            Case(
                f"{size} {name}",
                model=model,
                ds_config=f"{way}.json",
                block_size=512,
                max_steps=7,
                profile=False,
                **changes,
            )
            for size, model in (("vocab512", LLAMA_10M), ("vocab32000", LLAMA_10M_32K))
            for name, (way, changes) in cases.items()
        ),
    )


def scaling() -> Suite:
    """1, 2, 4 ranks: the same global batch (strong), and a global batch that grows with the ranks (weak)."""
    workers = (1, 2, 4)
    cases = []
    for kind, batch_of in (("strong", lambda n: 16), ("weak", lambda n: 4 * n)):
        cases += [
            Case(
                f"{kind} {n}",
                model=LLAMA_10M,
                ds_config=deepspeed_json(2, batch=batch_of(n), micro=4),
                processes=n,
                max_steps=7,
                turn=kind,
                rounds=3,
                series=kind,
                profile=False,
            )
            for n in workers
        ]
    return Suite("scaling", "tokens/s over 1, 2 and 4 ranks of one thread, ZeRO-2", tuple(cases))


def pipeline() -> Suite:
    """Two stages against the whole model on one rank. Ideal of p stages, m micro-batches: (m + p - 1) / (m p)."""
    cases, stages = [], 2
    for m in (4, 8, 16):
        config = deepspeed_json(1, batch=4 * m, micro=4, precision="fp32")
        common: dict[str, Any] = {
            "model": DEEP,
            "max_steps": 6,
            "warmup_steps": 2,
            "turn": f"micro-batches {m}",
            "rounds": 2,
            "profile": False,
        }
        cases += [
            Case(f"one rank, {m} micro-batches", ds_config=config, processes=1, **common),
            Case(
                f"2 stages, {m} micro-batches",
                ds_config=config | {"pipeline": {"stages": stages}},
                processes=stages,
                baseline=f"one rank, {m} micro-batches",
                ideal=(m + stages - 1) / (m * stages),
                **common,
            ),
        ]
    return Suite("pipeline", "the 1F1B schedule: 2 stages against the whole model on one rank, fp32", tuple(cases))


def peers() -> Suite:
    """Other trainers on the same model, samples, initial weights, global batch and precision, in turns."""
    cases = []
    both, small = (("vocab512", LLAMA_10M), ("vocab32000", LLAMA_10M_32K)), (("vocab512", LLAMA_10M),)
    settings: tuple[tuple[str, int, int, int, tuple, tuple[str, ...]], ...] = (
        ("bf16", 2, 2, 8, both, ("hf_trainer", "fsdp2", "ddp")),
        ("fp32", 0, 2, 2, both, ("ddp",)),
        ("fp32", 0, 1, 2, small, ("plain",)),
    )
    for precision, stage, processes, micro, models, others in settings:
        for size, model in models:
            turn = f"{size} {precision} zero{stage}, {processes} rank{'s' if processes > 1 else ''}"
            common: dict[str, Any] = {
                "model": model,
                "ds_config": deepspeed_json(stage, batch=micro * processes, micro=micro, precision=precision),
                "processes": processes,
                "block_size": 512,
                "max_steps": 7,
                "turn": turn,
                "rounds": 3,
                "profile": False,
            }
            ours = f"{turn}: dstrain"
            cases.append(Case(ours, **common))
            cases += [Case(f"{turn}: {peer}", program=peer, baseline=ours, **common) for peer in others]
            if (precision, size) == ("bf16", "vocab512"):
                cases.append(Case(f"{turn}: dstrain compiled", flags=("--compile",), baseline=ours, **common))
    return Suite(
        "peers", "other trainers on the same model, tokens, global batch and precision, in turns", tuple(cases)
    )


def sequence() -> Suite:
    """Twice the sequence until memory ends: 1.75 GiB of data a process."""
    ways = {
        "plain": ({}, ()),
        "checkpointing": ({}, ("--gradient_checkpointing", "--tiled_mlp")),
        "ulysses": ({"sequence_parallel_size": 2}, ("--gradient_checkpointing", "--tiled_mlp")),
    }
    cases = []
    for way, (blocks, flags) in ways.items():
        before = None
        for length in (1024, 2048, 4096, 8192):
            name = f"{way} {length}"
            batch = 1 if blocks else 2
            cases.append(
                Case(
                    name,
                    model=LLAMA_10M_32K,
                    ds_config=deepspeed_json(3, batch=batch, micro=1, **blocks),
                    block_size=length,
                    flags=flags,
                    max_steps=3,
                    warmup_steps=1,
                    series=way,
                    after=before,
                    memory_limit_gib=1.75,
                    profile=False,
                )
            )
            before = name
    return Suite("sequence", "the longest sequence in 1.75 GiB of data a process, ZeRO-3, 2 ranks", tuple(cases))


def checkpoint() -> Suite:
    """Saves while training: how long a step stands still, how fast bytes reach the disk, what goes on is worth."""
    return Suite(
        "checkpoint",
        "a save every 4 steps of a Llama of 38 M: stall, write rate, goodput",
        tuple(
            Case(
                f"saves {way}",
                model=LLAMA_38M,
                ds_config=f"{way}.json",
                flags=("--save_steps", "4", "--save_total_limit", "2"),
                max_steps=12,
                block_size=128,
                profile=False,
            )
            for way in ("zero1", "zero2", "zero3", "pp2_zero1")
        ),
    )


def loader() -> Suite:
    """Tokens/s of tokenizing, packing and loading, one process."""
    return Suite(
        "loader",
        "tokens/s of tokenizing, packing and loading the built-in corpus, one process",
        (Case("built-in corpus", TINY, "zero0.json", processes=1, program="loader", block_size=512, profile=False),),
    )


def gpu() -> Suite:
    """One device, ten minutes in all. Timeouts keep it there where a device is slower than thought."""
    common: dict[str, Any] = {"processes": 1, "max_steps": 10, "warmup_steps": 4, "timeout_s": 90.0}
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}

    def case(name: str, model: Any, length: int, batch: int, stage: int = 1, **more: Any) -> Case:
        precision, zero = more.pop("precision", "bf16"), more.pop("zero", {})
        config = deepspeed_json(stage, batch=batch, micro=batch, precision=precision, zero=zero)
        return Case(name, model, config, block_size=length, **{**common, "profile": False, **more})

    long, checkpointing = "1.3B bf16 4k", ("--gradient_checkpointing",)
    trainer = {"baseline": long, "turn": "1.3B"}
    return Suite(
        "gpu",
        "one device: 125 M to 8 B parameters, precisions, sequence lengths, checkpointing, compile, Trainer",
        (
            case("125M bf16 2k", LLAMA_125M, 2048, 16),
            case("125M fp16 2k", LLAMA_125M, 2048, 16, precision="fp16", baseline="125M bf16 2k"),
            case("350M bf16 2k", LLAMA_350M, 2048, 8),
            case("350M bf16 2k compiled", LLAMA_350M, 2048, 8, flags=("--compile",), baseline="350M bf16 2k"),
            case(long, LLAMA_1_3B, 4096, 4, profile=True, turn="1.3B", rounds=2),
            case("1.3B bf16 4k trainer liger", LLAMA_1_3B, 4096, 4, **trainer, program="hf_trainer_liger", rounds=2),
            case("1.3B bf16 4k trainer", LLAMA_1_3B, 4096, 4, **trainer, program="hf_trainer"),
            case("1.3B bf16 4k checkpointing", LLAMA_1_3B, 4096, 4, flags=checkpointing, baseline=long),
            case("1.3B bf16 8k checkpointing", LLAMA_1_3B, 8192, 2, flags=checkpointing),
            case("8B bf16 8k zero3 offload", LLAMA_8B, 8192, 1, 3, flags=checkpointing, zero=offload, timeout_s=180.0),
        ),
        gpus=1,
    )


SUITES: dict[str, Callable[[], Suite]] = {
    suite.__name__: suite
    for suite in (quick, cpu, prediction, scaling, pipeline, peers, sequence, checkpoint, loader, gpu)
}
