"""How a built run begins: what there is to restore, its folder, its monitor and its loader."""

from dataclasses import asdict
from typing import Any

from dstrain.errors import UserError
from dstrain.run import Run
from dstrain.run_folder import environment_facts
from dstrain.run_lock import RunLock


def begin(run: Run, quiet: Any, lock: RunLock) -> None:
    """Restore what there is to restore, then write for the first time: from here on the folder is this run's."""
    from dstrain import distributed
    from dstrain.checkpoint.manager import TrainState
    from dstrain.data.statistics import describe
    from dstrain.models.build import compute_dtype
    from dstrain.monitor.devices import find_peak
    from dstrain.monitor.logs import screen
    from dstrain.monitor.metrics import truncate_to_step

    _lock(run, lock)
    max_time = run.args.run.max_time
    run.safety.listen(run.folder.path, None if max_time is None else run.startup.started + max_time)
    flags = run.args.run
    restored = None if flags.overwrite_output_dir else run.checkpoints.restore(flags.resume_from_checkpoint)
    run.state = restored.state if restored else TrainState()
    run.startup.done("checkpoint")
    peak = find_peak(distributed.device(), compute_dtype(run.resolved))
    tokens = run.resolved.global_batch * run.block_size
    run.foresight.expect(distributed.device(), peak.flops_per_second, tokens)
    if run.launch.is_main:
        if flags.overwrite_output_dir:
            run.folder.clear()
        run.folder.create()
        run.folder.write(_run_json(run, peak))
    distributed.barrier()
    quiet.attach(run.folder.path)
    run.monitor = _build_monitor(run, peak)
    open_steps = run.monitor.load_state_dict(restored.extra) if restored else 0
    if run.launch.is_main:
        truncate_to_step(run.folder.path, run.state.step, open_steps)
    notes = [*(restored.events if restored else []), *(("notice", notice) for notice in run.resolved.notices)]
    notes += [("notice", notice) for notice in [lock.notice] if notice]
    notes += [("memory_limit", problem) for problem in run.foresight.problems]
    notes += [("skipped_rows", text) for text in run.data.notices]
    if run.args.run.co2_country and not distributed.sum_over_ranks([float(run.monitor.energy.has_reading)])[0]:
        notes.append(("notice", "--co2_country: nothing here counts energy (docs/planner.md), so there will be no CO2"))
    if run.launch.is_main:
        print("\n".join(filter(None, [describe(run.data.facts), run.foresight.describe()])), file=screen())
    for name, text in notes:
        run.monitor.event(run.state.step, name, text)
    if reason := run.engine.plain_loss_reason:
        run.monitor.event(run.state.step, "plain_loss", f"the loss is not fused into the head: {reason}")
    run.begin_data(restored.extra if restored else {})
    run.loader = _build_loader(run)
    run.begin_safety()
    if restored:
        run.restore_evaluations(restored.extra)
    if run.state.step and run.eval_is_due(run.state):
        run.evaluate(run.state.step)  # what a stop cut short


def _lock(run: Run, lock: RunLock) -> None:
    """Rank 0 locks the run folder for all. A collective; raises the same UserError on every rank."""
    from dstrain import distributed

    problems: list[str] = []
    if run.launch.is_main:
        try:
            lock.take()
        except UserError as error:
            problems = error.problems
    if problems := distributed.gather_objects(problems)[0]:
        raise UserError(problems)


def _run_json(run: Run, peak: Any) -> dict[str, Any]:
    from dstrain.models.flops import num_parameters

    parallel = run.resolved.parallel
    return {
        "arguments": run.args.to_dict(),
        "identity": run.identity,
        "deepspeed_config": run.resolved.deepspeed,
        "origins": run.resolved.origins,
        "notices": run.resolved.notices,
        "world": {**asdict(parallel), "dp_size": parallel.dp_size},
        "total_steps": run.total_steps,
        "num_parameters": num_parameters(run.engine.model),
        "num_trainable_parameters": num_parameters(run.engine.model, trainable=True),
        "attn_implementation": run.engine.model.config._attn_implementation,
        "prediction": run.foresight.prediction,
        "data": {"source": run.data.source, "sha256": run.data.sha256, **run.data.facts},
        **vars(peak),
        **environment_facts(),
    }


def _build_monitor(run: Run, peak: Any) -> Any:
    from dstrain import distributed
    from dstrain.models.flops import flops_per_token
    from dstrain.monitor.energy import build_energy_meter
    from dstrain.monitor.monitor import Monitor, RunScale
    from dstrain.monitor.progress import build_progress
    from dstrain.monitor.trackers import build_trackers

    is_main = run.launch.is_main
    return Monitor(
        run.folder.path,
        device=distributed.device(),
        is_main=is_main,
        logging_steps=run.args.run.logging_steps,
        total_steps=run.total_steps,
        scale=RunScale(run.launch.world_size, flops_per_token(run.engine.model, run.block_size), peak.peak_tflops),
        max_over_ranks=distributed.max_over_ranks,
        progress=build_progress(run.total_steps, is_main=is_main),
        trackers=build_trackers(run.engine.deepspeed.monitor) if is_main else None,
        energy=build_energy_meter(distributed.device(), is_main_on_host=run.launch.is_main_on_host),
    )


def _build_loader(run: Run) -> Any:
    from dstrain.data.loader import build_loader
    from dstrain.data.tokenization import pad_token_id

    parallel = run.resolved.parallel
    return build_loader(
        run.data.train,
        seed=run.args.run.seed,
        global_batch=run.resolved.global_batch,
        micro_batch=run.resolved.micro_batch,
        dp_rank=parallel.dp_rank(run.launch.rank),
        dp_size=parallel.dp_size,
        samples_consumed=run.state.samples_consumed,
        pad_token_id=pad_token_id(run.tokenizer),
    )
