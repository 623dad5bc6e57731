"""Runs one case through the real launcher and reads the files that it left. Failing is a result, with its reason."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import PROGRAMS, Case
from benchmarks.machine import gpu_names
from dstrain.launch.processes import adopt_orphans, descendants, end_descendants, remove_unmapped, shared_memory
from dstrain.monitor.metrics import read_metrics
from dstrain.parallel import free_port

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
OK, OUT_OF_MEMORY, TIMEOUT, REFUSED, FAILED = "ok", "out of memory", "timeout", "refused", "failed"
# What a run with a trace is told: the trace covers steps 4 to 6.
PROFILE_FLAGS = ("--profile", "--set", "comms_logger.enabled=true", "--set", "comms_logger.prof_all=true")
PROFILE_STEPS = 6
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate|MemoryError|bad_alloc|OutOfMemory", re.I)
_STEP_FIELDS = ("step_time_s", "data_time_s", "tokens_per_second", "model_tflops_per_second_per_device", "mfu")
_RUN_FIELDS = ("num_parameters", "world", "peak_tflops", "peak_source", "startup_s", "prediction", "measured")


# One port for all runs of a session: DeepSpeed's buffers in /dev/shm carry it in their names.
PORT = free_port()


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    exit_code: None when it was killed at the timeout. disturbance: the share of the machine's cores that others used
    meanwhile, 0 to 1.
    """

    exit_code: int | None
    seconds: float
    stderr: str
    killed_by_kernel: bool
    disturbance: float = 0.0


def run_case(case: Case, folder: Path, *, profile: bool = False) -> dict[str, Any]:
    """One run of a case in a new `folder`; returns its record, plain JSON. Never raises for what the case does."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = command_of(case, folder, profile=profile)
    ended = start(command, folder, case.timeout_s)
    status, reason = how_it_ended(ended, folder / "run")
    reason, *words = [shown(text, folder) for text in (reason, *command)]
    record = {"status": status, "reason": reason, "seconds": round(ended.seconds, 3), "command": words}
    record["disturbance"] = round(ended.disturbance, 4)
    if status != OK:
        return record
    if case.program != "dstrain":
        return record | json.loads((folder / "result.json").read_text())
    if profile:
        return record | read_profile(folder / "run", case.model)
    return record | read_run(folder / "run", case.warmup_steps)


def command_of(case: Case, folder: Path, *, profile: bool = False) -> list[str]:
    """The whole command line. Writes the model and the JSON that it names into `folder`."""
    (folder / "model.json").write_text(json.dumps(case.model, indent=1))
    ds_config = config_of(case, folder)
    limit = [] if case.memory_limit_gib is None else ["prlimit", f"--data={int(case.memory_limit_gib * 2**30)}"]
    port = ("--master_port", str(PORT))
    launchers = {
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", str(case.processes), *port],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", str(case.processes), *port],
    }
    script, *own = PROGRAMS[case.program]
    flags = flags_of(case, folder, ds_config, profile)
    return [*limit, *launchers[case.launcher], str(ROOT / script), *own, *flags]


def config_of(case: Case, folder: Path) -> Path:
    """The file of the case's DeepSpeed JSON, which is written into `folder` where it is not a shipped one."""
    if isinstance(case.ds_config, str):
        return ROOT / "ds_configs" / case.ds_config
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ds.json"
    path.write_text(json.dumps(case.ds_config, indent=1))
    return path


def flags_of(case: Case, folder: Path, ds_config: Path, profile: bool = False) -> list[str]:
    """What train.py, or the peer, is told."""
    steps = PROFILE_STEPS if profile else case.max_steps
    flags = ["--deepspeed_config", str(ds_config), "--config_name", str(folder / "model.json")]
    flags += ["--block_size", str(case.block_size), "--max_steps", str(steps)]
    if case.program != "dstrain":
        return [*flags, "--warmup_steps", str(case.warmup_steps), "--output", str(folder / "result.json")]
    flags += ["--output_dir", str(folder / "run"), "--report_to", "none", "--max_eval_batches", "1"]
    flags += () if "--save_steps" in case.flags else ("--save_steps", "0")
    for override in case.overrides:
        flags += ["--set", override.replace("{folder}", str(folder))]
    return [
        *flags,
        *(flag.replace("{folder}", str(folder)) for flag in case.flags),
        *(PROFILE_FLAGS if profile else ()),
    ]


