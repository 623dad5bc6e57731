"""The DeepSpeed JSON: read, checked against every key of the pinned DeepSpeed, completed, and explained."""

from importlib import import_module

_PUBLIC = {
    "load_config": "dstrain.config.load",
    "apply_overrides": "dstrain.config.load",
    "RunFacts": "dstrain.config.facts",
    "resolve_config": "dstrain.config.resolve",
    "ResolvedConfig": "dstrain.config.resolve",
    "read_effective": "dstrain.config.effective",
}


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'dstrain.config' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_PUBLIC])
