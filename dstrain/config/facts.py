"""What the rules need to know about the run beside its JSON."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run; None and False mean "not known" or "not asked for", and then no rule fires.

    source: name of the JSON for messages. adapters: LoRA adapters are trained, load_in_4bit: beside a model in 4 bits.
    samples: whether the run writes texts on its way. device: "cpu" or "cuda". device_supports_fp16 and has_libaio: what
    the machine offers. hidden_size: the model's width. total_steps: optimizer steps of the whole run. max_micro_batch:
    the largest micro-batch that the memory plan allows. config_only: only the file is looked at (`dstrain config
    check`), so flags such as --gradient_checkpointing are not known. partition_config: AutoTP's, where the model needs
    one.
    """

    source: str = "the DeepSpeed JSON"
    gradient_checkpointing: bool = False
    compile: bool = False
    samples: bool = False
    adapters: bool = False
    load_in_4bit: bool = False
    device: str | None = None
    device_supports_fp16: bool | None = None
    device_supports_bf16: bool | None = None
    has_libaio: bool | None = None
    hidden_size: int | None = None
    total_steps: int | None = None
    max_micro_batch: int | None = None
    config_only: bool = False
    partition_config: dict[str, Any] | None = None


NO_FACTS = RunFacts()
