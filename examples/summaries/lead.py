"""ROUGE of the first words of each text, as many as a summary of its source has on average: what a summary must beat.

python examples/summaries/lead.py runs/summaries_data
"""

import json
import sys
from pathlib import Path
from statistics import mean

from dstrain.evaluate.metrics import text_metrics


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def main(folder: str) -> None:
    train, test = (read(Path(folder) / f"{side}.jsonl") for side in ("train", "test"))
    words: dict[str, int] = {}
    for source in {row["source"] for row in train}:
        words[source] = round(mean(len(row["completion"].split()) for row in train if row["source"] == source))
    leads = [" ".join(row["text"].split()[: words[row["source"]]]) for row in test]
    found, _ = text_metrics(leads, [row["completion"] for row in test], ["rouge"], None)
    print(
        json.dumps({"words": words, "num_rows": len(test)} | {name: round(score, 2) for name, score in found.items()})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
