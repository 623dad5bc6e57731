"""What the fork server of `parity.py` imports once for all ranks."""

import deepspeed  # noqa: F401
import transformers  # noqa: F401
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

import dstrain.checkpoint.manager  # noqa: F401
import dstrain.engine  # noqa: F401
import dstrain.models.build  # noqa: F401
import dstrain.train  # noqa: F401
