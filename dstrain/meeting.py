"""How the ranks of all hosts meet, and how one that cannot go on says so to the others.

Imports no transformers: the host may lack a part of it.
"""

import socket
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from dstrain import distributed
from dstrain.errors import UserError

_TELL = timedelta(minutes=2)


def meet() -> None:
    """Join the process group. Raises UserError when a rank has come only to `tell_waiting` that its host cannot."""
    distributed.init_distributed()
    share_problems(())


def tell_waiting(problems: Sequence[str]) -> None:
    """This rank is refused before the ranks have met: those of other hosts would wait for it at the rendezvous.

    Meet them once and say so. They may have found the same, or never come.
    """
    if dist.is_initialized():
        return
    with suppress(UserError, RuntimeError):  # RuntimeError: torch's, of all its kinds, when nobody comes
        distributed.init_distributed(_TELL)
        share_problems(problems)


def share_problems(problems: Sequence[str]) -> None:
    """A collective: what any rank cannot go on for is a UserError of all, with its host's name."""
    found = distributed.gather_objects([f"{socket.gethostname()}: {problem}" for problem in problems])
    if others := sorted({problem for rank in found for problem in rank}):
        raise UserError(others)
