"""A model to ask: of a run folder, a checkpoint of any layout, a folder of Hugging Face or of peft, or the hub."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dstrain import distributed
from dstrain.arguments import ModelArguments
from dstrain.checkpoint.export import DTYPES, export, find_checkpoint, holds_adapters
from dstrain.checkpoint.manifest import read_manifest
from dstrain.checkpoint.peft_folder import adapter_dtype, base_of, is_peft_folder, write_merged
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
    base_model: str | None = None,
) -> LoadedModel:
    """Load a model on this rank's device; a collective where there is a process group. Raises UserError.

    name: a run folder (its newest checkpoint), a step_* folder, a Hugging Face folder, one of peft's adapters or a hub
    name. A checkpoint, and adapters merged into their base, are written as a Hugging Face folder for the moment, once
    on each host. dtype: a name of `DTYPES`; None: as stored. base_model: where the base of adapters is now, if not as
    in training.
    """
    margs = ModelArguments(
        model_name_or_path=name,
        tokenizer_name=tokenizer_name,
        chat_template=chat_template,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    write: Callable[[Path], Any]
    if is_peft_folder(Path(name)):
        own = (Path(name) / "tokenizer_config.json").is_file()
        margs = replace(margs, tokenizer_name=tokenizer_name or (name if own else base_model or base_of(Path(name))))
        write, block_size = partial(_merge, Path(name), base_model, dtype, trust_remote_code), None
    elif (checkpoint := _find(name)) is not None:
        write = partial(export, checkpoint, merge=holds_adapters(checkpoint), base=base_model)
        name, block_size = str(checkpoint), read_manifest(checkpoint).contents.get("identity", {}).get("block_size")
    elif base_model:
        raise UserError(f"{name} is a whole model, and no adapters to merge: leave --base_model out")
    else:
        return _load(margs, dtype, name, None)
    with tempfile.TemporaryDirectory(prefix="dstrain_model_") as scratch:
        folder = _write_on_host(write, Path(scratch, "model"))
        loaded = _load(replace(margs, model_name_or_path=folder), dtype, name, block_size)
        distributed.barrier()  # the others of this host read there too
        return loaded


def _merge(folder: Path, base: str | None, dtype: str | None, trust_remote_code: bool, out: Path) -> None:
    """In the type of the adapters, which is that of their training where dstrain wrote them."""
    wanted = DTYPES[dtype] if dtype else adapter_dtype(folder)
    write_merged(folder, out, base or base_of(folder), wanted, trust_remote_code=trust_remote_code)


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
            f"{name} holds neither a complete checkpoint nor a config.json or adapter_config.json: name a run folder, "
            "a step_* folder, a folder of Hugging Face or of peft, or a hub name"
        ) from None


def _write_on_host(write: Callable[[Path], Any], out: Path) -> str:
    """Where the first process of this host has written the model. Raises UserError, on every rank."""
    launch, problems = Launch.from_environment(), []
    if launch.is_main_on_host:
        try:
            write(out)
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
