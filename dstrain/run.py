"""One run: all that the loop needs, and how it ends."""

import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.arguments import Arguments
from dstrain.best import Best
from dstrain.config import ResolvedConfig
from dstrain.errors import DiskFullError, ExitCode
from dstrain.parallel import Launch
from dstrain.run_folder import RunFolder


@dataclass
class Startup:
    """Seconds of each phase from the start of the process to the end of the first step, for run.json."""

    phases: dict[str, float]
    last: float
    started: float  # of CLOCK_BOOTTIME

    @classmethod
    def since_process_start(cls) -> "Startup":
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        started = ticks / os.sysconf("SC_CLK_TCK")
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        return cls({"imports_and_flags": now - started}, now, started)

    def done(self, phase: str) -> None:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.phases[phase] = now - self.last
        self.last = now

    def first_step_done(self, folder: RunFolder) -> None:
        if "first_step" not in self.phases:
            self.done("first_step")
            self.phases = {name: round(seconds, 3) for name, seconds in self.phases.items()}
            if Launch.from_environment().is_main:
                folder.update(startup_s={**self.phases, "total": round(sum(self.phases.values()), 3)})


@dataclass
class Run:
    """All that the loop needs, and how it ends."""

    args: Arguments
    resolved: ResolvedConfig
    folder: RunFolder
    launch: Launch
    startup: Startup
    identity: dict[str, Any]
    tokenizer: Any
    block_size: int
    data: Any  # TrainingData
    total_steps: int
    engine: Any  # Engine
    checkpoints: Any  # CheckpointManager
    safety: Any  # Safety
    profiler: Any
    foresight: Any  # Foresight
    best: Best
    monitor: Any = None
    state: Any = None  # TrainState
    loader: Any = None  # iterator over the micro-batches of one step
    evaluated_step: int | None = None
    checkpoint_bytes: int | None = None  # of the last checkpoint, on rank 0

    def begin_data(self, extra: dict[str, Any]) -> None:
        """Where the data go on, and what they tell. extra: of the restored checkpoint, or {}."""
        first = self.state.step

        def tell(position: int, text: str) -> None:
            step = position // self.resolved.global_batch + 1
            if first < step <= self.total_steps:  # else it was told before, or is of steps that never come
                self.monitor.event(step, "data", text)

        self.data.train.load_state(extra.get("data", {}), tell)
        if self.args.data.streaming and self.data.validation is None:
            self.monitor.event(first, "notice", f"held-out text: {self.data.facts['validation']}")

    def begin_safety(self) -> None:
        """From here on `logs` has the black box of the run, and stacks if it hangs."""
        from dstrain.data.loader import step_plan
        from dstrain.resilience.safety import BatchNames

        resolved, parallel, train = self.resolved, self.resolved.parallel, self.data.train
        dp_rank = parallel.dp_rank(self.launch.rank)
        plan = step_plan(resolved.global_batch, resolved.micro_batch, dp_rank, parallel.dp_size)
        order = train.order(self.args.run.seed)
        self.safety.begin(
            self.folder.logs,
            monitor=self.monitor,
            names=BatchNames(
                sample_ids=lambda first: [order[first + offset] for micro in plan for offset in micro],
                text=lambda index: self.tokenizer.decode(train[index]["input_ids"][:24]),
            ),
            samples_consumed=self.state.samples_consumed,
            global_batch=resolved.global_batch,
            scaled=resolved.precision == "fp16" or resolved.autocast_dtype == "float16",
            skip_nonfinite=self.args.run.skip_nonfinite,
            world_size=self.launch.world_size,
            host=socket.gethostname(),
            output_dir=str(self.folder.path.resolve()),
        )

    def eval_is_due(self, state: Any) -> bool:
        if self.args.run.eval_strategy == "epoch":
            before = state.samples_consumed - self.resolved.global_batch
            return state.samples_consumed // len(self.data.train) > before // len(self.data.train)
        return self.args.run.eval_steps is not None and state.step % self.args.run.eval_steps == 0

    def save_is_due(self, step: int) -> bool:
        is_best = self.args.run.load_best_model_at_end and step == self.best.step
        return is_best or self.checkpoints.is_due(step)

    def evaluate(self, step: int) -> None:
        """Loss of the held-out text, where there is any; once a step. A collective."""
        from dstrain.data.tokenization import pad_token_id
        from dstrain.evaluate import held_out_loss

        if self.data.validation is None or step == self.evaluated_step:
            return
        found = held_out_loss(
            self.engine,
            self.data.validation,
            self.resolved,
            self.launch.rank,
            max_batches=self.args.run.max_eval_batches,
            pad_token_id=pad_token_id(self.tokenizer),
            goes_on=self.safety.during_evaluation,
        )
        self.safety.beat("step", step)
        if found is None:  # a stop was agreed: the next start evaluates
            return
        self.monitor.on_eval(step, *found)
        self.evaluated_step = step
        self.best.note(step, found[0])
        if self.best.is_enough:
            text = f"no lower held-out loss in {self.best.num_worse} evaluations than {self.best.loss:.6g} at step"
            self.monitor.event(step, "early_stop", f"{text} {self.best.step}")

    def save(self, state: Any) -> None:
        """Begin to save, unless this step is saved already; the background writes. A collective."""
        self.safety.before_save(state.step)
        own = {"evaluated_step": self.evaluated_step, "best": self.best.state_dict()}
        own["data"] = self.data.train.state_at(state.samples_consumed)
        kept_step = self.best.step if self.args.run.load_best_model_at_end else None
        self.checkpoints.save(state, {**self.monitor.state_dict(), **own}, kept_step)
        self.safety.beat("step", state.step)

    def save_on_the_way(self, state: Any) -> None:
        """The same; with --ignore_full_disk a checkpoint that finds no room is left out, and said."""
        self.safety.before_save(state.step)  # waiting for the one before it is part of the save
        for attempt in (self.checkpoints.wait, lambda: self.save(state)):  # the one before it may fail by now
            try:
                attempt()
            except DiskFullError as error:
                if not self.args.run.ignore_full_disk:
                    raise
                self.monitor.event(state.step, "save_failed", "; ".join(error.problems))

    def note_saves(self) -> None:
        """A line for each checkpoint that the background has committed meanwhile. Never waits."""
        for stats in self.checkpoints.finished():
            self.monitor.on_save(stats.step, stats.bytes, stats.stall_s, stats.total_s)
            self.checkpoint_bytes = stats.bytes

    def finish_saves(self) -> None:
        """Wait until the last checkpoint is on the disk. A collective."""
        self.safety.beat("save", self.total_steps)
        self.checkpoints.close()
        self.note_saves()
        self.safety.beat("end", self.total_steps)

    def restore_evaluations(self, extra: dict[str, Any]) -> None:
        """What a checkpoint knows of them. A best one whose checkpoint is not there cannot be taken at the end."""
        self.evaluated_step = extra["evaluated_step"]
        found = extra.get("best")
        if found and (not self.args.run.load_best_model_at_end or self.checkpoints.has(found["step"])):
            self.best.load_state_dict(found)

    def take_best(self, step: int) -> None:
        """The model of the best evaluation, where the flags ask for it, else of `step`: shown and exported.

        A collective.
        """
        best = self.best
        if self.args.run.load_best_model_at_end and best.step not in (None, step):
            self.checkpoints.load(self.checkpoints.path_of(best.step))
            self.monitor.event(step, "best", f"step {best.step} has the lowest held-out loss: {best.loss:.6g}")
            step = best.step
        self.export(step)

    def export(self, step: int) -> None:
        """Write the model saved at `step` as a Hugging Face folder, where `--export` asks for it. A collective."""
        from dstrain import distributed
        from dstrain.checkpoint.export import export

        wanted = self.args.run.export
        if wanted is not None and self.launch.is_main:
            target = Path(wanted)
            if wanted == "auto":
                target = self.folder.path / "export"
                shutil.rmtree(target, ignore_errors=True)
            export(self.checkpoints.path_of(step), target)
            self.monitor.event(step, "export", str(target))
        distributed.barrier()

    def sample_is_due(self, step: int) -> bool:
        return self.args.run.sample_steps is not None and step % self.args.run.sample_steps == 0

    def _sample(self) -> tuple[str, str]:
        """A prompt and what the model writes behind it. A collective."""
        from dstrain.generate.sample import prompt_to_sample, sample_text

        samples = self.data.validation or self.data.train
        prompt_ids = prompt_to_sample(self.tokenizer, samples, self.args.run.sample_prompt)
        return sample_text(self.engine, self.tokenizer, prompt_ids, seed=self.args.run.seed)

    def sample(self, step: int) -> None:
        """What the model writes now, as an event. A collective."""
        self.safety.beat("sample", step)
        prompt, text = self._sample()
        self.monitor.event(step, "sample", f"continuing {prompt!r}: {text!r}")
        self.safety.beat("step", step)

    def show_results(self) -> None:
        """The loss curve and a sample of generated text, on the screen and for the report. A collective."""
        from dstrain.monitor.logs import printable, screen
        from dstrain.monitor.metrics import read_metrics
        from dstrain.monitor.progress import render_loss_curve

        sampled = self.resolved.parallel.pp_size == 1  # a stage alone cannot generate
        if sampled:
            prompt, text = self._sample()
        if self.launch.is_main:
            lines = read_metrics(self.folder.path)
            points = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
            if len(points) > 1:
                print(render_loss_curve(points), file=screen())
            if sampled:
                self.folder.update(sample={"prompt": prompt, "text": text})
                print(f"A sample, continuing {prompt!r}:\n{printable(text)}", file=screen())

    def _energy(self) -> dict[str, float | None]:
        """Of all meters of all hosts, since this start; None without a meter. A collective."""
        from dstrain import distributed
        from dstrain.monitor.energy import JOULES_PER_KWH, grid_kg_per_kwh

        meter = self.monitor.energy
        meter.sample()
        joules, meters = distributed.sum_over_ranks([meter.joules, float(meter.has_reading)])
        energy = joules / JOULES_PER_KWH if meters else None
        if (country := self.args.run.co2_country) is None:
            return {"energy_kwh": energy}
        return {"energy_kwh": energy, "co2_kg": None if energy is None else energy * grid_kg_per_kwh(country)}

    def _compare_with_prediction(self) -> None:
        """A collective."""
        from dstrain import distributed
        from dstrain.launch.swap import swapped_bytes
        from dstrain.monitor.logs import screen

        device = distributed.device()
        measured = self.foresight.compare(
            device, self.monitor.train_lines, self.checkpoint_bytes, swapped_bytes(self.resolved)
        )
        measured |= self._energy()
        if self.launch.is_main:
            self.folder.update(measured=measured)
            if text := self.foresight.describe_comparison(measured, on_cpu=device.type == "cpu"):
                print(text, file=screen())

    def end(self, exit_code: ExitCode, reason: str) -> None:
        """Write the summary and the report."""
        from dstrain.monitor.logs import screen
        from dstrain.monitor.monitor import AGREED_ENDS
        from dstrain.monitor.report import write_report

        if exit_code in AGREED_ENDS:
            self._compare_with_prediction()
        self.monitor.close(exit_code, reason)
        if self.launch.is_main and "report" in self.args.run.report_to:
            try:
                print(f"report: {write_report(self.folder.path)}", file=screen())
            except (OSError, ValueError) as error:  # a picture of a run must not fail the run
                print(f"no report: {error}", file=screen())
