"""A rank of train.py that takes its time, and hangs when it is told to: what `tests.host_faults` starts on hosts.

    python tests/paced.py --deepspeed_config ...     # the flags of train.py; each step takes PACE_S more

While there is a file RUN/hang_N, rank N makes no further step.
"""

import os
import sys
import time
from pathlib import Path

PACE_S = 0.3

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

    from dstrain import engine, pipe_engine
    from dstrain.arguments import parse_arguments
    from dstrain.resilience.exits import ignore_stop_signals
    from dstrain.train import main

    sign = Path(parse_arguments().run.output_dir, f"hang_{os.environ.get('RANK', '0')}")

    def paced(train_batch):
        def step(self, batches):
            time.sleep(PACE_S)
            while sign.exists():
                time.sleep(0.1)
            return train_batch(self, batches)

        return step

    for kind in (engine.ZeroEngine, pipe_engine.PipeEngine):
        kind.train_batch = paced(kind.train_batch)
    exit_code = main()
    ignore_stop_signals()
    sys.exit(exit_code)
