"""What an error means for the exit code: some that libraries raise are not crashes."""

import errno

from dstrain.errors import ExitCode, NonFiniteError, UserError

AT_MINIMUM_SCALE = "loss scale already at minimum"  # DynamicLossScaler.update_scale (0.19.8) raises a bare Exception
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


def rename_error(error: BaseException) -> BaseException:
    """An error of a library as the one of ours that it is; any other as it is."""
    if type(error) is Exception and AT_MINIMUM_SCALE in str(error):
        return NonFiniteError(
            "the fp16 loss scale is at its minimum and gradients still overflow: use bf16, or lower lr"
        )
    if isinstance(error, OSError) and error.errno in _DISK_IS_FULL:
        where = error.filename or "the disk of --output_dir"
        return UserError(f"{where}: {error.strerror}: free space, then start again from the newest checkpoint")
    return error


def how_it_ended(error: BaseException) -> tuple[ExitCode, str]:
    """(exit code, reason) of a renamed error."""
    if isinstance(error, UserError):
        return ExitCode.USER_ERROR, "; ".join(error.problems)
    if isinstance(error, NonFiniteError):
        return ExitCode.NON_FINITE, str(error)
    return ExitCode.CRASH, f"{type(error).__name__}: {error}"
