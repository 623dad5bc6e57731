"""Everything before the first step, cheapest first: what is wrong is refused before what is heavy is imported."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dstrain.arguments import Arguments
from dstrain.config import ResolvedConfig, RunFacts, load_config, resolve_config
from dstrain.errors import ExitCode, UserError
from dstrain.parallel import Launch
from dstrain.run_folder import RunFolder, environment_facts


@dataclass(frozen=True)
class Configuration:
    """What is known without torch."""

    folder: RunFolder
    resolved: ResolvedConfig
    stored: dict[str, Any]  # run.json of the run to go on with, or {}


def read_configuration(args: Arguments) -> Configuration:
    """Read and check the DeepSpeed JSON and the run folder. Raises UserError; imports neither torch nor deepspeed."""
    run = args.run
    # accelerate hands its own file on in the environment
    path = run.deepspeed_config or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    problems: list[str] = []
    folder, stored = RunFolder(Path(run.output_dir)), {}
    try:
        folder.check_usable(overwrite=run.overwrite_output_dir, resume=run.resume_from_checkpoint)
        stored = {} if run.overwrite_output_dir else folder.read()
    except UserError as error:
        problems += error.problems
    if not path:
        problems.append("--deepspeed_config is missing: name a DeepSpeed JSON, for example ds_configs/zero2.json")
    if not (args.model.model_name_or_path or args.model.config_name):
        problems.append("no model is named: write --model_name_or_path M (pretrained) or --config_name C (from scratch)")
    resolved = None
    if path:
        facts = RunFacts(
            source=str(path),
            gradient_checkpointing=args.model.gradient_checkpointing,
            compile=args.model.compile is not None,
        )
        try:
            resolved = resolve_config(
                load_config(path),
                world_size=Launch.from_environment().world_size,
                overrides=run.set,
                facts=facts,
                stored_global_batch=stored.get("identity", {}).get("global_batch"),
            )
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return Configuration(folder, resolved, stored)


@dataclass
class Startup:
    """Seconds of each phase from the start of the process to the end of the first step, for run.json."""

    phases: dict[str, float]
    last: float

    @classmethod
    def since_process_start(cls) -> "Startup":
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        started = ticks / os.sysconf("SC_CLK_TCK")
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        return cls({"imports_and_flags": now - started}, now)

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
    tokenizer: Any
    data: Any  # TrainingData
    total_steps: int
    engine: Any  # Engine
    checkpoints: Any  # CheckpointManager
    stop: Any  # AgreedStop
    profiler: Any
    monitor: Any = None
    state: Any = None  # TrainState
    loader: Any = None  # iterator over the micro-batches of one step

    def eval_is_due(self, step: int) -> bool:
        return self.args.run.eval_steps is not None and step % self.args.run.eval_steps == 0

    def held_out_loss(self) -> tuple[float, int]:
        """Mean loss and number of label tokens of the held-out text. A collective."""
        from dstrain.data.tokenization import pad_token_id
        from dstrain.evaluate import held_out_loss

        return held_out_loss(
            self.engine,
            self.data.validation,
            self.resolved,
            self.launch.rank,
            max_batches=self.args.run.max_eval_batches,
            pad_token_id=pad_token_id(self.tokenizer),
        )

    def save(self, state: Any) -> None:
        """Save, unless this step is saved already. A collective."""
        stats = self.checkpoints.save(state, self.monitor.state_dict())
        if stats is not None:
            self.monitor.on_save(state.step, stats.bytes, stats.stall_s, stats.total_s)

    def show_results(self) -> None:
        """The loss curve and a sample of generated text, on the screen and for the report. A collective."""
        from dstrain.generate import sample_text
        from dstrain.monitor.logs import screen
        from dstrain.monitor.progress import render_loss_curve

        sampled = self.resolved.parallel.pp_size == 1  # a stage alone cannot generate
        if sampled:
            prompt, text = sample_text(self.engine, self.tokenizer, self.data.validation, seed=self.args.run.seed)
        if self.launch.is_main:
            points = [(line["step"], line["loss"]) for line in self.monitor.train_lines]
            if len(points) > 1:
                print(render_loss_curve(points), file=screen())
            if sampled:
                self.folder.update(sample={"prompt": prompt, "text": text})
                print(f"A sample, continuing {prompt!r}:\n{text}", file=screen())

    def end(self, exit_code: ExitCode, reason: str) -> None:
        """Write the summary and the report."""
        self.monitor.close(exit_code, reason)
        if self.launch.is_main and "report" in self.args.run.report_to:
            from dstrain.monitor.logs import screen
            from dstrain.monitor.report import write_report

            write_report(self.folder.path)
            print(f"report: {self.folder.path / 'report.html'}", file=screen())


@contextmanager
def prepare(args: Arguments, configuration: Configuration, startup: Startup) -> Iterator[Run]:
    """Build the whole run; whoever leaves it by an error leaves a summary that says so. Raises UserError."""
    from dstrain.monitor.logs import QuietOutput

    with QuietOutput(Launch.from_environment().rank) as quiet:
        run = _build(args, configuration, startup, quiet)
        try:
            yield run
        except UserError as error:
            run.end(ExitCode.USER_ERROR, "; ".join(error.problems))
            raise
        except Exception as error:
            run.end(ExitCode.CRASH, f"{type(error).__name__}: {error}")
            raise
        finally:
            run.loader.close()
        from dstrain import distributed

        distributed.leave()


def _build(args: Arguments, configuration: Configuration, startup: Startup, quiet: Any) -> Run:
    launch, folder = Launch.from_environment(), configuration.folder

    from dstrain import distributed
    from dstrain.checkpoint.manager import CheckpointManager, choose_checkpoint
    from dstrain.data.tokenization import build_tokenizer, num_token_ids
    from dstrain.engine import build_engine
    from dstrain.launch.ops import build_ops, required_builders
    from dstrain.models.config import check_block_size, check_vocabulary, load_model_config, max_positions
    from dstrain.monitor.logs import screen
    from dstrain.monitor.profiler import build_profiler
    from dstrain.resilience.signals import AgreedStop

    startup.done("imports")
    config = load_model_config(args.model)
    tokenizer = build_tokenizer(_tokenizer_name(args), args.model.trust_remote_code)
    check_vocabulary(config, num_token_ids(tokenizer), _tokenizer_name(args))
    block_size = args.data.block_size or min(1024, max_positions(config) or 1024)
    check_block_size(config, block_size)
    resolved = configuration.resolved.with_facts(**_machine_facts(), hidden_size=config.get_text_config().hidden_size)
    startup.done("model_config")
    if launch.is_main_on_host:
        build_ops(required_builders(resolved.deepspeed, resolved.facts.device), say=lambda text: print(text, file=screen()))
    distributed.init_distributed()
    startup.done("process_group")
    data = _build_data(args, tokenizer, block_size, launch)
    startup.done("data")
    samples = args.run.num_train_epochs * len(data.train)
    total_steps = args.run.max_steps if args.run.max_steps > 0 else math.ceil(samples / resolved.global_batch)
    resolved = resolved.with_total_steps(total_steps)
    identity = _identity(config, data.samples_sha256, args.run.seed, block_size, resolved.global_batch)
    checkpoint = None
    if not args.run.overwrite_output_dir:
        folder.check_identity(identity)
        checkpoint = choose_checkpoint(folder.checkpoints, args.run.resume_from_checkpoint)
    model = _build_model(args, config, resolved, launch.rank)
    startup.done("model")
    distributed.seed_everything(args.run.seed + launch.rank)  # dropout only: ranks must not drop the same units
    engine = build_engine(model, resolved, compile=args.model.compile)
    startup.done("engine")
    run = Run(
        args=args,
        resolved=resolved,
        folder=folder,
        launch=launch,
        startup=startup,
        tokenizer=tokenizer,
        data=data,
        total_steps=total_steps,
        engine=engine,
        checkpoints=CheckpointManager(
            folder.checkpoints,
            engine.deepspeed,
            save_steps=args.run.save_steps,
            save_total_limit=args.run.save_total_limit,
        ),
        stop=AgreedStop(folder.path, args.run.max_time),
        profiler=build_profiler(folder.path / "profile", args.run.profile and launch.is_main),
    )
    _begin(run, identity, checkpoint, block_size, quiet)
    return run


def _build_model(args: Arguments, config: Any, resolved: ResolvedConfig, rank: int) -> Any:
    """The model, or this rank's stage of it."""
    from dstrain import distributed
    from dstrain.models.build import build_model
    from dstrain.models.pipeline_build import build_stage

    common = {"seed": args.run.seed, "dtype": _parameter_dtype(resolved), "device": distributed.device()}
    dims = resolved.parallel
    if dims.pp_size > 1:
        return build_stage(args.model, config, index=dims.pp_rank(rank), num_stages=dims.pp_size, **common)
    zero3_config = resolved.deepspeed if resolved.zero_stage == 3 else None
    return build_model(args.model, config, zero3_config=zero3_config, **common)


