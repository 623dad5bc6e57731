"""The start-up check of `--packing`: do documents that share a row see each other in this very model?

Hugging Face's models tell documents apart by position_ids that begin anew, from which transformers makes their masks.
Some never look at them (recurrent and state-space models, whose state runs on), and flash attention only in a batch of
one row (transformers 5.23, `_is_packed_sequence`). None of them says so, and the loss of such a run looks as any other.
"""

import copy
import itertools
from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dstrain import distributed
from dstrain.arguments import Arguments, ModelArguments
from dstrain.config import ResolvedConfig
from dstrain.errors import UserError
from dstrain.models.build import build_skeleton, compute_dtype
from dstrain.models.config import layer_kinds, make_shallow, one_line

MAX_LAYERS = 4
# What the copy of a configuration has at most: it is quick, and documents are longer than its windows.
_AT_MOST = {
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "pad_token_id": 63,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_kv_shared_layers": 0,
    "sliding_window": 4,
    "attention_chunk_size": 4,
    "output_router_logits": False,
}
_ROWS = ((9, 7, 3), (6, 12))  # lengths of the documents in each row; the second row is padded


def check_packing(config: PreTrainedConfig, args: Arguments, resolved: ResolvedConfig) -> None:
    """Refuse `--packing` where the logits of packed documents are not those of each document alone. Raises UserError.

    Tried on a copy of the model with few layers, a small vocabulary and weights of its own, with the attention and the
    rows per micro-batch of the run. A function of the flags alone: every rank finds the same.
    """
    if not args.data.packing:
        return
    margs, rows, dtype = args.model, min(resolved.micro_batch, len(_ROWS)), compute_dtype(resolved)
    device = distributed.device()
    difference, attention = packing_difference(config, margs, rows, dtype, device)
    if difference <= bound_of(attention):
        return
    remedy = "leave --packing out"
    for name in ("sdpa", "eager"):
        other = replace(margs, attn_implementation=name)
        with suppress(UserError):  # a model without it
            if name != attention and packing_difference(config, other, rows, dtype, device)[0] <= bound_of(name):
                remedy = f"write --attn_implementation {name}, or {remedy}"
                break
    if rows > 1 and packing_difference(config, margs, 1, dtype, device)[0] <= bound_of(attention):
        remedy = f"set train_micro_batch_size_per_gpu to 1, {remedy}"
    raise UserError(
        f"--packing: documents in one row see each other in {config.model_type} with {attention} attention (logits "
        f"differ by {difference:.0e} from those of a document alone): {remedy}"
    )


def bound_of(attention: str) -> float:
    """Largest difference, relative to the largest logit: in fp32, or in the 16 bits that flash attention takes.

    Over 181 model types, rounding in fp32 is at most 2e-6, and what is seen at least 6e-2.
    """
    return 5e-2 if "flash" in attention else 1e-3


@torch.no_grad()
def packing_difference(
    config: PreTrainedConfig, margs: ModelArguments, rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, str]:
    """(largest difference of packed logits from those of a document alone over the largest logit, attention's name).

    rows: 1 or 2 rows of packed documents in the batch. dtype: of the run; only flash attention is tried in it, all else
    in fp32, where rounding hides nothing.
    """
    small = _small(config)
    dtype = dtype if "flash" in (margs.attn_implementation or "") else torch.float32
    model = build_skeleton(margs, small, dtype)
    _fill(model.eval(), device)
    ids, positions = _packed_rows(_ROWS[:rows])
    packed = model(input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False).logits
    errors = []
    for row, lengths in enumerate(_ROWS[:rows]):
        for begin, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
            alone = model(input_ids=ids[row : row + 1, begin:end].to(device), use_cache=False).logits[0]
            errors.append((packed[row, begin:end] - alone).abs().max() / alone.abs().max())
    return torch.stack(errors).max().item(), model.config._attn_implementation


def _small(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of few and narrow layers, of each kind one, and at least two. Raises UserError."""
    small = copy.deepcopy(config)
    try:
        make_shallow(small, min(MAX_LAYERS, max(2, len(set(layer_kinds(small))))))
    except (AttributeError, NotImplementedError, ValueError) as error:  # blt, musicgen, prophetnet
        reason = one_line(error)
        raise UserError(f"--packing cannot be tried on {config.model_type} ({reason}): leave it out") from None
    text = small.get_text_config()
    for name, most in _AT_MOST.items():
        if isinstance(value := getattr(text, name, None), int) and value > most:
            setattr(text, name, most)
    return small


def _packed_rows(rows: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and position_ids, int64 [rows, length], as the loader makes them: padding stands at position 0."""
    longest = max(map(sum, rows))
    positions = [[p for length in lengths for p in range(length)] for lengths in rows]
    ids = (torch.arange(len(rows) * longest) * 7919).remainder(60) + 3  # no special token of any model
    return ids.view(len(rows), longest), torch.tensor([row + [0] * (longest - len(row)) for row in positions])


def _fill(model: PreTrainedModel, device: torch.device) -> None:
    """Give a model on meta weights through which everything shows: noise, in scales around one.

    Weights as they start would hide leaks behind gates and projections that are zero or small. The noise is drawn once
    and laid end to end, at another place for each parameter: a layer of a large model has hundreds of millions.
    """
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).to(device)
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                values = (
                    noise.roll(7919 * len(made)).repeat(-(-old.numel() // len(noise)))[: old.numel()].view(old.shape)
                )
                values = values * max(old.shape[-1:], default=1) ** -0.5 + (old.dim() < 2 and name != "bias")
                made[id(old)] = nn.Parameter(values.to(old.dtype), requires_grad=False)
            module._parameters[name] = made[id(old)]
    model.to(device)
