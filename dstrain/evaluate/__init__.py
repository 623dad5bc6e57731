"""How good a model is: on held-out text while it trains (`held_out.py`), and on tasks (`dstrain evaluate`)."""

from importlib import import_module

_PUBLIC = {"held_out_loss": "dstrain.evaluate.held_out"}


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'dstrain.evaluate' has no attribute {name!r}")
