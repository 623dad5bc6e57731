"""What reaches the other hosts as it was written, of a command line and of variables, through pdsh and mpirun.

deepspeed 0.19.8 hands pdsh one line for the other hosts' shells (`PDSHRunner.get_cmd`): a flag with a space gets double
quotes around it, other flags none; `MultiNodeRunner.add_export` does the same to values of variables with any
sign but a few. pdsh itself replaces %h, %n and %u. mpirun hands flags on as they are, and values with those quotes.
"""

import re
from collections.abc import Sequence

from dstrain.errors import UserError
from dstrain.launch.hosts import read_hostfile
from dstrain.launch.words import flag_value, hostfile_of, launcher_of

PLAIN = re.compile(r"[\w@%+=:,./-]*")  # values that get no quotes
_PDSH_WORD = re.compile(r"%[hnu%]")
_IN_QUOTES = {"$": "a $", "`": "a backtick", "\\": "a backslash", "\n": "a line break"}
_BARE = {sign: f"a {sign}" for sign in "\"'|&;<>()*?{}"} | {"\t": "a tab", **_IN_QUOTES}


def value_problem(value: str) -> str | None:
    """Why a variable would have another value on the other hosts, or None."""
    if value != value.strip():
        return "white space at an end"
    return _found(value, {**_IN_QUOTES, '"': "a double quote"})


def word_problem(word: str) -> str | None:
    """Why a word of the command line would be another one behind pdsh, or None."""
    if " " in word:
        return _found(word, _IN_QUOTES)
    if not word:
        return "nothing in it"
    return f"a {word[0]} at its start" if word[0] in "~#" else _found(word, _BARE)


def _found(text: str, signs: dict[str, str]) -> str | None:
    if match := _PDSH_WORD.search(text):
        return match[0]
    return next((name for sign, name in signs.items() if sign in text), None)


def check_words(command: Sequence[str]) -> None:
    """Refuse a `deepspeed --hostfile` start whose flags would arrive as others. Raises UserError."""
    hostfile, launcher = hostfile_of(command), launcher_of(command)
    if (
        hostfile is None
        or flag_value(launcher, "--launcher") not in (None, "pdsh")
        or len(read_hostfile(hostfile)) == 1
    ):
        return
    problems = [
        f"{word!r} has {problem}, which the shells behind pdsh change: write the flags into a YAML file, and its name "
        "first behind train.py"
        for word in command[len(launcher) + 1 :]
        if (problem := word_problem(word))
    ]
    if problems:
        raise UserError(problems)
