"""Slurm: a batch script that starts a rank a task, and asks to be queued again when going on makes sense."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from dstrain.errors import ExitCode
from dstrain.launch.clusters.description import SCHEDULED, RunDescription, Written, quoted

TAKES = SCHEDULED | {"time_limit", "engine_args"}
_FINAL = (ExitCode.FINISHED, ExitCode.USER_ERROR, ExitCode.NON_FINITE, ExitCode.VERIFY_FAILED)


def write(description: RunDescription) -> Written:
    """The script, as NAME.sbatch in this folder, and the sbatch that submits it."""
    templates = Environment(
        loader=PackageLoader("dstrain.launch.clusters", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    templates.filters["quoted"] = lambda word: quoted([word])
    place = {
        "RANK": "$SLURM_PROCID",
        "LOCAL_RANK": "$SLURM_LOCALID",
        "WORLD_SIZE": "$SLURM_NTASKS",
        "LOCAL_WORLD_SIZE": str(description.num_procs_per_node),
    }
    named = " ".join(f"{name}={value}" for name, value in place.items())
    ranks = ["bash", "-c", f'{named} exec python "$@"', "rank", description.script, *description.flags]
    text = templates.get_template("slurm.sbatch.jinja").render(
        run=description,
        ranks=quoted(ranks),
        final="|".join(str(int(code)) for code in _FINAL),
        stopped=int(ExitCode.STOPPED),
    )
    path = f"{description.name}.sbatch"
    return Written(("sbatch", *description.engine_args, path), {path: text})
