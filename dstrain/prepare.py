"""A run built, cheapest first: what is wrong is refused before what is heavy is imported, and nothing is written."""

import gc
import math
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from dstrain.arguments import Arguments, RunArguments, is_taken
from dstrain.begin import begin
from dstrain.best import Best
from dstrain.config import ResolvedConfig, RunFacts, load_config, resolve_config
from dstrain.errors import ExitCode, UserError
from dstrain.launch.absent import leaving_without_absent_hosts
from dstrain.launch.swap import SwapFolders
from dstrain.monitor.energy import grid_kg_per_kwh
from dstrain.parallel import Launch, check_master_port
from dstrain.run import Run, Startup
from dstrain.run_folder import RunFolder, missing_packages
from dstrain.run_lock import RunLock


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
    problems = [f"this Python lacks {name}: run `pip install -e .` in the checkout" for name in missing_packages()]
    folder, stored = RunFolder(Path(run.output_dir)), {}
    try:
        folder.check_usable(overwrite=run.overwrite_output_dir, resume=run.resume_from_checkpoint)
        stored = {} if run.overwrite_output_dir else folder.read()
        if run.co2_country is not None:
            grid_kg_per_kwh(run.co2_country)
    except UserError as error:
        problems += error.problems
    if run.export not in (None, "auto") and is_taken(Path(run.export)):
        problems.append(f"--export {run.export} is there already: name a new or empty folder")
    if not path:
        problems.append("--deepspeed_config is missing: name a DeepSpeed JSON, for example ds_configs/zero2.json")
    if not (args.model.model_name_or_path or args.model.config_name):
        problems.append(
            "no model is named: write --model_name_or_path M (pretrained) or --config_name C (from scratch)"
        )
    launch = Launch.from_environment()
    if launch.world_size > 1 and not os.environ.get("MASTER_ADDR"):
        problems.append(
            "MASTER_ADDR, the host of rank 0, is not set (mpirun does not tell it): run `dstrain env --hostfile F` "
            "before `deepspeed --launcher openmpi`, or give mpirun -x MASTER_ADDR=HOST"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and os.environ.get("CROSS_SIZE") == "1":
        # accelerate 1.15 starts DeepSpeed's launcher in place of torchrun's only where --num_machines is more than 1
        problems.append(
            "accelerate, told of several machines, has started a run of its own on each (through pdsh, without a "
            "hostfile): add --deepspeed_multinode_launcher standard"
        )
    resolved = None
    if path:
        facts = RunFacts(
            source=str(path),
            gradient_checkpointing=args.model.gradient_checkpointing,
            compile=args.model.compile is not None,
            samples=run.sample_steps is not None,
            adapters=args.model.adapter is not None,
            load_in_4bit=args.model.load_in_4bit,
        )
        try:
            resolved = resolve_config(
                load_config(path),
                world_size=launch.world_size,
                overrides=run.set,
                facts=facts,
                stored_global_batch=stored.get("identity", {}).get("global_batch"),
            )
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    RunLock(folder.path).wait_until_free()
    check_master_port()
    return Configuration(folder, resolved, stored)


@contextmanager
def prepare(args: Arguments, configuration: Configuration, startup: Startup) -> Iterator[Run]:
    """Build the whole run; whoever leaves it by an error leaves a summary that says so. Raises UserError."""
    from dstrain.monitor.logs import QuietOutput

    launch = Launch.from_environment()
    quiet, lock = QuietOutput(launch.rank), RunLock(configuration.folder.path)
    with leaving_without_absent_hosts(launch) as met, quiet, SwapFolders() as swap, lock:
        from dstrain import distributed
        from dstrain.resilience.causes import how_it_ended, rename_error
        from dstrain.resilience.safety import Safety

        pauses = args.model.compile is not None or args.run.profile
        safety = Safety(launch.rank, args.run.hang_timeout, pauses=pauses)
        run = None
        try:
            run = _build(args, configuration, startup, safety, swap, met)
            begin(run, quiet, lock)
            with run.profiler:
                yield run
            safety.stop.signals.ignore()
            distributed.leave()
        except BaseException as caught:
            error = rename_error(caught)
            code, reason = how_it_ended(error)
            reason = safety.failing(code, reason)
            if code == ExitCode.CRASH:
                traceback.print_exc()  # into the rank's log; the screen gets it when this process ends
            if run is not None and run.monitor is not None:
                if code == ExitCode.NON_FINITE:  # agreed by all ranks: a good checkpoint may still be under way
                    run.finish_saves()
                else:
                    run.checkpoints.settle()
                with suppress(OSError):  # a full disk takes no summary: the supervisor or the next start writes it
                    run.end(code, reason)
            if error is not caught:
                raise error from caught
            raise
        finally:
            safety.close()
            if run is not None and run.loader is not None:
                run.loader.close()


def _build(args: Arguments, configuration: Configuration, startup: Startup, safety: Any, swap: Any, met: Event) -> Run:
    """Everything but the run folder: a start that is refused here has written nothing. met: set once the ranks have."""
    from dstrain import distributed
    from dstrain.engine import build_engine
    from dstrain.models.config import load_model_config
    from dstrain.monitor.profiler import build_profiler
    from dstrain.planner.foresight import foresee
    from dstrain.verify import gate

    launch, folder, run = Launch.from_environment(), configuration.folder, args.run
    startup.done("imports")
    config = load_model_config(args.model)
    tokenizer, block_size = tokenizer_and_block(args, config)
    _check_model(args, config, configuration.resolved)
    resolved = _with_facts(configuration.resolved, config)
    foresight = foresee(args, config, resolved, block_size)
    startup.done("model_config")
    _join_process_group(resolved, launch, safety, met)
    _check_hosts(args, resolved, config, launch, is_new=not configuration.stored)
    startup.done("process_group")
    data = _build_data(args, tokenizer, block_size, launch)
    startup.done("data")
    total_steps = _total_steps(run, data.train, resolved.global_batch)
    resolved = swap.localize(resolved.with_total_steps(total_steps))
    identity = _identity(args, config, data.identity, block_size, resolved.global_batch)
    if not run.overwrite_output_dir:
        folder.check_identity(identity)
    if run.verify:
        gate(replace(args, run=replace(run, deepspeed_config=resolved.facts.source)))
        startup.done("verify")
    foresight.check(distributed.device(), ignore_limit=run.ignore_memory_limit)
    startup.done("prediction")
    model = _build_model(args, config, resolved, launch.rank)
    startup.done("model")
    safety.beat("start", 0)
    # Dropout only. Ranks that share a sample share the seed: tensor-parallel peers must drop the same units.
    distributed.seed_everything(run.seed + resolved.parallel.dp_rank(launch.rank))
    # What is imported by now stays: DeepSpeed collects garbage up to six times while it starts, 0.4 s each otherwise.
    gc.freeze()
    engine = build_engine(model, resolved, compile=args.model.compile, label_smoothing=args.run.label_smoothing_factor)
    startup.done("engine")
    return Run(
        args=args,
        resolved=resolved,
        folder=folder,
        launch=launch,
        startup=startup,
        identity=identity,
        tokenizer=tokenizer,
        block_size=block_size,
        data=data,
        total_steps=total_steps,
        engine=engine,
        checkpoints=_build_checkpoints(args, folder, engine, tokenizer, identity, total_steps),
        safety=safety,
        profiler=build_profiler(folder.path, resolved.deepspeed, trace=run.profile, is_main=launch.is_main),
        foresight=foresight,
        best=Best(run.early_stopping_patience, run.early_stopping_threshold),
    )


def _total_steps(run: RunArguments, train: Any, global_batch: int) -> int:
    """train: `Samples`; a stream has no length, and is refused without --max_steps."""
    return run.max_steps if run.max_steps > 0 else math.ceil(run.num_train_epochs * len(train) / global_batch)


def _build_checkpoints(
    args: Arguments, folder: RunFolder, engine: Any, tokenizer: Any, identity: dict, total_steps: int
) -> Any:
    from dstrain.checkpoint.export import model_files
    from dstrain.checkpoint.manager import CheckpointManager

    return CheckpointManager(
        folder.checkpoints,
        engine.deepspeed,
        save_steps=args.run.save_steps,
        save_total_limit=args.run.save_total_limit,
        background=True,
        model_files=lambda: model_files(engine.model, tokenizer),
        description={"arguments": args.to_dict(), "identity": identity},
        total_steps=total_steps,
    )


def tokenizer_and_block(args: Arguments, config: Any) -> tuple[Any, int]:
    """The tokenizer and the block size, both checked against the model."""
    from dstrain.data.tokenization import build_tokenizer, num_token_ids
    from dstrain.models.config import check_block_size, check_vocabulary, max_positions

    # A model that is only a JSON file has no tokenizer of its own.
    source = args.model.model_name_or_path or args.model.config_name
    assert source is not None, "`read_configuration` refuses a start without a model"
    name = args.model.tokenizer_name or ("bytes" if source.endswith(".json") else source)
    tokenizer = build_tokenizer(name, args.model.trust_remote_code, args.model.chat_template)
    check_vocabulary(config, num_token_ids(tokenizer), name)
    block_size = args.data.block_size or min(1024, max_positions(config) or 1024)
    check_block_size(config, block_size)
    return tokenizer, block_size


def _check_model(args: Arguments, config: Any, resolved: ResolvedConfig) -> None:
    """Refuse what this type of model cannot do."""
    from dstrain.models.packed import check_packing
    from dstrain.models.sequence import check_sequence_parallel

    check_sequence_parallel(config, resolved.parallel)
    check_packing(config, args, resolved)


def _join_process_group(resolved: ResolvedConfig, launch: Launch, safety: Any, met: Event) -> None:
    """Build the ops that this configuration needs, once per host, while the other ranks wait at the rendezvous."""
    from dstrain.launch.ops import ask_cpu_once, build_ops, required_builders
    from dstrain.meeting import meet
    from dstrain.monitor.logs import screen

    ask_cpu_once()
    if launch.is_main_on_host:
        builders = required_builders(resolved.deepspeed, resolved.facts.device)
        build_ops(builders, say=lambda text: print(text, file=screen()))
    if "RANK" not in os.environ and any(name.startswith("ACCELERATE_") for name in os.environ):
        why = "without --use_deepspeed it starts one on a machine without GPUs"
        print(f"accelerate started one plain process ({why}): training in one process", file=screen())
    meet()
    met.set()
    safety.join(os.environ["MASTER_ADDR"])


def _check_hosts(args: Arguments, resolved: ResolvedConfig, config: Any, launch: Launch, *, is_new: bool) -> None:
    from dstrain.alike import check_alike

    check_alike(args, resolved, config, launch, is_new=is_new)


def _build_model(args: Arguments, config: Any, resolved: ResolvedConfig, rank: int) -> Any:
    """The model, or this rank's stages of it."""
    from dstrain import distributed
    from dstrain.models.build import build_model, parameter_dtype
    from dstrain.models.pipeline_build import build_stages

    common = {"seed": args.run.seed, "dtype": parameter_dtype(resolved), "device": distributed.device()}
    dims = resolved.parallel
    if dims.pp_size > 1:
        return build_stages(args.model, config, resolved.placement, dims.pp_rank(rank), **common)
    zero3_config = resolved.deepspeed if resolved.zero_stage == 3 else None
    return build_model(args.model, config, zero3_config=zero3_config, **common)


def _identity(args: Arguments, config: Any, data: Any, block_size: int, global_batch: int) -> dict[str, Any]:
    """What makes a run this run: with any of it changed, going on would be another one."""
    from dstrain.models.adapters import adapter_identity
    from dstrain.models.config import model_identity

    identity = {"model": model_identity(config), **adapter_identity(args.model), "data": data, "seed": args.run.seed}
    return {**identity, "block_size": block_size, "global_batch": global_batch}


def _with_facts(resolved: ResolvedConfig, config: Any) -> ResolvedConfig:
    """With what the rules should know of the model and of what the accelerator offers."""
    from deepspeed.accelerator import get_accelerator

    from dstrain.models.tensor import partition_config

    accelerator = get_accelerator()
    return resolved.with_facts(
        device=accelerator.device_name(),
        device_supports_fp16=bool(accelerator.is_fp16_supported()),
        device_supports_bf16=bool(accelerator.is_bf16_supported()),
        hidden_size=config.get_text_config().hidden_size,
        partition_config=partition_config(config, resolved),
    )


def _build_data(args: Arguments, tokenizer: Any, block_size: int, launch: Launch) -> Any:
    from dstrain import distributed
    from dstrain.data import build_data
    from dstrain.data.build import check_same_data
    from dstrain.meeting import share_problems

    try:
        data = build_data(
            args.data,
            tokenizer,
            seed=args.run.seed,
            block_size=block_size,
            is_main_per_host=launch.is_main_on_host,
            barrier=distributed.barrier,
        )
    except UserError as error:
        with suppress(UserError):
            share_problems(error.problems)
        raise
    share_problems(())
    check_same_data(distributed.gather_objects((socket.gethostname(), data.samples_sha256)))
    return data