def _begin(run: Run, identity: dict[str, Any], checkpoint: Path | None, block_size: int, quiet: Any) -> None:
    """Restore what there is to restore, then write for the first time: from here on the folder is this run's."""
    from dstrain import distributed
    from dstrain.checkpoint.manager import TrainState
    from dstrain.data.loader import build_loader
    from dstrain.data.tokenization import pad_token_id
    from dstrain.models.flops import flops_per_token, num_parameters
    from dstrain.monitor.devices import find_peak
    from dstrain.monitor.metrics import truncate_to_step
    from dstrain.monitor.monitor import Monitor, RunScale
    from dstrain.monitor.progress import build_progress
    from dstrain.monitor.trackers import build_trackers

    is_main, parallel, model = run.launch.is_main, run.resolved.parallel, run.engine.model
    run.state, monitor_state = run.checkpoints.load(checkpoint) if checkpoint else (TrainState(), None)
    run.startup.done("checkpoint")
    peak = find_peak(distributed.device(), _compute_dtype(run.resolved))
    if is_main:
        if run.args.run.overwrite_output_dir:
            run.folder.clear()
        run.folder.create()
        run.folder.write(
            {
                "arguments": run.args.to_dict(),
                "identity": identity,
                "deepspeed_config": run.resolved.deepspeed,
                "origins": run.resolved.origins,
                "world": {**asdict(parallel), "dp_size": parallel.dp_size},
                "total_steps": run.total_steps,
                "num_parameters": num_parameters(model),
                "data": {"source": run.data.source, "sha256": run.data.sha256, **run.data.facts},
                **vars(peak),
                **environment_facts(),
            }
        )
    distributed.barrier()
    quiet.attach(run.folder.path)
    run.monitor = Monitor(
        run.folder.path,
        device=distributed.device(),
        is_main=is_main,
        logging_steps=run.args.run.logging_steps,
        scale=RunScale(run.launch.world_size, flops_per_token(model, block_size), peak.peak_tflops),
        max_over_ranks=distributed.max_over_ranks,
        progress=build_progress(run.total_steps, is_main=is_main),
        trackers=build_trackers(run.engine.deepspeed.monitor) if is_main else None,
    )
    kept_steps = run.monitor.load_state_dict(monitor_state) if monitor_state else 0
    if is_main:
        truncate_to_step(run.folder.path, run.state.step - kept_steps)
    if checkpoint is not None:
        run.monitor.event(run.state.step, "resume", f"from {checkpoint}")
    if reason := run.engine.plain_loss_reason:
        run.monitor.event(run.state.step, "plain_loss", f"the loss is not fused into the head: {reason}")
    run.loader = build_loader(
        run.data.train,
        seed=run.args.run.seed,
        global_batch=run.resolved.global_batch,
        micro_batch=run.resolved.micro_batch,
        dp_rank=parallel.dp_rank(run.launch.rank),
        dp_size=parallel.dp_size,
        samples_consumed=run.state.samples_consumed,
        pad_token_id=pad_token_id(run.tokenizer),
    )


