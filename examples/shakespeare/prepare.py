"""Split a text as nanoGPT does (the first 90 % for training) and make a tokenizer of its characters.

    python examples/shakespeare/prepare.py tinyshakespeare.txt runs/shakespeare_data

Writes train.txt, validation.txt and tokenizer/ (a Hugging Face tokenizer: one token a character, in code order, no
special tokens) into the folder.
"""

import argparse
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast


def character_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A token for each character of `text`; other characters are an error."""
    tokenizer = Tokenizer(WordLevel({character: i for i, character in enumerate(sorted(set(text)))}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("text", type=Path, help="the text file")
    parser.add_argument("folder", type=Path, help="where to write")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    split = int(len(text) * 0.9)
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "train.txt").write_text(text[:split], encoding="utf-8")
    (args.folder / "validation.txt").write_text(text[split:], encoding="utf-8")
    tokenizer = character_tokenizer(text)
    tokenizer.save_pretrained(args.folder / "tokenizer")
    print(f"{split} characters to train on, {len(text) - split} to validate, {len(tokenizer)} tokens: {args.folder}")


if __name__ == "__main__":
    main()