def environment() -> dict[str, str]:
    """One thread a rank where there is no GPU, this environment's programs, no network, nothing of another launcher."""
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in launchers and not k.startswith("ACCELERATE_")}
    env["PATH"] = os.pathsep.join([str(BIN), env.get("PATH", os.defpath)])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    env |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return env if gpu_names() else env | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def start(command: Sequence[str], folder: Path, timeout_s: float) -> Ended:
    """Run a command in its own session until it ends or is killed; leave nothing of it behind."""
    adopt_orphans()
    before, kills, busy, begin = shared_memory(), kernel_kills(), foreign_cpu_s(), time.monotonic()
    keep = set(descendants())
    exit_code = None
    with open(folder / "stdout.log", "wb") as out, open(folder / "stderr.log", "wb") as err:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment(),
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            exit_code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        finally:
            seconds = time.monotonic() - begin
            assert not keep, "the runner measures one case at a time"
            end_descendants(grace_s=2.0 if exit_code == 0 else 0.0)
            process.wait()
            remove_unmapped(path for path in shared_memory() - before if f"_{PORT}_" in path.name)
    stderr = (folder / "stderr.log").read_text(errors="replace")
    cores_s = (os.cpu_count() or 1) * (time.monotonic() - begin)
    disturbance = max(0.0, (foreign_cpu_s() - busy) / cores_s)
    return Ended(exit_code, seconds, stderr, kernel_kills() > kills, disturbance)


def foreign_cpu_s() -> float:
    """Seconds of all cores, since the machine started, that neither this process nor its ended children used; what a
    hypervisor took away is among them."""
    user, nice, system, _, _, irq, softirq, steal, *_ = (
        int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return busy - sum(usage.ru_utime + usage.ru_stime for usage in usages)


def kernel_kills() -> int:
    """Processes that this machine's kernel has killed for want of memory."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def how_it_ended(ended: Ended, run: Path) -> tuple[str, str]:
    """(status, reason). The summary line of metrics.jsonl says it; a refused start has written no file, and its reason
    stands on stderr alone, one line a problem."""
    if ended.exit_code is None:
        return TIMEOUT, f"killed after {ended.seconds:.0f} s"
    if ended.exit_code == 0:
        return OK, ""
    lines = read_metrics(run)
    summary = next((line for line in reversed(lines) if line["kind"] == "summary"), None)
    reason = summary["reason"] if summary else ""
    problems = [
        line.split("dstrain: error: ", 1)[1] for line in ended.stderr.splitlines() if "dstrain: error: " in line
    ]
    if _NO_MEMORY.search(reason) or _NO_MEMORY.search(ended.stderr) or ended.killed_by_kernel:
        return OUT_OF_MEMORY, first_line(reason) or "a process was killed, or could not allocate"
    if problems and not lines:
        return REFUSED, "; ".join(dict.fromkeys(problems))
    last = next((line for line in reversed(ended.stderr.splitlines()) if line.strip()), "")
    return FAILED, first_line(reason) or f"exit code {ended.exit_code}: {last.strip()}"


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]


def read_run(run: Path, warmup_steps: int) -> dict[str, Any]:
    """What a run's metrics.jsonl and run.json say. Lists hold the steps after the warm-up, losses all of them."""
    lines, facts = read_metrics(run), json.loads((run / "run.json").read_text())
    train = [line for line in lines if line["kind"] == "train"]
    counted = train[warmup_steps:]
    saves = [{k: line[k] for k in ("step", "bytes", "stall_s", "total_s")} for line in lines if line["kind"] == "save"]
    config = facts["deepspeed_config"]
    return {
        **{name: [line[name] for line in counted] for name in _STEP_FIELDS},
        "losses": [line["loss"] for line in train],
        "tokens_per_step": train[-1]["tokens_processed"],
        "peak_device_memory_gib": train[-1]["peak_device_memory_gib"],
        "host_memory_gib": train[-1]["host_memory_gib"],
        "saves": saves,
        "nvme_gib": facts["measured"]["nvme_gib"],
        "deepspeed_config": {
            name: config[name]
            for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        },
        "zero_stage": config.get("zero_optimization", {}).get("stage", 0),
        "precision": next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")), "fp32"),
        "data_sha256": facts["data"]["sha256"],
        "versions": facts["versions"],
        **{name: facts[name] for name in _RUN_FIELDS if name in facts},
    }


def read_profile(run: Path, model: Mapping[str, Any]) -> dict[str, Any]:
    """The split of a traced step, the table of collectives, and the theory's volume for the same run."""
    from benchmarks.theory import Shape, measured_bytes, theory_bytes

    facts = json.loads((run / "run.json").read_text())
    dims = {name: facts["world"][name] for name in ("dp_size", "tp_size", "pp_size", "sp_size")}
    stage = facts["deepspeed_config"].get("zero_optimization", {}).get("stage", 0)
    shape, comms = Shape.of_run(facts, model), run / "comms.json"
    per_step = json.loads(comms.read_text())["per_step"] if comms.exists() else {}
    return {
        "split": json.loads((run / "profile" / "split.json").read_text()),
        "comms": per_step,
        "sent_bytes": measured_bytes(per_step, shape, **dims),
        "theory_bytes": theory_bytes(shape, stage=stage, **dims),
    }


def shown(text: str, folder: Path) -> str:
    """As somebody else can read and type it: without this machine's paths."""
    for path, name in ((f"{folder}", "FOLDER"), (f"{ROOT}/", ""), (f"{BIN}/", "")):
        text = text.replace(path, name)
    return text
