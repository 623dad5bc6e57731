"""`--export` at the end of a run, from every kind of layout: plain transformers gives the logits of what was trained.

Logits of the engine itself, where every rank has the whole depth; of a pipeline, those of a plain model that is given
the very parameters which the stages hold.
"""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import checkpoints as ck
from tests import forked
from tests.distributed.parity import thinned

IDS = (torch.arange(24) * 7 % 250).reshape(2, 12)
PP, TP = {"pipeline": {"stages": 2}}, {"tensor_parallel": {"autotp_size": 2}}
# Name -> (ranks, DeepSpeed JSON, whether embeddings are tied)
LAYOUTS = {
    "zero0": (1, ck.config(0), False),
    "zero1": (2, ck.config(1), False),
    "zero2": (2, ck.config(2), True),
    "zero3": (2, ck.config(3), True),
    "pp2_tied": (2, ck.config(1, **PP), True),
    "pp2_untied": (2, ck.config(1, **PP), False),
    "tp2": (2, ck.config(1, **TP), False),
    "pp2_dp2": (4, ck.config(1, **PP), True),
}


def keep_what_was_trained(folder: Path, rank: int) -> None:
    """After the export of the run, as a file of each rank: logits, or the parameters of its stage."""
    from dstrain.run import Run

    export = Run.export

    @torch.no_grad()
    def export_and_keep(self: Run, step: int) -> None:
        export(self, step)
        engine = self.engine.deepspeed
        if self.resolved.parallel.pp_size > 1:
            named = engine.module.named_parameters()
            kept = {re.sub(r"^\d+\.model\.", "", name): p.detach() for name, p in named if p.numel()}
        else:
            engine.eval()
            kept = engine(input_ids=IDS).logits
        torch.save(kept, folder / f"kept{rank}.pt")

    Run.export = export_and_keep


def plain_logits(folder: Path, ranks: int) -> torch.Tensor:
    kept = [torch.load(folder / f"kept{rank}.pt") for rank in range(ranks)]
    if isinstance(kept[0], torch.Tensor):
        return kept[0]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "run" / "export"))
    state = {name: value for stage in kept for name, value in stage.items()}
    missing = set(dict(model.named_parameters())) - set(state)
    assert not missing
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", thinned(list(LAYOUTS), "zero3", "pp2_untied", "tp2", "pp2_dp2"))
def test_plain_transformers_gives_the_logits_of_what_was_trained(name, tmp_path, monkeypatch):
    ranks, values, tied = LAYOUTS[name]
    monkeypatch.setattr(ck, "STEPS", 3)
    monkeypatch.setattr(ck, "SAVED", 3)
    run = tmp_path / "run"
    argv = ["--output_dir", str(run), *ck.flags(run, values, {"tie_word_embeddings": tied}), "--export"]
    processes = forked.start(argv, ranks, tmp_path, partial(keep_what_was_trained, tmp_path))
    assert forked.finish(processes, 90)
    assert [process.exitcode for process in processes] == [0] * ranks, (tmp_path / "rank0.err").read_text()
    model, info = AutoModelForCausalLM.from_pretrained(run / "export", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
    expected = plain_logits(tmp_path, ranks)
    if name == "tp2":  # its ranks sum partial products
        assert (logits - expected).abs().max() <= 1e-6
    else:
        assert torch.equal(logits, expected)