def _identity(config: Any, data: str, seed: int, block_size: int, global_batch: int) -> dict[str, Any]:
    """What makes a run this run: with any of it changed, going on would be another one."""
    volatile = ("transformers_version", "dtype", "_name_or_path")
    model = {name: value for name, value in config.to_diff_dict().items() if name not in volatile}
    return {"model": model, "data": data, "seed": seed, "block_size": block_size, "global_batch": global_batch}


def _parameter_dtype(resolved: ResolvedConfig) -> Any:
    """torch.dtype of the model's parameters."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[resolved.precision]


def _compute_dtype(resolved: ResolvedConfig) -> Any:
    """torch.dtype of the matmuls."""
    import torch

    return getattr(torch, resolved.autocast_dtype) if resolved.autocast_dtype else _parameter_dtype(resolved)


def _tokenizer_name(args: Arguments) -> str:
    """The model's own tokenizer; bytes for a model that is only a JSON file."""
    source = args.model.model_name_or_path or args.model.config_name
    return args.model.tokenizer_name or ("bytes" if source.endswith(".json") else source)


def _machine_facts() -> dict[str, Any]:
    """What the accelerator offers, for the rules that depend on it."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return {
        "device": accelerator.device_name(),
        "device_supports_fp16": accelerator.is_fp16_supported(),
        "device_supports_bf16": accelerator.is_bf16_supported(),
    }


def _build_data(args: Arguments, tokenizer: Any, block_size: int, launch: Launch) -> Any:
    from dstrain import distributed
    from dstrain.data import build_data

    return build_data(
        args.data,
        tokenizer,
        seed=args.run.seed,
        block_size=block_size,
        is_main_per_host=launch.is_main_on_host,
        barrier=distributed.barrier,
    )
