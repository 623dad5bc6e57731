"""What the fork server of `tests.forked` imports once for all ranks: the seconds that are the same for each."""

import gc
from contextlib import suppress

import cpuinfo
import deepspeed
import deepspeed.runtime.zero.muon.original_muon  # imports torch._inductor: two seconds
import transformers.generation.utils
import transformers.modeling_utils
import transformers.models.llama.modeling_llama

import dstrain.checkpoint.manager
import dstrain.data.loader
import dstrain.engine
import dstrain.evaluate
import dstrain.generate
import dstrain.models.build
import dstrain.models.pipeline_build
import dstrain.monitor.monitor
import dstrain.train
from dstrain.launch.ops import ask_cpu_once

with suppress(ImportError):  # an extra
    import peft

__all__ = ["deepspeed", "dstrain", "peft", "transformers"]
ask_cpu_once()
cpuinfo.get_cpu_info()
gc.freeze()
