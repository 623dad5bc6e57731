"""Train a Hugging Face causal language model with DeepSpeed.

    deepspeed --hostfile hostfile dstrain/train.py --deepspeed_config ds_configs/zero2.json --config_name M
    torchrun --nproc_per_node 2 dstrain/train.py ...
    accelerate launch --use_deepspeed --deepspeed_config_file ds_configs/zero2.json dstrain/train.py ...
    python dstrain/train.py ...                                                               (one process)

`train` is the loop. `dstrain/prepare.py` builds what it needs; `main` turns every kind of end into its exit code.
"""

import sys
import time
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)  # running by path puts this folder first: our `data` would hide another module of that name
if __name__ == "__main__":
    from dstrain.launch.heap import use_own_heap

    use_own_heap()

from dstrain.arguments import parse_arguments
from dstrain.errors import ExitCode, NonFiniteError, UserError
from dstrain.parallel import Launch
from dstrain.prepare import prepare, read_configuration
from dstrain.resilience.exits import ignore_stop_signals, speaks_for_host
from dstrain.run import Run, Startup


def train(run: Run) -> ExitCode:
    """One global batch, one optimizer step and one line of metrics at a time, from `run.state` to the last step."""
    state = run.state
    while state.step < run.total_steps and not run.best.is_enough:
        start = time.perf_counter()
        batches = next(run.loader)
        data_time_s = time.perf_counter() - start
        result = run.engine.train_batch(batches)
        state = state.advance(run.resolved.global_batch, skipped=result.skipped)
        step_time_s = time.perf_counter() - start
        run.monitor.on_step(state.step, result, step_time_s, data_time_s)
        run.safety.on_step(state.step, state.samples_consumed, result, step_time_s, data_time_s)
        run.profiler.step()
        if result.skipped:
            continue
        run.startup.first_step_done(run.folder)
        if run.eval_is_due(state):
            run.evaluate(state.step)
        if run.sample_is_due(state.step):
            run.sample(state.step)
        if run.save_is_due(state.step):
            run.save_on_the_way(state)
        run.note_saves()
        if run.safety.stop.agreed():
            break
    run.evaluate(state.step)
    run.save(state)
    run.finish_saves()
    if reason := run.safety.stop.reason:
        run.monitor.event(state.step, "stop", reason)
        return ExitCode.STOPPED
    run.take_best(state.step)
    run.show_results()
    return ExitCode.FINISHED


def main(argv: list[str] | None = None) -> int:
    """Read flags, train, and return the exit code of this rank (`dstrain/errors.py` lists them)."""
    startup = Startup.since_process_start()
    try:
        args = parse_arguments(argv)
        with prepare(args, read_configuration(args), startup) as run:
            exit_code = train(run)
            run.end(exit_code, {0: "finished", 75: f"stopped after saving: {run.safety.stop.reason}"}[exit_code])
            return exit_code
    except NonFiniteError as error:
        return report_problems([str(error)], ExitCode.NON_FINITE)
    except UserError as error:
        refused = report_problems(error.problems, error.exit_code)
        launch = Launch.from_environment()
        if launch.world_size > launch.local_world_size:
            with suppress(ImportError):  # of a host that lacks torch: it cannot tell
                from dstrain.meeting import tell_waiting

                tell_waiting(error.problems)
        return refused


def report_problems(problems: list[str], exit_code: ExitCode) -> int:
    """One line per problem on stderr, once per host: every rank finds the same."""
    if speaks_for_host():
        for problem in problems:
            print(f"dstrain: error: {problem}", file=sys.stderr, flush=True)
    return int(exit_code)


if __name__ == "__main__":
    exit_code = main()
    ignore_stop_signals()
    sys.exit(exit_code)
