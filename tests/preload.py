"""What the fork server of `tests.forked` imports once for all ranks: the seconds that are the same for each."""

import gc
from contextlib import suppress

import cpuinfo
import deepspeed
import deepspeed.runtime.zero.muon.original_muon  # imports torch._inductor: two seconds
import torch.utils.cpp_extension  # imports setuptools
import transformers.generation.utils
import transformers.modeling_utils
import transformers.models.llama.modeling_llama

import dstrain.checkpoint.manager
import dstrain.checkpoint.peft_folder
import dstrain.data.build
import dstrain.data.loader
import dstrain.engine
import dstrain.evaluate.held_out
import dstrain.generate.sample
import dstrain.models.build
import dstrain.models.pipeline_build
import dstrain.monitor.monitor
import dstrain.monitor.report
import dstrain.planner.foresight
import dstrain.planner.memory
import dstrain.planner.pace
import dstrain.planner.platform_costs
import dstrain.planner.tracing
import dstrain.resilience.safety
import dstrain.train
import dstrain.verify
from dstrain.launch.ops import ask_cpu_once

with suppress(ImportError):  # an extra
    import bitsandbytes
with suppress(ImportError):
    import peft

__all__ = ["bitsandbytes", "deepspeed", "dstrain", "peft", "torch", "transformers"]
ask_cpu_once()
cpuinfo.get_cpu_info()
gc.freeze()
