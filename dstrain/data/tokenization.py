"""Tokenizers: any of Hugging Face's, the built-in byte-level one, and `TextEncoder`, which turns much text into ids."""

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dstrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"


def build_tokenizer(
    name: str, trust_remote_code: bool = False, chat_template: str | None = None
) -> "PreTrainedTokenizerBase":
    """A Hugging Face tokenizer by hub name or folder, or the built-in one for `bytes`.

    chat_template: a Jinja file or its text, in place of the tokenizer's own.
    Raises UserError when there is no such tokenizer or template, or their files are broken.
    """
    tokenizer = _build_byte_tokenizer() if name == "bytes" else _load_tokenizer(name, trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    return tokenizer


def read_template(file_or_text: str) -> str:
    """A chat template: the text of a Jinja file, or the text itself. Raises UserError."""
    if "{%" in file_or_text or "{{" in file_or_text:
        return file_or_text
    try:
        return Path(file_or_text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--chat_template {file_or_text} cannot be read ({getattr(error, 'strerror', 'it is not UTF-8')}): "
            "name a Jinja file, or write the template itself"
        ) from None


def _load_tokenizer(name: str, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the tokenizer {name} cannot be loaded ({reason}): name a folder with its files, a hub name, or bytes"
        ) from None


def _build_byte_tokenizer() -> "PreTrainedTokenizerBase":
    """258 tokens: id = byte value, then <|endoftext|> = 256 and <|pad|> = 257; a vocabulary of any size >= 258 fits.

    A byte-level BPE without merges, so that `save_pretrained` writes files which `AutoTokenizer` reads anywhere.
    Special tokens written out in a text stay ordinary bytes: a corpus that quotes them cannot end a document.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    # The byte -> character table of GPT-2 (openai/gpt-2, src/encoder.py), which the ByteLevel parts are built on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    backend = Tokenizer(BPE(vocab={symbols[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        name_or_path="bytes",
    )


def num_token_ids(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Smallest vocabulary of a model that can take every id of the tokenizer: largest id + 1, added tokens included."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def pad_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id to pad with: any id will do, since padding carries neither attention nor loss."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)


class TextEncoder:
    """Turns texts into arrays of ids; `encode` may be called from `num_threads` threads at once.

    The tokenizers library releases the GIL, so threads use all cores, without the processes (and their copies of the
    vocabulary) that `datasets.map(num_proc=...)` would start after the process group is up.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.dtype = np.dtype(np.uint16 if num_token_ids(tokenizer) <= 2**16 else np.uint32)
        self._backend = None
        self.num_threads = 1  # tokenizers written in Python hold the GIL, and need not be safe to share
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            from tokenizers import Tokenizer

            # A copy: truncation and padding are settings of the tokenizer that was passed in, and change ids.
            self._backend = Tokenizer.from_str(backend.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = backend.encode_special_tokens
            self.num_threads = len(os.sched_getaffinity(0))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text [n] without special tokens around them."""
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [np.asarray(encoding.ids, dtype=self.dtype) for encoding in encodings]
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(ids, dtype=self.dtype) for ids in rows]

    @property
    def knows_places(self) -> bool:
        """Whether `encode_with_begins` can be asked: only the tokenizers library says where in a text a token was."""
        return self._backend is not None

    def encode_with_begins(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids of each text [n], as `encode` gives them, and the character at which each token begins: int64 [n]."""
        assert self._backend is not None
        out = []
        for encoding in self._backend.encode_batch(texts, add_special_tokens=False):
            places = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
            begins = places[:, 0]
            # Byte-level tokenizers leave the space before a word out of its place (trim_offsets).
            begins[1:] = np.minimum(begins[1:], places[:-1, 1])
            out.append((np.asarray(encoding.ids, dtype=self.dtype), begins))
        return out

    def split(self, text: str, size: int) -> list[str]:
        """Cut a long text into pieces of about `size` characters whose ids, put together, are the text's ids.

        Cuts after a line feed between two visible characters, and only where encoding across the cut and encoding both
        sides agree; a tokenizer that treats the beginning of a text in its own way (Metaspace) gets it whole.
        """
        pieces, start = [], 0
        while len(text) - start > 2 * size:
            cut = self._seam(text, start + size)
            if cut is None:
                break
            pieces.append(text[start:cut])
            start = cut
        return [*pieces, text[start:]]

    def _seam(self, text: str, start: int, tries: int = 32, around: int = 200) -> int | None:
        position = start
        for _ in range(tries):
            position = text.find("\n", position) + 1
            if not 0 < position < len(text):
                return None
            if text[position - 2].isspace() or text[position].isspace():
                continue
            left, right = text[max(0, position - around) : position], text[position : position + around]
            across, first, second = self.encode([left + right, left, right])
            if np.array_equal(across, np.concatenate([first, second])):
                return position
        return None

    @cached_property
    def affixes(self) -> tuple[np.ndarray, np.ndarray]:
        """What goes before and after the ids of a plain document: the tokenizer's own special tokens.

        A tokenizer that puts none (GPT-2's, the byte-level one) gets its EOS behind each document. One that begins
        documents with BOS separates them so: its model need not have seen an EOS ever (llama2.c's have not: 27 nats).
        """
        probe = "a"
        inner = self.encode([probe])[0].tolist()
        whole = list(self.tokenizer(probe, add_special_tokens=True)["input_ids"])
        starts = [i for i in range(len(whole) - len(inner) + 1) if whole[i : i + len(inner)] == inner]
        assert starts, f"special tokens change how {probe!r} is read: {inner} is not inside {whole}"
        prefix, suffix = whole[: starts[0]], whole[starts[0] + len(inner) :]
        eos = self.tokenizer.eos_token_id
        if eos is not None and not prefix and not suffix:
            suffix.append(eos)
        return np.asarray(prefix, self.dtype), np.asarray(suffix, self.dtype)

    @cached_property
    def completion_suffix(self) -> np.ndarray:
        """What goes after a completion: always an end, since it is what a model must learn to stop at."""
        suffix, eos = self.affixes[1].tolist(), self.tokenizer.eos_token_id
        return np.asarray(suffix if eos is None or suffix[-1:] == [eos] else [*suffix, eos], self.dtype)

    @cached_property
    def sha256(self) -> str:
        """Hash of everything in the tokenizer that decides ids."""
        if self._backend is not None:
            content = self._backend.to_str() + str(self._backend.encode_special_tokens)
        else:
            content = json.dumps([type(self.tokenizer).__qualname__, sorted(self.tokenizer.get_vocab().items())])
        affixes = [ids.tolist() for ids in (*self.affixes, self.completion_suffix)]
        template = getattr(self.tokenizer, "chat_template", None)
        return hashlib.sha256(json.dumps([content, affixes, template]).encode()).hexdigest()
