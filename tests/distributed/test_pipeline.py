"""Pipeline stages in real processes against one plain rank: the same loss curve, norm and held-out loss."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.parity import ADAMW, BF16, MICRO, SGD, SGD_CLIPPED, Run, deep, run, start, thinned, zero
from tests.forked import train

# the load-balancing loss is carried along the pipe
ROUTER = {name: {"output_router_logits": True} for name in ("mixtral", "qwen3_moe")}


DUALPIPEV = {"partition": "dualpipev"}


def stages(num_stages: int, **more: Any) -> dict[str, Any]:
    return {"pipeline": {"stages": num_stages, **more}}


def model_of(name: str) -> dict[str, Any]:
    return deep(name) | ROUTER.get(name, {})


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run of one rank for a model, a configuration and flags, started once."""
    # "calm": at SGD's own rate Mixtral's late steps multiply any rounding by a thousand
    calm = SGD | {"optimizer": {"type": "SGD", "params": {"lr": 0.05}}}
    configs = {"sgd": SGD, "calm": calm, "clipped": SGD_CLIPPED, "adamw": ADAMW, "bf16": ADAMW | BF16 | zero(1)}

    @cache
    def get(model: str, config: str, *flags: str) -> tuple[Run, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(f"{model}_{config}_single")
        return run(folder, model_of(model), configs[config] | MICRO, *flags), configs[config] | MICRO

    return get


def compare(single: Any, folder: Path, model: str, config: str, more: dict, ranks: int, *flags: str, tolerance=1e-5):
    reference, values = single(model, config, *flags)
    run(folder, model_of(model), values | more, *flags, ranks=ranks).assert_equals(reference, tolerance)
    assert '"plain_loss"' not in (folder / "run" / "metrics.jsonl").read_text()  # the last stage's is fused too


NAMES = ["llama", "llama_tied", "gpt2", "qwen3", "gemma3", "mixtral", "qwen3_moe", "gpt_neox"]


@pytest.mark.parametrize("model", thinned(NAMES, "gpt2", "gemma3"))
def test_two_stages_equal_one_rank(single, tmp_path, model):
    compare(single, tmp_path, model, "sgd", stages(2) | zero(1), 2)


@pytest.mark.parametrize("model", thinned(["llama_tied", "mixtral"], "mixtral"))
def test_two_stages_times_two_replicas_equal_one_rank(single, tmp_path, model):
    compare(single, tmp_path, model, "calm", stages(2) | zero(1), 4)


@pytest.mark.parametrize("model", thinned(["llama_tied", "mixtral"], "llama_tied"))
def test_four_stages_equal_one_rank(single, tmp_path, model):
    compare(single, tmp_path, model, "sgd", stages(4) | zero(1), 4)


@pytest.mark.parametrize(
    ("config", "stage", "tolerance"),
    thinned(
        [("sgd", 0, 1e-5), ("clipped", 1, 1e-5), ("adamw", 1, 1e-5), ("bf16", 1, 2e-2)],
        *(("sgd", 0, 1e-5), ("bf16", 1, 2e-2)),
    ),
)
def test_three_stages_with_each_optimizer(single, tmp_path, config, stage, tolerance):
    compare(single, tmp_path, "llama_tied", config, stages(3) | zero(stage), 3, tolerance=tolerance)


SCHEDULES = pytest.mark.parametrize(
    "more", [{}, pytest.param(DUALPIPEV, marks=pytest.mark.exhaustive)], ids=["1f1b", "dualpipev"]
)


@SCHEDULES
@pytest.mark.parametrize("flag", ["--gradient_checkpointing", "--packing"])
def test_checkpointing_and_packed_documents(single, tmp_path, flag, more):
    compare(single, tmp_path, "llama", "sgd", stages(2, **more) | zero(1), 2, flag)


@SCHEDULES
def test_padded_micro_batches_of_many_lengths(single, tmp_path, more):
    rows = [{"prompt": f"Count to {n}:", "completion": " ".join(map(str, range(n % 9)))} for n in range(1, 200)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare(single, tmp_path / "run", "llama", "sgd", stages(2, **more) | zero(1), 2, "--train_file", str(file))


@SCHEDULES
def test_optimizer_offload(single, tmp_path, more):
    offloaded = zero(1, offload_optimizer={"device": "cpu"})
    compare(single, tmp_path, "llama_tied", "sgd", stages(2, **more) | offloaded, 2)


def test_a_pretrained_model_continues_from_its_own_loss(tmp_path, shared_data):
    """15 M parameters in bf16, tied, published at 1.153 on these stories."""
    losses = []
    for ranks, more in ((1, {}), (2, stages(2))):
        config = tmp_path / f"ds{ranks}.json"
        values = {
            "train_batch_size": 8,
            "optimizer": {"type": "SGD", "params": {"lr": 1e-5}},
            **BF16,
            **zero(1),
            **MICRO,
        }
        config.write_text(json.dumps(values | {"zero_allow_untested_optimizer": True} | more))
        flags = ["--model_name_or_path", shared_data / "models" / "stories15M-hf-bf16", "--deepspeed_config", config]
        flags += ["--train_file", shared_data / "tinystories_sample.parquet", "--max_train_samples", 400]
        flags += ["--max_steps", 4, "--block_size", 256, "--max_eval_batches", 2, "--save_steps", 0]
        losses.append(train(tmp_path / f"run{ranks}", *flags, ranks=ranks).check().losses())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert 0.9 < sum(losses[1]) / 4 < 1.5


@pytest.mark.parametrize("model", thinned(NAMES, "llama_tied"))
def test_dualpipev_equals_one_rank(single, tmp_path, model):
    """Four stages, two a rank; ends and beginnings of tied models on one rank."""
    compare(single, tmp_path, model, "sgd", stages(2, **DUALPIPEV) | zero(1), 2)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("config", "stage", "tolerance"), [("sgd", 0, 1e-5), ("clipped", 1, 1e-5), ("adamw", 1, 1e-5), ("bf16", 1, 2e-2)]
)
def test_dualpipev_with_each_optimizer(single, tmp_path, config, stage, tolerance):
    compare(single, tmp_path, "gpt2", config, stages(2, **DUALPIPEV) | zero(stage), 2, tolerance=tolerance)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("num_stages", "ranks"), [(2, 4), (3, 3)])
def test_dualpipev_over_more_ranks(tmp_path, num_stages, ranks):
    config, model = SGD | {"train_micro_batch_size_per_gpu": 1}, model_of("mixtral") | {"num_hidden_layers": 6}
    reference = run(tmp_path / "one", model, config)
    parallel = run(tmp_path / "more", model, config | stages(num_stages, **DUALPIPEV) | zero(1), ranks=ranks)
    parallel.assert_equals(reference)


def test_a_model_that_is_no_chain_is_refused(tmp_path):
    xlm = {"model_type": "xlm", "emb_dim": 32, "n_layers": 4, "n_heads": 4, "vocab_size": 320}
    result = start(tmp_path, xlm, SGD | MICRO | stages(2) | zero(1), ranks=2)
    assert result.exit_code == 2
    assert "cannot be cut into 2 stages: layer 3 reads what layer 0 made" in result.stderr
    assert "use ZeRO instead" in result.stderr
