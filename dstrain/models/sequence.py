"""Sequence parallelism (DeepSpeed-Ulysses): each rank of a group runs its part of every sequence, and of the heads.

Attention sees whole sequences: `UlyssesSPAttentionHF` exchanges positions for heads around the model's own attention
function. What DeepSpeed's own registration drops, the mask, is made here for whole sequences, from what every rank of a
group knows, since it reads the same samples: documents packed into a row, and sliding windows. Padding needs no mask:
it stands at the right, where no token looks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.errors import UserError
from dstrain.models.cross_entropy import IGNORE_INDEX
from dstrain.models.loss import LossHead, shift_labels, token_loss
from dstrain.parallel import ParallelDims

Batch = dict[str, Tensor]


class WholeSequences:
    """No sequence parallelism: every rank runs its samples as they are."""

    mpu: Any = None  # what deepspeed.initialize wants to know about groups

    def part(self, batch: Batch) -> Batch:
        """What this rank runs of a micro-batch."""
        return batch

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the model takes whole sequences, as `generate` gives it."""
        yield

    def repair(self, engine: Any) -> None:
        """Put right what `deepspeed.initialize` made of the groups."""

    def check(self, engine: Any, head: LossHead) -> None:
        """Prove on a few tokens that the parts give the loss of the whole. Raises UserError."""


class SequenceParallel(WholeSequences):
    """Ulysses around the attention function that a model uses. One per process: transformers' table is global."""

    def __init__(self, model: nn.Module, sp_size: int):
        from deepspeed.runtime.sequence_parallel import parallel_state_sp
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        parallel_state_sp.initialize_sequence_parallel(sp_size)
        self.mpu = parallel_state_sp
        self.size, self.rank = sp_size, parallel_state_sp.get_sequence_parallel_rank()
        self.implementation = model.config._attn_implementation
        self._core = ALL_ATTENTION_FUNCTIONS[self.implementation]
        self._exchanges: dict[tuple[int, ...], Any] = {}
        self._positions: Tensor | None = None  # int64 [batch, length] of the whole micro-batch; None: no exchange
        self._masks: dict[int | None, Tensor | None] = {}
        ALL_ATTENTION_FUNCTIONS[self.implementation] = self._attention

    def part(self, batch: Batch) -> Batch:
        """input_ids, labels [batch, length] and position_ids, if any -> this rank's columns, with shifted labels.

        The length is filled up at the right to a multiple of the ranks.
        """
        ids, positions = batch["input_ids"], batch.get("position_ids")
        missing = -ids.shape[1] % self.size
        if positions is None:
            positions = torch.arange(ids.shape[1] + missing, device=ids.device).expand(len(ids), -1)
        else:
            positions = nn.functional.pad(positions, (0, missing))
        self._positions, self._masks = positions, {}
        length = (ids.shape[1] + missing) // self.size
        columns = slice(self.rank * length, (self.rank + 1) * length)
        target = nn.functional.pad(shift_labels(batch["labels"]), (0, missing), value=IGNORE_INDEX)
        return {
            "input_ids": nn.functional.pad(ids, (0, missing))[:, columns].contiguous(),
            "position_ids": positions[:, columns].contiguous(),
            "shift_labels": target[:, columns].contiguous(),
        }

    @contextmanager
    def whole(self) -> Iterator[None]:
        kept, self._positions = self._positions, None
        try:
            yield
        finally:
            self._positions = kept

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Stands in for the attention function; query [batch, heads, length, head_dim], key and value alike."""
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = (
                query.shape[1] // key.shape[1]
            )  # the exchange changes it where it repeats heads
        if self._positions is None:
            return self._core(module, query, key, value, mask, *args, **kwargs)
        positions = self._positions
        part = positions.shape[1] // self.size
        kwargs["position_ids"] = positions[:, self.rank * part : (self.rank + 1) * part].contiguous()
        shape = (query.shape[0], query.shape[1], key.shape[1], query.shape[3])
        if shape not in self._exchanges:
            self._exchanges[shape] = self._exchange(*shape)
        whole_mask = self._mask(kwargs.get("sliding_window") or getattr(module, "sliding_window", None))
        output, weights = self._exchanges[shape](module, query, key, value, whole_mask, *args, **kwargs)
        return output.unflatten(-1, (query.shape[1], -1)), weights  # as attention functions return it, heads apart

    def _exchange(self, batch: int, heads: int, kv_heads: int, head_dim: int) -> nn.Module:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        return UlyssesSPAttentionHF(
            attn=self._core,
            batch_size=batch,
            attn_head_count=heads,
            attn_head_size=head_dim,
            kv_head_count=kv_heads,
            num_hidden_layers=1,
            process_group=self.mpu.get_sequence_parallel_group(),
            seq_length_is_variable=True,
        )

    def _mask(self, window: int | None) -> Tensor | None:
        """The whole micro-batch's mask; flash attention sees documents in positions and takes the window itself."""
        if self.implementation != "sdpa":
            return None
        if window not in self._masks:
            self._masks[window] = attention_mask(self._positions, window)
        return self._masks[window]

    def repair(self, engine: Any) -> None:
        """BF16_Optimizer holds whole gradients on every rank, but counts them on a group's first rank only (DeepSpeed
        0.19.8, `get_grads_for_norm`), which ends the other ranks; without groups it counts them once.
        """
        if type(engine.optimizer).__name__ == "BF16_Optimizer":
            engine.optimizer.mpu = None

    @torch.no_grad()
    def check(self, engine: Any, head: LossHead) -> None:
        model, config = head.model, head.model.config.get_text_config()
        model.eval()
        ids = (torch.arange(16 * self.size, device=engine.device) * 7919 + 1).remainder(config.vocab_size)[None]
        batch = {"input_ids": ids, "labels": ids}
        with self.whole():
            whole, _ = token_loss(engine, head, batch)
        try:
            parts, _ = token_loss(engine, head, self.part(batch))
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(f"{_prefix(model, self.size)}: {' '.join(str(error).split())[:300]}") from None
        torch.distributed.all_reduce(parts, group=self.mpu.get_sequence_parallel_group())
        exact = next(model.parameters()).dtype == torch.float32 and not engine.torch_autocast_enabled()
        if not torch.isclose(parts, whole, rtol=1e-4 if exact else 2e-2):
            raise UserError(
                f"{_prefix(model, self.size)}: the loss of a sequence is {parts:.6g} in parts, {whole:.6g} whole: "
                "use tensor_parallel.autotp_size or ZeRO alone"
            )


