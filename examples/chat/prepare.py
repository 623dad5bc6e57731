"""Split conversations so that what is asked in those to be judged by is asked in none of those to train on.

python examples/chat/prepare.py fastchat_dummy_conversation.json runs/chat_data
"""

import hashlib
import json
import sys
from pathlib import Path

GREETING = "What is up?"  # opens a third of the conversations, before the question


def is_for_test(conversation: dict) -> bool:
    """About 15 % of the questions."""
    asked = [turn["value"] for turn in conversation["conversations"] if turn["from"] == "human"]
    question = next(text for text in asked if text != GREETING)
    return hashlib.sha256(question.encode()).digest()[0] / 256 < 0.15


def main(source: str, folder: str) -> None:
    rows = json.loads(Path(source).read_text(encoding="utf-8"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, wanted in (("train", False), ("test", True)):
        own = [row for row in rows if is_for_test(row) == wanted]
        file = Path(folder) / f"{name}.json"
        file.write_text(json.dumps(own), encoding="utf-8")
        print(f"{len(own)} conversations in {file}")


if __name__ == "__main__":
    main(*sys.argv[1:])
