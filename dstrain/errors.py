"""How a run ends: the exit codes of every rank, and the error that is the user's to mend."""

from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What every rank returns; a second signal gives 128 + its number."""

    FINISHED = 0
    CRASH = 1
    USER_ERROR = 2
    STOPPED = 75  # on request, after saving: start again to go on
    HUNG = 76
    NON_FINITE = 77
    VERIFY_FAILED = 78


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is not a number, agreed by all ranks; its text names step, ranks and samples."""


class UserError(ValueError):
    """One or more mistakes that the user can mend.

    Each problem is one line that says what is wrong and what to write instead. Entry points print them on stderr,
    without a traceback, and exit with `exit_code`.
    """

    exit_code = ExitCode.USER_ERROR

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        assert self.problems, "a UserError without a problem"
        super().__init__("\n".join(self.problems))


class DiskError(UserError):
    """A checkpoint that the disk did not take: read-only, broken or full. Those before it are kept."""


class DiskFullError(DiskError):
    """There was no room for it, or no quota: the next one may fit again."""


class VerifyError(UserError):
    """This configuration does not give the numbers of plain torch; its text names the first that differs."""

    exit_code = ExitCode.VERIFY_FAILED
