"""What the words of a start command say: which script, which run folder, which hostfile."""

import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from dstrain.arguments import parse_arguments
from dstrain.errors import UserError

SCRIPTS = ("train.py", "dstrain.train")
HOSTFILE = ("-H", "--hostfile")


def find_script(command: Sequence[str]) -> int | None:
    """Where a start command names the training script: ours, or else the first Python file behind a launcher."""
    ours = (i for i, word in enumerate(command) if os.path.basename(word) in SCRIPTS)
    other = (i for i, word in enumerate(command) if i > 0 and word.endswith(".py"))
    return next(ours, next(other, None))


def find_run_folder(command: Sequence[str]) -> Path:
    """The run folder of a start command; checks the script's own flags on the way. Raises UserError."""
    script = find_script(command)
    if script is not None and os.path.basename(command[script]) in SCRIPTS:
        return Path(parse_arguments(list(command[script + 1 :])).run.output_dir)
    if folder := flag_value(command, "--output_dir"):
        return Path(folder)
    raise UserError(
        "the command names neither dstrain/train.py nor --output_dir: write for example "
        "dstrain launch -- torchrun --nproc_per_node 2 dstrain/train.py ..."
    )


def launcher_of(command: Sequence[str]) -> list[str]:
    """The words before the training script; all, where none is named."""
    return list(command[: find_script(command)])


def hostfile_of(command: Sequence[str]) -> str | None:
    """The F of `deepspeed --hostfile F ... SCRIPT ...`; None for another start."""
    if not command or os.path.basename(command[0]) != "deepspeed":
        return None
    return flag_value(launcher_of(command), *HOSTFILE)


def flag_value(words: Sequence[str], *names: str) -> str | None:
    """The last value that one of the flags has: `NAME VALUE` or `NAME=VALUE`."""
    found = None
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        if word in names:
            found = following
        elif word.split("=")[0] in names:
            found = word.split("=", 1)[1]
    return found


def with_flag(words: Sequence[str], value: str | None, *names: str) -> list[str]:
    """The words with this value for one of the flags wherever it is; None takes flag and value out."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word.split("=")[0] in names:
            skip = word in names
            kept += [] if value is None else [word.split("=")[0], value]
        else:
            kept.append(word)
    return kept
