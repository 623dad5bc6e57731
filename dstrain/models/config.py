"""Which model: a hub name, a folder or a JSON file, with overrides; each mistake in it becomes one line to read."""

import difflib
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from dstrain.arguments import ModelArguments
from dstrain.errors import UserError

# What Hugging Face's configuration and model classes raise when values do not fit together.
CONFIG_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_LEGACY = {"rope_theta", "rope_scaling", "torch_dtype", "auto_map", "_name_or_path", "model_type", "sliding_window"}


def one_line(error: BaseException) -> str:
    """The message of an error of some library, for the inside of a sentence."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f": did you mean {close[0]}?" if close else ""


def hub_is_reachable(timeout_s: float = 4.0) -> bool:
    """One short request. huggingface_hub itself retries an unreachable hub for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout_s):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False


def load_model_config(margs: ModelArguments) -> PreTrainedConfig:
    """The configuration that `--model_name_or_path`, or `--config_name` with `--config_overrides`, names.

    A name is a hub name, a folder with config.json, or (from scratch) a JSON file with `model_type`. Raises UserError.
    """
    name = margs.model_name_or_path or margs.config_name
    if name is None:
        raise UserError("no model is named: write --config_name (from scratch) or --model_name_or_path (pretrained)")
    if margs.config_name and (name.endswith(".json") or Path(name).is_file()):
        values = _read_json(Path(name))
        config_class = _config_class(values, name)
    else:
        values, config_class = _from_folder_or_hub(name, margs)
    config = _construct(config_class, values, name)
    if margs.config_overrides:
        overrides = _parse_overrides(margs.config_overrides, config)
        # The source is read again with the overrides in it, so that values derived from others (head_dim) follow.
        names = config_class.attribute_map
        values = {names.get(k, k): v for k, v in values.items()} | {names.get(k, k): v for k, v in overrides.items()}
        config = _construct(config_class, values, f"{name} with --config_overrides {margs.config_overrides}")
    _check_causal(config, name)
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path} {reason}: name a JSON file with the model's model_type and sizes") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f'{path} holds no object: write {{"model_type": "llama", ...}}')
    return values


def _config_class(values: dict[str, Any], name: str) -> type[PreTrainedConfig]:
    model_type = values.get("model_type")
    if model_type is None:
        raise UserError(f'{name} names no model_type: add one, such as "model_type": "llama"')
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"{name}: unknown model_type {model_type!r}{did_you_mean(str(model_type), CONFIG_MAPPING)}")
    config_class = CONFIG_MAPPING[model_type]
    known = {*vars(config_class()), *config_class.attribute_map, *_LEGACY}
    # Hugging Face keeps unknown names as attributes that nothing reads; only the look of a typing mistake is refused.
    problems = [
        f"{name}: unknown name {key}: did you mean {close[0]}?"
        for key in values
        if key not in known and (close := difflib.get_close_matches(key, sorted(known), 1, cutoff=0.85))
    ]
    if problems:
        raise UserError(problems)
    return config_class


def _from_folder_or_hub(name: str, margs: ModelArguments) -> tuple[dict[str, Any], type[PreTrainedConfig]]:
    flag = "--model_name_or_path" if margs.model_name_or_path else "--config_name"
    folder, reachable = Path(name), True
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{flag} {name} has no config.json: name a folder that save_pretrained wrote")
        values = _read_json(folder / "config.json")
        if "auto_map" not in values:
            return values, _config_class(values, f"{name}/config.json")
    elif folder.exists():
        raise UserError(f"{flag} {name} is a file: name a hub name or a folder with config.json")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{flag} {name}: there is no such folder")
    else:
        reachable = hub_is_reachable()
    try:
        config = AutoConfig.from_pretrained(
            name, trust_remote_code=margs.trust_remote_code, local_files_only=not reachable
        )
        values, _ = PreTrainedConfig.get_config_dict(name, local_files_only=not reachable)
    except OSError as error:
        if reachable:
            raise UserError(f"{flag} {name} cannot be loaded: {one_line(error)}") from None
        raise UserError(
            f"{flag} {name}: there is no such folder, the hub cannot be reached, and this host's cache lacks it: "
            "name a folder, or download it where there is a network"
        ) from None
    except CONFIG_ERRORS as error:
        raise UserError(f"{flag} {name}: {one_line(error)}") from None
    return values, type(config)


def _construct(config_class: type[PreTrainedConfig], values: dict[str, Any], name: str) -> PreTrainedConfig:
    _check_counts(values, config_class, name)
    try:
        return config_class.from_dict(values)
    except CONFIG_ERRORS as error:
        raise UserError(f"{name} is no valid {config_class.model_type} configuration: {one_line(error)}") from None


