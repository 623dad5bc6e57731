"""A model to ask: of a run folder, a checkpoint of any layout, a Hugging Face folder or the hub."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dstrain import distributed
from dstrain.arguments import ModelArguments
from dstrain.checkpoint.export import DTYPES, export, find_checkpoint, holds_adapters
from dstrain.checkpoint.manifest import read_manifest
from dstrain.data.chats import ChatRenderer
from dstrain.data.tokenization import TextEncoder, build_tokenizer, num_token_ids
from dstrain.errors import UserError
from dstrain.models.build import build_model
from dstrain.models.config import check_vocabulary, load_model_config, max_positions
from dstrain.parallel import Launch


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer.

    source: what was read, for a person. block_size: tokens of a sample of its training; None where nobody noted it.
    stop_ids: the tokens that end a text.
    """

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: TextEncoder
    block_size: int | None
    stop_ids: list[int]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model has positions for; None where its configuration names no limit."""
        return max_positions(self.model.config)

    @property
    def max_length(self) -> int | None:
        """The tokens that a prompt and its answer may have: those of a sample of its training, else its positions."""
        return self.block_size or self.positions

    @cached_property
    def chats(self) -> ChatRenderer:
        return ChatRenderer(self.encoder)

    def encode_prompts(self, texts: list[str], are_chats: Sequence[bool] | None = None) -> list[list[int]]:
        """Ids of each prompt as in training: behind the tokens that begin a document, which a chat template writes
        itself. Never empty."""
        prefix = self.encoder.affixes[0].tolist()
        rows = [ids.tolist() for ids in self.encoder.encode(texts)]
        are_chats = are_chats or [False] * len(rows)
        rows = [row if is_chat else [*prefix, *row] for row, is_chat in zip(rows, are_chats, strict=True)]
        return [row or self.stop_ids[:1] or [0] for row in rows]  # behind the end of the document before


def load(
    name: str,
    *,
    tokenizer_name: str | None = None,
    chat_template: str | None = None,
    attn_implementation: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model on this rank's device; a collective where there is a process group. Raises UserError.

    name: a run folder (its newest checkpoint), a step_* folder, a Hugging Face folder or a hub name. A checkpoint is
    written as a Hugging Face folder for the moment, once on each host, adapters merged into their base. dtype: a name
    of `DTYPES`; None: as stored.
    """
    margs = ModelArguments(
        model_name_or_path=name,
        tokenizer_name=tokenizer_name,
        chat_template=chat_template,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    checkpoint = _find(name)
    if checkpoint is None:
        return _load(margs, dtype, name, None)
    block_size = read_manifest(checkpoint).contents.get("identity", {}).get("block_size")
    with tempfile.TemporaryDirectory(prefix="dstrain_model_") as scratch:
        folder = _export_on_host(checkpoint, Path(scratch, "model"))
        margs = ModelArguments(**{**vars(margs), "model_name_or_path": folder})
        loaded = _load(margs, dtype, str(checkpoint), block_size)
        distributed.barrier()  # the others of this host read there too
        return loaded


def _find(name: str) -> Path | None:
    """The checkpoint that is meant; None: a Hugging Face folder or a hub name. Raises UserError."""
    folder = Path(name)
    if not folder.exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"{name}: there is no such folder: name a run, a checkpoint, a model folder or a hub name")
    if not folder.is_dir() or (folder / "config.json").is_file():
        return None
    try:
        return find_checkpoint(name)
    except UserError:
        raise UserError(
            f"{name} holds neither a complete checkpoint nor a config.json: name a run folder, a step_* folder, "
            "a Hugging Face folder or a hub name"
        ) from None


def _export_on_host(checkpoint: Path, out: Path) -> str:
    """Where the first process of this host has written the checkpoint. Raises UserError, on every rank."""
    launch, problems = Launch.from_environment(), []
    if launch.is_main_on_host:
        try:
            export(checkpoint, out, merge=holds_adapters(checkpoint))
        except UserError as error:
            problems = error.problems
    found = distributed.gather_objects((problems, str(out)))
    if problems := next((theirs for theirs, _ in found if theirs), []):
        raise UserError(problems)
    return found[launch.rank - launch.local_rank][1]


def _load(margs: ModelArguments, dtype: str | None, source: str, block_size: int | None) -> LoadedModel:
    config = load_model_config(margs)
    name = margs.tokenizer_name or str(margs.model_name_or_path)
    tokenizer = build_tokenizer(name, margs.trust_remote_code, margs.chat_template)
    check_vocabulary(config, num_token_ids(tokenizer), name)
    stored = getattr(torch, str(config.dtype or torch.float32).removeprefix("torch."))
    model = build_model(margs, config, seed=0, dtype=DTYPES[dtype] if dtype else stored, device=_device())
    stop_ids = _stop_ids(model.generation_config.eos_token_id, tokenizer)
    # What its authors sample with (temperature, penalties) must not mix with what the caller asks for.
    model.generation_config = GenerationConfig()
    return LoadedModel(source, model.eval(), tokenizer, TextEncoder(tokenizer), block_size, stop_ids)


def _device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    torch.accelerator.set_device_index(Launch.from_environment().local_rank)
    return torch.device(accelerator.type, Launch.from_environment().local_rank)


def _stop_ids(of_model: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end of a text; its beginning, where documents are told apart by that (llama2.c's); the end of a
    turn of its chat template; and what the model's authors name. All of them only if they are special tokens: the
    default of a configuration class (2 for Llama) may be a word."""
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    named = of_model if isinstance(of_model, list) else [of_model]
    ids = [tokenizer.eos_token_id, tokenizer.bos_token_id, *named, *_end_of_turn(tokenizer)]
    return list(dict.fromkeys(i for i in ids if i in special))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The first token that the chat template writes behind an answer."""
    if not tokenizer.chat_template:
        return []
    answer = "qzq"  # in no template
    turns = [{"role": "user", "content": answer}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except TemplateError:  # `ChatRenderer` tells it where a chat is asked for
        return []
    return tokenizer(text[text.rfind(answer) + len(answer) :], add_special_tokens=False)["input_ids"][:1]
