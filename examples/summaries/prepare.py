"""The summaries in a sample of P3 as rows of prompt and completion, split by the text that is summarized.

python examples/summaries/prepare.py t0_p3_sample.parquet runs/summaries_data
"""

import hashlib
import json
import sys
from itertools import takewhile
from pathlib import Path

import pyarrow.parquet as pq

# Templates of SAMSum and Gigaword that ask for a summary; others of them ask for the text behind one.
TEMPLATES = (
    "samsum_Generate_a_summary_for_this_dialogue",
    "samsum_Summarize_this_dialogue_",
    "samsum_Sum_up_the_following_dialogue",
    "samsum_Summarize_",
    "samsum_Given_the_above_dialogue_write_a_summary",
    "samsum_To_sum_up_this_dialog",
    "gigaword_generate_summary_for_this",
    "gigaword_write_a_title_for_this_sentence",
    "gigaword_first_sentence_title",
    "gigaword_make_a_title",
    "gigaword_in_a_nutshell",
    "gigaword_TLDR",
)


def shared_start(texts: list[str]) -> int:
    """Characters that all texts begin with: those that the first and the last in order do."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(min(texts), max(texts), strict=False)))


def texts_of(prompts: list[str]) -> list[str]:
    """Prompts of one template without what all of them begin and end with, of which a full stop may be a part."""
    start = shared_start(prompts)
    end = shared_start([prompt[::-1] for prompt in prompts])
    return [prompt[start : len(prompt) - end].strip(" .\r\n") for prompt in prompts]


def side_of(summary: str) -> str:
    """15 % of the summaries are for the test, 5 % for the evaluations while training.

    A text has one summary under all templates, and a few texts, reports that were mended later, share one.
    """
    share = hashlib.sha256(summary.encode()).digest()[0] / 256
    return "test" if share < 0.15 else "validation" if share < 0.2 else "train"


def main(source: str, folder: str) -> None:
    rows = pq.read_table(source).to_pylist()
    sides: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for template in TEMPLATES:
        own = [row for row in rows if row["template"] == template]
        for row, text in zip(own, texts_of([row["prompt"] for row in own]), strict=True):
            pair = {"prompt": row["prompt"], "completion": row["completion"].strip()}
            sides[side_of(pair["completion"])].append(pair | {"text": text, "source": template.split("_")[0]})
    Path(folder).mkdir(parents=True, exist_ok=True)
    for side, pairs in sides.items():
        file = Path(folder) / f"{side}.jsonl"
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        print(f"{len(pairs)} rows in {file}")


if __name__ == "__main__":
    main(*sys.argv[1:])
