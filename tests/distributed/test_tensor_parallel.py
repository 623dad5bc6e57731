"""Tensor parallelism (AutoTP) gives the numbers of one rank: losses, gradient norms and held-out loss over 20 steps."""

import json

import pytest

from tests.distributed.parity import (
    ADAMW,
    BF16,
    CLIPPED_AND_ADAMW,
    LLAMA,
    MODELS,
    SGD,
    SGD_CLIPPED,
    Baselines,
    run,
    start,
    thinned,
    zero,
)

TP2 = {"tensor_parallel": {"autotp_size": 2}}
SGD_CASES = [("llama", stage) for stage in (0, 1, 2, 3)] + [("llama_tied", 1), ("llama_tied", 3), ("qwen3", 2)]
SGD_CASES += [("gemma3", 1), ("gpt_neox", 1), ("llama_one_kv_head", 1), ("mixtral", 1), ("qwen3_moe", 3)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Baselines:
    return Baselines(tmp_path_factory.mktemp("one_rank"))


KEPT = [("llama", 1), ("llama", 3), ("gemma3", 1), ("mixtral", 1)]


@pytest.mark.parametrize(("model", "stage"), thinned(SGD_CASES, *KEPT))
def test_sgd_without_clipping(one_rank, tmp_path, model, stage):
    run(tmp_path, MODELS[model], SGD | TP2 | zero(stage), ranks=2).assert_equals(one_rank(MODELS[model], SGD))


@pytest.mark.parametrize(("optimizer", "stage"), CLIPPED_AND_ADAMW)
def test_clipping_and_adamw(one_rank, tmp_path, optimizer, stage):
    model, config = MODELS["qwen3"], {"clipped": SGD_CLIPPED, "adamw": ADAMW}[optimizer]
    run(tmp_path, model, config | TP2 | zero(stage), ranks=2).assert_equals(one_rank(model, config))


@pytest.mark.parametrize("stage", thinned([1, 2, 3], 1))
def test_bf16(one_rank, tmp_path, stage):
    config = ADAMW | BF16
    run(tmp_path, LLAMA, config | TP2 | zero(stage), ranks=2).assert_equals(one_rank(LLAMA, config), 2e-2)


@pytest.mark.parametrize("stage", thinned([0, 1, 2, 3], 3))
def test_with_data_parallel_ranks(one_rank, tmp_path, stage):
    model = MODELS["llama_tied"]
    run(tmp_path, model, SGD_CLIPPED | TP2 | zero(stage), ranks=4).assert_equals(one_rank(model, SGD_CLIPPED))


def test_accumulation_and_padding(one_rank, tmp_path):
    """Micro-batches with different numbers of label tokens."""
    flags = ("--train_file", _uneven_lines(tmp_path), "--block_size", "64")
    config = SGD | {"train_micro_batch_size_per_gpu": 2}
    run(tmp_path / "tp", LLAMA, config | TP2, *flags, ranks=2).assert_equals(one_rank(LLAMA, SGD, *flags))


@pytest.mark.parametrize(("heads", "kv_heads"), thinned([(6, 3), (8, 1), (3, 3)], (6, 3)))
def test_heads_that_do_not_divide_evenly(one_rank, tmp_path, heads, kv_heads):
    model = LLAMA | {"hidden_size": 96, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    run(tmp_path, model, SGD | TP2, ranks=2).assert_equals(one_rank(model, SGD))


def test_vocabulary_that_does_not_divide_evenly(one_rank, tmp_path):
    model = LLAMA | {"vocab_size": 321}
    run(tmp_path, model, SGD | TP2, ranks=2).assert_equals(one_rank(model, SGD))


def test_a_model_without_a_plan_is_refused(tmp_path):
    result = start(tmp_path, MODELS["gpt2"], SGD | TP2, ranks=2)
    assert result.exit_code == 2
    assert "the tensor-parallel plan of gpt2 is missing in transformers" in result.stderr


def _uneven_lines(folder) -> str:
    path = folder / "lines.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": f"p {i}", "completion": "word " * (1 + i % 11)}) for i in range(64))
    )
    return str(path)
