"""DeepSpeed's monitor blocks really hold the values of metrics.jsonl, under a real engine in a process of its own."""

import csv
import json
import math
import subprocess
import sys

import pytest

from dstrain.monitor.metrics import read_metrics
from dstrain.monitor.trackers import EVAL_NAMES, TRAIN_NAMES, DeepSpeedTrackers, NullTrackers, build_trackers

pytestmark = pytest.mark.ops  # its engine loads one
TRAIN = """
import json, os, sys
out = sys.argv[1]
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
sys.path.insert(0, out)  # holds a stand-in for wandb
import deepspeed, torch
from dstrain.monitor.monitor import Monitor, RunScale
from dstrain.monitor.trackers import build_trackers
import types
deepspeed.init_distributed("gloo", verbose=False)
model = torch.nn.Linear(4, 1)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_allow_untested_optimizer": True,
    "tensorboard": {"enabled": True, "output_path": out, "job_name": "tb"},
    "csv_monitor": {"enabled": True, "output_path": out, "job_name": "csv"},
    "wandb": {"enabled": True, "project": "p"},
})
monitor = Monitor(out, device=torch.device("cpu"), scale=RunScale(1, 1e6, 0.1), trackers=build_trackers(engine.monitor))
for step in range(1, 4):
    loss = engine(torch.ones(2, 4)).square().mean()
    engine.backward(loss)
    engine.step()
    monitor.on_step(step, types.SimpleNamespace(loss=loss.detach(), grad_norm=float("nan") if step == 2 else 0.5,
        learning_rate=0.1, tokens=7, tokens_processed=8, skipped=False), 0.01, 0.001)
    monitor.on_eval(step, loss.detach(), 7)
monitor.close(0, "finished")
torch.distributed.destroy_process_group()
"""

# Keeps what wandb keeps: a value at a step below the last one is dropped (with a warning), and init comes first.
WANDB = """
import json, os
_rows, _project = [], None
def init(project, group, entity):
    global _project
    _project = project
def log(data, step=None, commit=None):
    if _project and (not _rows or step >= _rows[-1][0]):
        _rows.append((step, data))
        with open(os.path.join(os.path.dirname(__file__), "wandb.json"), "w") as file:
            json.dump(_rows, file)
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, request):
    import socket

    folder = tmp_path_factory.mktemp("trackers")
    (folder / "wandb.py").write_text(WANDB)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(folder), str(port)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def expected(run_dir):
    """tracker name -> [(step, value)]; non-finite values are left out."""
    values: dict[str, list] = {}
    for line in read_metrics(run_dir):
        names = {"train": TRAIN_NAMES, "eval": EVAL_NAMES}.get(line["kind"], {})
        for field, name in names.items():
            if line[field] is not None:
                values.setdefault(name, []).append((line["step"], line[field]))
    assert len(values["train/loss"]) == 3
    assert [step for step, _ in values["train/grad_norm"]] == [1, 3]
    return values


def test_tensorboard_holds_the_values_and_nothing_of_deepspeeds_own(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tb"))
    events.Reload()
    held = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    wanted = expected(run_dir)
    assert held.keys() == wanted.keys()
    for name, points in wanted.items():
        assert [step for step, _ in held[name]] == [step for step, _ in points]
        assert [value for _, value in held[name]] == pytest.approx([value for _, value in points], rel=1e-6)


def test_csv_holds_the_values(run_dir):
    wanted = expected(run_dir)
    assert len(list((run_dir / "csv").iterdir())) == len(wanted)
    for name, points in wanted.items():
        with open(run_dir / "csv" / (name.replace("/", "_") + ".csv"), newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["step", name.split("/")[-1]]
        assert [(int(step), float(value)) for step, value in rows] == points


def test_wandb_gets_every_value_with_a_rising_step(run_dir):
    rows = json.loads((run_dir / "wandb.json").read_text())
    wanted = expected(run_dir)
    assert len(rows) == sum(len(points) for points in wanted.values())
    assert [step for step, _ in rows] == sorted(step for step, _ in rows)


def test_what_a_person_looks_for_is_forwarded():
    for field in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "peak_device_memory_gib"):
        assert field in TRAIN_NAMES
    assert set(EVAL_NAMES) == {"loss", "perplexity"}
    assert len({*TRAIN_NAMES.values(), *EVAL_NAMES.values()}) == len(TRAIN_NAMES) + len(EVAL_NAMES)


class Master:
    enabled = True

    def __init__(self):
        self.events = []

    def write_events(self, events):
        self.events += events


def test_only_finite_values_are_forwarded():
    master = Master()
    DeepSpeedTrackers(master).write(
        {"a": "x/a", "b": "x/b", "c": "x/c"}, {"step": 3, "a": 1.0, "b": None, "c": math.nan}
    )
    assert master.events == [("x/a", 1.0, 3)]
    assert not master.enabled


def test_without_a_block_there_is_no_tracker():
    master = Master()
    master.enabled = False
    assert type(build_trackers(master)) is type(build_trackers(None)) is NullTrackers
