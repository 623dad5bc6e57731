"""The shipped ds_configs: each is right at several world sizes, minimal, plain DeepSpeed, and listed in the table."""

import json

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dstrain.config import RunFacts, load_config, resolve_config
from dstrain.config import schema_keys as keys
from dstrain.config.kinds import Key
from dstrain.config.load import leaves
from dstrain.config.reading import class_of
from dstrain.config.schema_types import SCHEDULERS
from tests.launch import ROOT

FOLDER = ROOT / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))
NAMES = [path.stem for path in FILES]
PART_1 = {
    "zero0",
    "zero1",
    "zero2",
    "zero3",
    "zero2_offload_cpu",
    "zero3_offload_cpu",
    "zero3_offload_nvme",
    "zero1_fp16",
    "zero3_torch_autocast",
}
PART_2 = {"pp2_zero1", "pp2_dp2_zero1", "tp2_zero1", "tp2_zero2", "sp2_zero1", "sp2_zero3", "moe_zero3"}


def test_all_files_are_here_and_in_the_table():
    assert set(NAMES) >= PART_1 | PART_2
    table = (FOLDER / "README.md").read_text()
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in row.split("`")[1::2]}
    assert listed == {path.name for path in FILES}


def smallest_world(config):
    degrees = (
        config.get("tensor_parallel", {}).get("autotp_size", 1),
        config.get("pipeline", {}).get("stages", 1),
        config.get("sequence_parallel_size", 1),
    )
    return degrees[0] * degrees[1] * degrees[2]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_resolves_at_1_2_and_4_ranks(path):
    config = load_config(path)
    for ranks in (1, 2, 4):
        if ranks % smallest_world(config) == 0:
            resolved = resolve_config(config, world_size=ranks, facts=RunFacts(source=path.name, device="cuda"))
            assert resolved.global_batch == config["train_batch_size"]
            written = {key for key, origin in resolved.origins.items() if origin == "user"}
            assert {key for key, _ in leaves(config)} - written <= {"train_batch_size"}


def default_of(config, key):
    """The schema's default of a dotted key (test_config_schema.py compares these with the installed DeepSpeed)."""
    if key.startswith("optimizer.params."):
        return class_of(config).params[key.rsplit(".", 1)[1]].default
    if key.startswith("scheduler.params."):
        return SCHEDULERS[config["scheduler"]["type"]][key.rsplit(".", 1)[1]].default
    block = Key("block", keys=keys.TOP)
    for name in key.split("."):
        block = block.keys[name]
    return block.default


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_key_is_at_its_default(path):
    config = load_config(path)
    for key, value in leaves(config):
        assert value != default_of(config, key), f"{key} is DeepSpeed's default: leave it out"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_plain_deepspeed_reads_it_without_help(path):
    config = DeepSpeedConfig(json.loads(path.read_text()))
    assert isinstance(config.zero_config, DeepSpeedZeroConfig)
    assert '"auto"' not in path.read_text()


def test_accelerate_and_hugging_face_read_them():
    from transformers.integrations import HfDeepSpeedConfig

    for path in FILES:
        config = HfDeepSpeedConfig(str(path))
        assert config.is_zero3() == ("zero3" in path.stem or config.get_value("zero_optimization.stage") == 3)
