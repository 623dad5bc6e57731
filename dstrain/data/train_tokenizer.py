"""`dstrain tokenizer train`: a byte-level BPE from any text that trains.

    dstrain tokenizer train --train_file stories.parquet --vocab_size 4096 --output tokenizers/stories

Reads the documents of the data flags of dstrain/train.py, and writes a folder for `--tokenizer_name`, which
`AutoTokenizer` reads anywhere. The same text, size and special tokens give the same files.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from dstrain.arguments import (
    Arguments,
    DataArguments,
    ModelArguments,
    Parser,
    RunArguments,
    is_taken,
    parse_arguments,
)
from dstrain.data.build import default_cache_dir
from dstrain.data.rows import Chat, SkippedRows, describe_skipped
from dstrain.data.sources import Source, build_sources
from dstrain.data.tokenization import END_OF_TEXT, PAD, TextEncoder, num_token_ids, read_template
from dstrain.errors import ExitCode, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOT_READ = {
    *("validation_file", "train_weight", "streaming", "shuffle_buffer", "block_size", "packing"),
    *("train_on_prompts", "long_rows"),
}


def main(argv: list[str]) -> int:
    """Returns the exit code. Raises UserError."""
    parser = Parser(
        prog="dstrain tokenizer",
        description="Train a byte-level BPE on the documents that the data flags of dstrain/train.py name.",
        usage="%(prog)s train --vocab_size N --output DIR [--special_tokens T ...] [--chat_template FILE] "
        "--train_file F ... (and the other data flags of dstrain/train.py that name and read documents)",
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=("train",))
    parser.add_argument(
        "--vocab_size", type=int, required=True, help="tokens in all, with 256 bytes and the special ones"
    )
    parser.add_argument("--output", required=True, help="a new or empty folder")
    parser.add_argument(
        "--special_tokens", nargs="+", action="extend", default=[], help=f"besides {END_OF_TEXT} and {PAD}"
    )
    own, data_flags = parser.parse_known_args(argv)
    args = parse_arguments(data_flags)
    special_tokens = list(dict.fromkeys([END_OF_TEXT, PAD, *own.special_tokens]))
    _check(args, own.vocab_size, special_tokens, Path(own.output))
    template = args.model.chat_template and _checked_template(args.model.chat_template, special_tokens)
    source, _ = build_sources(args.data, default_cache_dir())
    skipped = SkippedRows(args.data.bad_rows)
    texts = _texts(source, skipped)
    if (first := next(texts, None)) is None:
        raise UserError(f"{source.description} holds no text: name files or a column with text in them")
    tokenizer = train_tokenizer(chain([first], texts), own.vocab_size, special_tokens)
    if template:
        _set_template(tokenizer, template)
    tokenizer.save_pretrained(own.output)
    bytes_per_token = _bytes_per_token(tokenizer, _texts(source, SkippedRows(args.data.bad_rows)))
    print(f"{own.output}: {num_token_ids(tokenizer):,} tokens, {bytes_per_token:.3f} bytes per token")
    for line in describe_skipped(skipped.kinds, source.description):
        print(line)
    if num_token_ids(tokenizer) < own.vocab_size:
        print(f"the text holds no pair of tokens more that comes twice: fewer than the {own.vocab_size:,} asked for")
    return ExitCode.FINISHED


def _check(args: Arguments, vocab_size: int, special_tokens: list[str], output: Path) -> None:
    reads = {"chat_template", *(field.name for field in fields(DataArguments))} - _NOT_READ
    defaults = Arguments(ModelArguments(), DataArguments(), RunArguments()).to_dict()
    given = [name for name, value in args.to_dict().items() if value != defaults[name]]
    problems = [f"--{name} says nothing to a tokenizer: leave it out" for name in given if name not in reads]
    if vocab_size < 256 + len(special_tokens):
        problems.append(
            f"--vocab_size is {vocab_size}: write at least {256 + len(special_tokens)}, for 256 bytes and "
            f"{len(special_tokens)} special tokens"
        )
    if is_taken(output):
        problems.append(f"--output {output} is there already: name a new or empty folder")
    if problems:
        raise UserError(problems)


def _checked_template(file_or_text: str, special_tokens: list[str]) -> str:
    template = read_template(file_or_text)
    if missing := sorted(set(re.findall(r"<\|\w+\|>", template)) - set(special_tokens)):
        raise UserError(
            f"--chat_template writes {', '.join(missing)}, which would be cut into pieces: "
            f"add --special_tokens {' '.join(missing)}"
        )
    return template


def _set_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> None:
    from jinja2 import TemplateError, TemplateSyntaxError

    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(f"--chat_template is no Jinja (line {error.lineno}: {error.message}): mend it") from None
    except TemplateError:  # a template that asks for another conversation than this
        return


def _texts(source: Source, skipped: SkippedRows) -> Iterator[str]:
    """Every text of the source: documents, prompts and completions, and what is said in chats."""
    for row in skipped.accept(source.documents()):
        if isinstance(row.document, Chat):
            yield from (message["content"] for message in row.document.messages)
        else:
            yield from row.document


def train_tokenizer(texts: Iterator[str], vocab_size: int, special_tokens: list[str]) -> "PreTrainedTokenizerBase":
    """A byte-level BPE (Sennrich et al. 2016) with GPT-2's bytes and its cut into words.

    special_tokens: the first ids; the first is the end of a text, the second the padding. Pairs that come once are not
    merged, so that a small text gives a smaller vocabulary. A function of the arguments alone.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special_tokens[0],
        eos_token=special_tokens[0],
        pad_token=special_tokens[1],
        extra_special_tokens=special_tokens[2:],
        clean_up_tokenization_spaces=False,
    )


def _bytes_per_token(tokenizer: "PreTrainedTokenizerBase", texts: Iterator[str]) -> float:
    """Over the whole text, special tokens apart."""
    encoder, num_bytes, num_tokens = TextEncoder(tokenizer), 0, 0
    while some := list(islice(texts, 100)):
        num_bytes += sum(len(text.encode()) for text in some)
        num_tokens += sum(map(len, encoder.encode(some)))
    return num_bytes / num_tokens
