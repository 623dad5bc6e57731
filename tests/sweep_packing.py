"""Which causal-LM model types of the installed transformers keep packed documents apart under `--packing`.

    python -m tests.sweep_packing

Tiny configurations (`tests/architectures.py`), sdpa and eager. A line for each type: the difference of packed logits
from those of a document alone, relative to the largest logit. The last line is JSON.
"""

import json
import warnings

import torch
import transformers

from dstrain.arguments import ModelArguments
from dstrain.models.packed import bound_of, packing_difference
from tests.architectures import model_types, tiny_config


def difference_of(model_type: str) -> float | str:
    """The larger one of the two attention functions (of one, where the model has no other), or why there is none."""
    found, reason = [], ""
    for attention in ("sdpa", "eager"):
        margs = ModelArguments(attn_implementation=attention)
        try:
            config, cpu = tiny_config(model_type), torch.device("cpu")
            found.append(packing_difference(config, margs, 2, torch.float32, cpu)[0])
        # Whatever a model's own code raises is why this type cannot be tried.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
    return max(found) if found else reason


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    apart, seen, untried = {}, {}, {}
    for model_type in model_types():
        difference = difference_of(model_type)
        print(f"{model_type}: {difference if isinstance(difference, str) else f'{difference:.1e}'}", flush=True)
        if isinstance(difference, str):
            untried[model_type] = difference
        elif difference <= bound_of("sdpa"):
            apart[model_type] = difference
        else:
            seen[model_type] = difference
    counts = {"apart": len(apart), "seen": len(seen), "untried": len(untried)}
    edges = {"largest_apart": max(apart.values()), "smallest_seen": min(seen.values())}
    print(json.dumps({"transformers": transformers.__version__, **counts, **edges}))


if __name__ == "__main__":
    main()