def attention_mask(positions: Tensor, window: int | None) -> Tensor | None:
    """bool [batch, 1, length, length], True where a query may look; None where that is everything before it.

    positions int64 [batch, length], which start anew with each document. window: positions that a query sees, its own
    included. The same as transformers' masking_utils make.
    """
    length, device = positions.shape[1], positions.device
    starts = positions[:, 1:] != positions[:, :-1] + 1
    packed = bool(starts.any())
    if not packed and (window is None or window >= length):
        return None
    query, key = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)[None]
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    mask = mask[None, None]
    if packed:
        document = nn.functional.pad(starts.long().cumsum(1), (1, 0))
        mask = mask & (document[:, None, :, None] == document[:, None, None, :])
    return mask.expand(len(positions), -1, -1, -1)


def _prefix(model: nn.Module, sp_size: int) -> str:
    return f"sequence_parallel_size {sp_size} does not work for {type(model).__name__}"


def check_sequence_parallel(config: Any, dims: ParallelDims) -> None:
    """Refuse what Ulysses cannot split, from the model's configuration alone. Raises UserError."""
    if dims.sp_size == 1:
        return
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    problems = []
    if heads % dims.sp_size:
        problems.append(f"does not divide the model's {heads} attention heads")
    if kv_heads % dims.sp_size and dims.sp_size % kv_heads:
        problems.append(f"neither divides the model's {kv_heads} key-value heads nor is a multiple of them")
    special = sorted(set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"})
    if special:
        problems.append(f"cannot split {', '.join(special)} layers, which look along the sequence by other means")
    if getattr(text, "output_router_logits", False):
        problems.append("would balance the experts over parts of a sequence: set output_router_logits=false")
    if problems:
        raise UserError([f"sequence_parallel_size {dims.sp_size} {problem}" for problem in problems])


def build_sequence_parallel(model: nn.Module, dims: ParallelDims) -> WholeSequences:
    """Put Ulysses around the model's attention where the configuration asks for it. Before deepspeed.initialize.

    Raises UserError.
    """
    if dims.sp_size == 1:
        return WholeSequences()
    implementation = model.config._attn_implementation
    if implementation != "sdpa" and "flash" not in implementation:
        raise UserError(
            f"sequence_parallel_size needs sdpa or flash attention, and {type(model).__name__} uses {implementation}: "
            "write --attn_implementation sdpa, or leave sequence_parallel_size out"
        )
    return SequenceParallel(model, dims.sp_size)
