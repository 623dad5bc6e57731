"""A stream through the real trainer: interrupted and resumed it gives the very bits; what is broken in it ends all."""

import json

import pytest

from tests import checkpoints as ck
from tests.forked import train
from tests.launch import Result

STREAM = ("--streaming", "--shuffle_buffer", "7")  # so that step 10 lies inside a window
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def test_an_interrupted_stream_goes_on_with_the_same_tokens(tmp_path):
    whole = ck.start(tmp_path / "whole", ck.config(1), 2, *STREAM).check()
    ck.interrupt(tmp_path / "whole", tmp_path / "resumed")
    resumed = ck.start(tmp_path / "resumed", ck.config(1), 2, *STREAM).check()
    assert resumed.losses() == whole.losses()
    assert ck.state_files(tmp_path / "resumed") == ck.state_files(tmp_path / "whole")
    manifest = json.loads((tmp_path / "whole/checkpoints/step_00000010/manifest.json").read_text())
    assert manifest["extra"]["data"]["sample"] == 35  # step 10 begins with sample 40, of window 35..41


def start_on_rows(folder, rows: list[str], ranks: int, *more: str) -> Result:
    """rows: lines of JSON, which are trained on; more: flags."""
    flags = ck.flags(folder, ck.config(1), {})
    file = folder.parent / "rows.jsonl"
    file.write_text("\n".join(rows))
    flags[flags.index("--train_file") + 1] = str(file)
    return train(folder, *flags, *STREAM, *more, ranks=ranks)


def test_a_broken_line_ends_every_rank(tmp_path):
    rows = [json.dumps({"prompt": "some words ", "completion": f"and {i} more"}) for i in range(30)]
    result = start_on_rows(tmp_path / "run", [*rows, "{"], 2).check(2)
    assert f"{tmp_path / 'rows.jsonl'}:31 is not valid JSON" in result.stderr
    assert result.metrics("summary")[-1]["exit_code"] == 2
    assert result.metrics("train")[-1]["step"] == 7  # 30 samples before it: four whole windows
    assert result.metrics("train")[0]["tokens"] in range(4 * 11, 4 * 12 + 1)  # completions and their ends alone
    assert result.run_json()["data"]["kinds"] == ["prompt"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("packing", [False, True])
def test_chats_go_on_with_the_same_tokens_on_another_number_of_ranks(tmp_path, packing):
    numbers = ["zero", "one", "two", "three", "four", "five"]
    turns = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": numbers[i % 6]}] for i in range(17)
    ]
    rows = [json.dumps({"messages": turns[i] + turns[-i] * (i % 2)}) for i in range(17)]
    flags = ("--chat_template", TEMPLATE, *(["--packing"] * packing))
    whole = start_on_rows(tmp_path / "whole", rows, 2, *flags).check()
    ck.interrupt(tmp_path / "whole", tmp_path / "resumed")
    resumed = start_on_rows(tmp_path / "resumed", rows, 1, *flags).check()
    assert resumed.losses() == pytest.approx(whole.losses(), rel=1e-5)
    for name in ("tokens", "tokens_processed"):
        counts = [[line[name] for line in run.metrics("train")] for run in (whole, resumed)]
        assert counts[0] == counts[1]
        assert len(set(counts[0])) > 1
    events = [[line["text"] for line in run.metrics("event") if line["name"] == "data"] for run in (whole, resumed)]
    assert events[0] == events[1] and "begins again: pass 2" in events[0][0]
