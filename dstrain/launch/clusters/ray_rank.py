"""Between a Ray worker and its rank: python -m dstrain.launch.clusters.ray_rank dstrain/train.py FLAGS

Ray kills a worker's children with it, and leaves grandchildren alone. So this process goes with the worker, and the
kernel tells the rank by SIGTERM: all ranks agree to save, and the next start loses nothing.
"""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def when_parent_dies(number: int) -> None:
    """Let the kernel send this signal to this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def main(words: Sequence[str]) -> int:
    """Run the program to its end; its exit code, negative for a signal."""
    when_parent_dies(signal.SIGKILL)
    rank = subprocess.Popen([sys.executable, *words], preexec_fn=lambda: when_parent_dies(signal.SIGTERM))
    return rank.wait()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code if code >= 0 else 128 - code)
