"""A stream through the real trainer: interrupted and resumed it gives the very bits; what is broken in it ends all."""

import json

from tests import checkpoints as ck
from tests.forked import train

STREAM = ("--streaming", "--shuffle_buffer", "7")  # so that step 10 lies inside a window


def test_an_interrupted_stream_goes_on_with_the_same_tokens(tmp_path):
    whole = ck.start(tmp_path / "whole", ck.config(1), 2, *STREAM).check()
    ck.interrupt(tmp_path / "whole", tmp_path / "resumed")
    resumed = ck.start(tmp_path / "resumed", ck.config(1), 2, *STREAM).check()
    assert resumed.losses() == whole.losses()
    assert ck.state_files(tmp_path / "resumed") == ck.state_files(tmp_path / "whole")
    manifest = json.loads((tmp_path / "whole/checkpoints/step_00000010/manifest.json").read_text())
    assert manifest["extra"]["data"]["block"] == 35  # step 10 begins with sample 40, of window 35..41


def test_a_broken_line_ends_every_rank(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text((json.dumps({"text": "some words " * 10}) + "\n") * 10 + "{\n")
    flags = ck.flags(tmp_path / "run", ck.config(1), {})
    flags[flags.index("--train_file") + 1] = str(broken)
    result = train(tmp_path / "run", *flags, *STREAM, ranks=2).check(2)
    assert f"{broken}:11 is not valid JSON" in result.stderr
    assert result.metrics("summary")[-1]["exit_code"] == 2
    assert result.metrics("train")[-1]["step"] == 7  # 34 blocks before it: four whole windows
