"""Training data: sources -> documents -> tokens on disk -> samples -> the micro-batches of each step."""

from importlib import import_module

_PUBLIC = {
    "build_data": "dstrain.data.build",
    "TrainingData": "dstrain.data.build",
    "Samples": "dstrain.data.packing",
    "build_loader": "dstrain.data.loader",
    "eval_batches": "dstrain.data.loader",
    "build_tokenizer": "dstrain.data.tokenization",
}


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'dstrain.data' has no attribute {name!r}")