def _parse_overrides(text: str, config: PreTrainedConfig) -> dict[str, Any]:
    """`a=1,b=2` by the types that the configuration has now, as Hugging Face's `update_from_string`."""
    known = {k for k in (*vars(config), *config.attribute_map) if not k.startswith("_")}
    overrides: dict[str, Any] = {}
    problems = []
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            problems.append(f"--config_overrides: {item.strip()!r} is not name=value: write n_embd=10,n_layer=2")
        elif key == "model_type" or key not in known:
            hint = did_you_mean(key, known) if key != "model_type" else ": name another --config_name"
            problems.append(f"--config_overrides: {config.model_type} has no {key} to change{hint}")
        elif key in overrides:
            problems.append(f"--config_overrides: {key} is given twice: keep one")
        else:
            try:
                overrides[key] = _convert(value, getattr(config, key))
            except ValueError as error:
                problems.append(f"--config_overrides: {key} is {value!r}: write {error}")
    if problems:
        raise UserError(problems)
    return overrides


def _convert(value: str, old: Any) -> Any:
    """`value` by the type of the old one; ValueError says what is expected."""
    if isinstance(old, bool):
        words = {"true": True, "1": True, "false": False, "0": False}
        if value.lower() not in words:
            raise ValueError("true or false")
        return words[value.lower()]
    if isinstance(old, str):
        return value
    if isinstance(old, int | float):
        try:
            return type(old)(value)
        except ValueError:
            raise ValueError("a whole number" if isinstance(old, int) else "a number") from None
    try:
        return json.loads(value)
    except ValueError:
        return value


def _check_counts(values: dict[str, Any], config_class: type[PreTrainedConfig], name: str) -> None:
    problems = [
        f"{name}: {key} is {value}: write a positive number"
        for key, value in values.items()
        if config_class.attribute_map.get(key, key) in _COUNTS or key in _COUNTS
        if isinstance(value, int) and value < 1
    ]
    if problems:
        raise UserError(problems)


def _check_causal(config: PreTrainedConfig, name: str) -> None:
    has_own_code = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not has_own_code:
        raise UserError(f"{name}: {config.model_type} is not a causal language model: name one such as llama or gpt2")


def check_vocabulary(config: PreTrainedConfig, num_tokens: int, tokenizer_name: str) -> None:
    """Refuse a tokenizer whose `len()`, num_tokens, is larger than the model's vocabulary. Raises UserError."""
    vocab_size = config.get_text_config().vocab_size
    if num_tokens > vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer_name} has {num_tokens} tokens, the model {vocab_size}: "
            f"take the model's own tokenizer, or train from scratch with --config_overrides vocab_size={num_tokens}"
        )


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence that the model has positions for; None where the configuration names no limit."""
    config = config.get_text_config()
    values = (getattr(config, name, None) for name in _POSITIONS)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def check_block_size(config: PreTrainedConfig, block_size: int) -> None:
    """Refuse blocks longer than the model's positions. Raises UserError."""
    positions = max_positions(config)
    if positions is not None and block_size > positions:
        raise UserError(
            f"--block_size is {block_size}, the model has {positions} positions: write --block_size {positions} or less"
        )


def _layer_lists(text: PreTrainedConfig) -> dict[str, list]:
    """What a configuration says layer by layer."""
    depth = text.num_hidden_layers
    return {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == depth}


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Layers of one kind (sliding or full attention, ...) have one string."""
    text = config.get_text_config()
    lists = _layer_lists(text).values()
    return [str([value[i] for value in lists]) for i in range(text.num_hidden_layers)]


def make_shallow(config: PreTrainedConfig, max_layers: int) -> None:
    """In place: fewer layers, of every kind one where there is room; dropout off."""
    text = config.get_text_config()
    lists, kinds, depth = _layer_lists(text), layer_kinds(config), text.num_hidden_layers
    layers = min(depth, max_layers)
    kept = sorted(sorted(range(depth), key=lambda i: (kinds[i] in kinds[:i], i))[:layers])
    for name, value in list(vars(text).items()):
        if name in lists:
            setattr(text, name, [value[i] for i in kept])
        elif isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(text, name, 0.0)
    text.num_hidden_layers = layers


def model_identity(config: PreTrainedConfig) -> dict[str, Any]:
    """What makes a model this model, as strict JSON: infinite values (Mamba 2's time step limit) by their name."""
    volatile = ("transformers_version", "dtype", "_name_or_path")
    values = {name: value for name, value in config.to_diff_dict().items() if name not in volatile}
    return json.loads(json.dumps(values), parse_constant=str)
