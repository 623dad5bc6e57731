"""Sequence parallelism (Ulysses) gives the numbers of one rank over 20 steps: losses, gradient norms, held-out loss."""

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

SP2 = {"sequence_parallel_size": 2}
SGD_CASES = [("llama", stage) for stage in (0, 1, 2, 3)] + [("llama_tied", 1), ("llama_tied", 3), ("qwen3", 2)]
# gemma3 has sliding windows of 16 in blocks of 64: the mask is dstrain's own
SGD_CASES += [("gemma3", 1), ("gemma3", 3), ("gpt_neox", 1), ("gpt2", 1), ("llama_one_kv_head", 1)]
SGD_CASES += [("mixtral", 1), ("qwen3_moe", 3)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Baselines:
    return Baselines(tmp_path_factory.mktemp("one_rank"))


KEPT = [("llama", 1), ("llama", 3), ("gemma3", 1), ("gpt2", 1), ("qwen3_moe", 3)]


@pytest.mark.parametrize(("model", "stage"), thinned(SGD_CASES, *KEPT))
def test_sgd_without_clipping(one_rank, tmp_path, model, stage):
    run(tmp_path, MODELS[model], SGD | SP2 | zero(stage), ranks=2).assert_equals(one_rank(MODELS[model], SGD))


@pytest.mark.parametrize(("optimizer", "stage"), CLIPPED_AND_ADAMW)
def test_clipping_and_adamw(one_rank, tmp_path, optimizer, stage):
    model, config = MODELS["qwen3"], {"clipped": SGD_CLIPPED, "adamw": ADAMW}[optimizer]
    run(tmp_path, model, config | SP2 | zero(stage), ranks=2).assert_equals(one_rank(model, config))


@pytest.mark.parametrize("stage", thinned([1, 2, 3], 3))
def test_bf16(one_rank, tmp_path, stage):
    config = ADAMW | BF16
    run(tmp_path, LLAMA, config | SP2 | zero(stage), ranks=2).assert_equals(one_rank(LLAMA, config), 2e-2)


@pytest.mark.parametrize("stage", thinned([0, 1, 2, 3], 3))
def test_with_data_parallel_ranks(one_rank, tmp_path, stage):
    run(tmp_path, LLAMA, SGD | SP2 | zero(stage), ranks=4).assert_equals(one_rank(LLAMA, SGD))


@pytest.mark.parametrize("model", thinned(["llama", "gemma3"], "gemma3"))
def test_packed_documents(one_rank, tmp_path, model):
    """Documents of several lengths in one row, cut anywhere by the ranks."""
    path = tmp_path / "lines.txt"
    path.write_text("\n".join("word " * (1 + i % 17) for i in range(400)))
    flags = ("--train_file", str(path), "--packing", "--block_size", "50")
    parallel = run(tmp_path / "sp", MODELS[model], SGD | SP2, *flags, ranks=2)
    parallel.assert_equals(one_rank(MODELS[model], SGD, *flags))


def test_accumulation_padding_and_lengths_that_do_not_divide(one_rank, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": f"p {i}", "completion": "word " * (1 + i % 11)}) for i in range(64))
    )
    flags = ("--train_file", str(path), "--block_size", "61")
    config = SGD | {"train_micro_batch_size_per_gpu": 2}
    run(tmp_path / "sp", LLAMA, config | SP2, *flags, ranks=2).assert_equals(one_rank(LLAMA, SGD, *flags))


@pytest.mark.parametrize("stage", thinned([1, 3], 1))
def test_checkpointed_activations(one_rank, tmp_path, stage):
    parallel = run(tmp_path, LLAMA, SGD | SP2 | zero(stage), "--gradient_checkpointing", ranks=2)
    parallel.assert_equals(one_rank(LLAMA, SGD))


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        (LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 96}, (), "3 attention heads"),
        (LLAMA, ("--attn_implementation", "eager"), "needs sdpa or flash attention"),
        (MODELS["mixtral"] | {"output_router_logits": True}, (), "set output_router_logits=false"),
    ],
    ids=["heads", "eager", "router loss"],
)
def test_refused(tmp_path, model, flags, message):
    result = start(tmp_path, model, SGD | SP2, *flags, ranks=2)
    assert result.exit_code == 2
    assert message in result.stderr
