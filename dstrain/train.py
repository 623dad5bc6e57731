"""Train a Hugging Face causal language model with DeepSpeed.

    deepspeed --hostfile hostfile dstrain/train.py --deepspeed_config ds_configs/zero2.json --config_name M
    torchrun --nproc_per_node 2 dstrain/train.py ...
    accelerate launch --use_deepspeed --deepspeed_config_file ds_configs/zero2.json dstrain/train.py ...
    python dstrain/train.py ...                                                               (one process)

`train` is the loop. `dstrain/prepare.py` builds what it needs; `main` turns every kind of end into its exit code.
"""

import sys
import time
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)  # running by path puts this folder first: our `data` would hide another module of that name

from dstrain.arguments import parse_arguments
from dstrain.errors import ExitCode, UserError
from dstrain.parallel import Launch
from dstrain.prepare import prepare, read_configuration
from dstrain.run import Run, Startup


def train(run: Run) -> ExitCode:
    """One global batch, one optimizer step and one line of metrics at a time, from `run.state` to the last step."""
    state = run.state
    while state.step < run.total_steps:
        start = time.perf_counter()
        batches = next(run.loader)
        data_time_s = time.perf_counter() - start
        result = run.engine.train_batch(batches)
        state = state.advance(run.resolved.global_batch, skipped=result.skipped)
        run.monitor.on_step(state.step, result, time.perf_counter() - start, data_time_s)
        run.profiler.step()
        if result.skipped:
            continue
        run.startup.first_step_done(run.folder)
        if run.eval_is_due(state.step):
            run.evaluate(state.step)
        if run.checkpoints.is_due(state.step):
            run.save(state)
        if reason := run.stop.agreed():
            run.save(state)
            run.monitor.event(state.step, "stop", reason)
            return ExitCode.STOPPED
    run.evaluate(state.step)
    run.save(state)
    run.show_results()
    return ExitCode.FINISHED


def main(argv: list[str] | None = None) -> int:
    """Read flags, train, and return the exit code of this rank (`dstrain/errors.py` lists them)."""
    startup = Startup.since_process_start()
    try:
        args = parse_arguments(argv)
        with prepare(args, read_configuration(args), startup) as run:
            exit_code = train(run)
            run.end(exit_code, {0: "finished", 75: "stopped on request, after saving"}[exit_code])
            return exit_code
    except UserError as error:
        return report_user_error(error)


def report_user_error(error: UserError) -> int:
    """One line per problem on stderr, once per host: every rank finds the same mistake."""
    if Launch.from_environment().is_main_on_host:
        for problem in error.problems:
            print(f"dstrain: error: {problem}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # a launcher ends all ranks when the first ends: let the one that speaks be the first
    return int(ExitCode.USER_ERROR)


if __name__ == "__main__":
    sys.exit(main())
