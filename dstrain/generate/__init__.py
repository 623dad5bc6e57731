"""Text from a model: while it trains (`sample.py`), and from a checkpoint or folder (`dstrain generate`)."""

from importlib import import_module

_PUBLIC = {"sample_text": "dstrain.generate.sample"}


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'dstrain.generate' has no attribute {name!r}")
