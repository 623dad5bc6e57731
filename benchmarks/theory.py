"""How many bytes a rank has to send in a step, by the method's own arithmetic, and how many it sent. Pure.

Sent bytes of one rank, with rings over N ranks (Patarasu and Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002):
an all-gather of a whole of n bytes or a reduce-scatter of n bytes sends (N-1)/N n; an all-reduce is one after the
other, 2 (N-1)/N n; an all-to-all of n bytes keeps its own part, (N-1)/N n; a send sends n.

**data** (ZeRO, https://arxiv.org/abs/1910.02054, section 7), P bytes of parameters on this model-parallel rank, N ranks
that share them (data x sequence parallel), A micro-batches a step, each of which reduces at stages 2 and 3:
stage 0 reduces and spreads the gradients once, 2 (N-1)/N P; stage 1 scatters the gradients, and gathers the parameters
after the step: the same 2 (N-1)/N P; stage 2 scatters in every micro-batch, (A+1) (N-1)/N P; stage 3 gathers the
parameters for the forward and again for the backward pass of every micro-batch and scatters the gradients:
3 A (N-1)/N P.

**tensor** (Megatron, https://arxiv.org/abs/1909.08053, section 3): every layer all-reduces its activations of
B x S x H elements twice in the forward and twice in the backward pass: A L 4 x 2 (T-1)/T x B S H.

**pipeline**: the first stage sends the activations of every micro-batch, A x B S H, and receives as many gradients.

**sequence** (Ulysses, https://arxiv.org/abs/2309.14509, section 3): every layer exchanges queries, keys, values and its
output, of this rank's S/U tokens, in the forward pass and their gradients in the backward pass:
A L 2 x (U-1)/U x B S/U x (2 Q + 2 K) elements, Q and K the widths of all query and all key-value heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What decides the volume: sizes of the model and of one micro-batch. Elements, unless in `element_bytes`."""

    num_parameters: int
    num_layers: int
    hidden_size: int
    query_width: int
    key_width: int
    micro_batch: int
    block_size: int
    accumulation: int
    element_bytes: int

    @property
    def activation_bytes(self) -> int:
        """What one layer hands to the next for one micro-batch."""
        return self.micro_batch * self.block_size * self.hidden_size * self.element_bytes

    @classmethod
    def of_run(cls, run_json: Mapping[str, Any], model: Mapping[str, Any]) -> "Shape":
        """From run.json and the configuration that the case names."""
        config = run_json["deepspeed_config"]
        heads, hidden = model["num_attention_heads"], model["hidden_size"]
        head_dim = model.get("head_dim") or hidden // heads
        sixteen_bits = any(config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
        return cls(
            num_parameters=run_json["num_parameters"],
            num_layers=model["num_hidden_layers"],
            hidden_size=hidden,
            query_width=heads * head_dim,
            key_width=(model.get("num_key_value_heads") or heads) * head_dim,
            micro_batch=config["train_micro_batch_size_per_gpu"],
            block_size=run_json["identity"]["block_size"],
            accumulation=config["gradient_accumulation_steps"],
            element_bytes=2 if sixteen_bits else 4,
        )


def data_bytes(stage: int, ranks: int, parameter_bytes: float, accumulation: int = 1) -> float:
    """Sent by a rank in a step for ZeRO `stage` over `ranks` that share the parameters. See the module's text."""
    wholes = {0: 2, 1: 2, 2: 1 + accumulation, 3: 3 * accumulation}[stage]
    return wholes * (ranks - 1) / ranks * parameter_bytes


def theory_bytes(shape: Shape, *, stage: int, dp_size: int, tp_size: int, pp_size: int, sp_size: int) -> dict:
    """Kind of parallelism -> bytes that the first rank sends in a step; kinds that are off are left out."""
    activation = shape.activation_bytes * shape.accumulation
    sharing = dp_size * sp_size
    found = {}
    if sharing > 1:
        parameter_bytes = shape.num_parameters * shape.element_bytes / (tp_size * pp_size)
        found["data"] = data_bytes(stage, sharing, parameter_bytes, shape.accumulation)
    if tp_size > 1:
        found["tensor"] = shape.num_layers * 4 * 2 * (tp_size - 1) / tp_size * activation
    if pp_size > 1:
        found["pipeline"] = float(activation)
    if sp_size > 1:
        widths = 2 * (shape.query_width + shape.key_width)
        part = shape.micro_batch * shape.block_size / sp_size * widths * shape.element_bytes * shape.accumulation
        found["sequence"] = shape.num_layers * 2 * (sp_size - 1) / sp_size * part
    return found


def sent_bytes(op: str, num_bytes: float, ranks: int) -> float:
    """Of one rank for an op of `comms.json` (DeepSpeed's name) over a group of so many ranks."""
    if op.startswith("all_gather"):
        return num_bytes * (ranks - 1)  # `num_bytes` is the own shard
    if op.startswith(("reduce_scatter", "all_to_all")):
        return num_bytes * (ranks - 1) / ranks
    if op.startswith(("all_reduce", "inference_all_reduce")):
        return 2 * num_bytes * (ranks - 1) / ranks
    return num_bytes


def measured_bytes(
    per_step: Mapping[str, Mapping[str, Any]],
    shape: Shape,
    *,
    dp_size: int,
    tp_size: int,
    pp_size: int,
    sp_size: int,
) -> dict[str, float]:
    """The same kinds, from `per_step` of comms.json.

    The table knows no groups. All-reduces of exactly one micro-batch's activations are the tensor-parallel ones; what
    data parallelism reduces in a group of one rank goes nowhere and is left out.
    """
    found: dict[str, float] = {}

    def total(prefixes: tuple[str, ...], ranks: int, *, activations: bool | None = None) -> float:
        messages = (
            (op, float(size), count)
            for op, row in per_step.items()
            if op.startswith(prefixes)
            for size, count in row["sizes"].items()
        )
        return sum(
            sent_bytes(op, size, ranks) * count
            for op, size, count in messages
            if activations is None or activations == (size == shape.activation_bytes)
        )

    reductions = ("all_reduce", "inference_all_reduce", "all_gather", "reduce_scatter", "reduce")
    if dp_size * sp_size > 1:
        found["data"] = total(reductions, dp_size * sp_size, activations=False if tp_size > 1 else None)
    if tp_size > 1:
        found["tensor"] = total(("all_reduce", "inference_all_reduce"), tp_size, activations=True)
    if pp_size > 1:
        found["pipeline"] = total(("send", "isend"), 2)
    if sp_size > 1:
        found["sequence"] = total(("all_to_all",), sp_size)
    return found
