"""dstrain: DeepSpeed-powered training of Hugging Face causal language models that is never silently wrong."""

from importlib import import_module

__version__ = "0.1.0"

# The public names and where each lives. Looked up on first use (PEP 562), so that `import dstrain` stays light.
_PUBLIC = {
    "Arguments": "dstrain.arguments",
    "parse_arguments": "dstrain.arguments",
    "UserError": "dstrain.errors",
    "ExitCode": "dstrain.errors",
    "ParallelDims": "dstrain.parallel",
    "load_config": "dstrain.config.load",
    "ResolvedConfig": "dstrain.config.resolve",
    "resolve_config": "dstrain.config.resolve",
    "init_distributed": "dstrain.distributed",
    "load_model_config": "dstrain.models.config",
    "build_model": "dstrain.models.build",
    "build_tokenizer": "dstrain.data.tokenization",
    "build_data": "dstrain.data",
    "build_loader": "dstrain.data.loader",
    "build_engine": "dstrain.engine",
    "StepResult": "dstrain.engine",
    "CheckpointManager": "dstrain.checkpoint.manager",
}


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'dstrain' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_PUBLIC])
