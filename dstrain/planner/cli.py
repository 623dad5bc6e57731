"""`dstrain plan`: what a model needs on some machine, and which configuration to choose there.

dstrain plan --config_name examples/llama_10m.json --block_size 512 --device cpu --devices_per_host 2
dstrain plan --config_name llama_70b.json --block_size 8192 --hosts 2 --devices_per_host 8 --device h100-80g --write F
dstrain plan --config_name llama_8b.json --block_size 8192 --deepspeed_config ds_configs/zero2.json --device h200
dstrain plan --config_name llama_8b.json --block_size 8192 --device h200 --hostfile hostfile
dstrain plan --model_name_or_path M --lora_rank 16 --block_size 2048 --device h200

The device does not need to be there: `cpu` is measured, the others are named. The last line of `--json` is JSON.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from dstrain.arguments import ModelArguments, is_taken, parse_arguments
from dstrain.config.load import apply_overrides, load_config
from dstrain.errors import ExitCode, UserError

_MODEL_FLAGS = ("config_name", "model_name_or_path", "config_overrides", "attn_implementation", "trust_remote_code",
                "tiled_mlp", "load_in_4bit")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the run")
    model.add_argument("--config_name", help="a hub name, a folder, or a JSON file that names its model_type")
    model.add_argument("--model_name_or_path", help="the same for a pretrained model")
    model.add_argument("--config_overrides", help="changes to the model's configuration: num_hidden_layers=2")
    model.add_argument("--attn_implementation", help="attention kernel: eager, sdpa")
    model.add_argument("--trust_remote_code", action="store_true", help="allow a hub repository to run its own code")
    model.add_argument("--block_size", type=int, required=True, help="tokens of a sample")
    model.add_argument("--global_batch", type=int, help="samples of a step (default: 4 times the devices)")
    model.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="of what is enumerated")
    model.add_argument("--deepspeed_config", help="predict this DeepSpeed JSON instead of choosing one")
    model.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one value of it; repeatable")
    model.add_argument("--gradient_checkpointing", action="store_true", help="with --deepspeed_config: as in train.py")
    model.add_argument("--tiled_mlp", action="store_true", help="as in train.py")
    model.add_argument(
        "--loss",
        choices=("fused", "model"),
        default="fused",
        help="fused: dstrain's; model: the model's own, with whole logits, as other trainers take it",
    )
    adapters = parser.add_argument_group("adapters beside a pretrained model")
    for f in _adapter_fields():
        adapters.add_argument(f"--{f.name}", action="append", help=f.metadata["help"])
    adapters.add_argument("--load_in_4bit", action="store_true", help="as in train.py")
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--device", default="cpu", help="cpu (measured), h100-80g, h200, a100-80g, a100-40g, l40s")
    machine.add_argument("--hosts", type=int, default=1)
    machine.add_argument("--devices_per_host", type=int, default=1)
    machine.add_argument("--hostfile", metavar="F", help="these hosts and slots; the network between them is measured")
    output = parser.add_argument_group("the answer")
    output.add_argument("--write", metavar="F", help="write the best as a DeepSpeed JSON")
    output.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    output.add_argument("--rows", type=int, default=12, help="rows of the table (default: 12)")


def _adapter_fields() -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(ModelArguments) if f.name.startswith("lora_") or f.name == "peft_config"]


def _model_arguments(args: argparse.Namespace) -> ModelArguments:
    """Through train.py's own parser. Raises UserError."""
    words = []
    for name in (*_MODEL_FLAGS, *(f.name for f in _adapter_fields())):
        value = getattr(args, name)
        words += [f"--{name}={one}" for one in (value if isinstance(value, list) else [value]) if one]
    return parse_arguments(words).model


def run(args: argparse.Namespace) -> int:
    for name in ("block_size", "hosts", "devices_per_host", "global_batch", "rows"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}: write a positive number")
    if bool(args.config_name) == bool(args.model_name_or_path):
        raise UserError("name one model: --config_name C (from scratch) or --model_name_or_path M (pretrained)")
    if args.set and not args.deepspeed_config:
        raise UserError("--set changes a --deepspeed_config: name one")
    if args.write and is_taken(Path(args.write)):
        raise UserError(f"--write {args.write} is there already: name a new file")
    margs = _model_arguments(args)
    from dstrain.models.config import check_block_size, load_model_config
    from dstrain.planner.memory import Flags
    from dstrain.planner.strategy import Planner

    config = load_model_config(margs)
    check_block_size(config, args.block_size)
    cluster = _find_cluster(args)
    flags = Flags(
        args.block_size,
        gradient_checkpointing=args.gradient_checkpointing,
        tiled_mlp=args.tiled_mlp,
        attn_implementation=args.attn_implementation,
        saves_on_the_way=True,
        loss=args.loss,
        adapter=json.dumps(margs.adapter) if margs.adapter else None,
    )
    planner = Planner(config, margs, cluster, flags, args.precision)
    return _predict(args, planner, flags) if args.deepspeed_config else _choose(args, planner)


def _find_cluster(args: argparse.Namespace) -> Any:
    from dstrain.planner.hardware import find_device
    from dstrain.planner.strategy import Cluster

    if args.hostfile is None:
        return Cluster(args.hosts, args.devices_per_host, find_device(args.device, args.devices_per_host))
    if (args.hosts, args.devices_per_host) != (1, 1):
        raise UserError("--hostfile says how many hosts and slots there are: leave --hosts and --devices_per_host out")
    from dstrain.launch.doctor.network import measure_links
    from dstrain.launch.hosts import read_hostfile
    from dstrain.planner.network import check_slots, with_network

    hosts = read_hostfile(args.hostfile)
    slots = check_slots(hosts)
    links = measure_links([host.name for host in hosts])
    return Cluster(len(hosts), slots, with_network(find_device(args.device, slots), links))


def _predict(args: argparse.Namespace, planner: Any, flags: Any) -> int:
    """What one DeepSpeed JSON needs."""
    deepspeed = apply_overrides(load_config(args.deepspeed_config), args.set)
    if args.global_batch:
        deepspeed = {**deepspeed, "train_batch_size": args.global_batch}
    resolved = planner.resolve(deepspeed, flags, args.deepspeed_config)
    needs, seconds, rate = planner.predict(resolved, flags)
    reason = planner.what_does_not_fit(needs)
    found = {**needs.to_json(), "step_time_s": seconds, "tokens_per_second": rate, "fits": reason is None}
    found["limit_gib"] = {"device": planner.cluster.device.memory_gib}
    if args.write:
        _write(args.write, deepspeed)
    if args.json:
        print(json.dumps({**_setting(planner), "prediction": found, "reason": reason}))
        return ExitCode.FINISHED
    from dstrain.planner.tables import show_needs

    show_needs(needs, seconds, rate, _setting(planner), reason)
    return ExitCode.FINISHED


def _choose(args: argparse.Namespace, planner: Any) -> int:
    """The ranking of all configurations; the best is written. Exit code 2 where none fits."""
    global_batch = args.global_batch or 4 * planner.cluster.world_size
    options = planner.options(global_batch)
    fitting = [option for option in options if option.reason is None]
    if args.write and fitting:
        _write(args.write, fitting[0].choice.deepspeed(global_batch, planner.precision))
    if args.json:
        print(
            json.dumps(
                {
                    **_setting(planner),
                    "global_batch": global_batch,
                    "best": fitting[0].to_json() if fitting else None,
                    "options": [option.to_json() for option in options],
                }
            )
        )
    else:
        from dstrain.planner.tables import show_options

        show_options(options, _setting(planner), args.rows, args.write if fitting else None)
    if not fitting:
        closest = min((o for o in options if o.needs), key=lambda o: o.needs.device["total"], default=None)
        raise UserError(
            "nothing fits" + (f"; the least is {closest.choice}: {closest.reason}" if closest else "")
            + ": use more devices, a shorter --block_size or a smaller model"
        )  # fmt: skip
    return ExitCode.FINISHED


def _setting(planner: Any) -> dict[str, Any]:
    cluster = planner.cluster
    return {
        "model_type": planner.config.model_type,
        "num_parameters": planner.shape.num_parameters,
        "num_trainable_parameters": planner.shape.num_trained,
        "block_size": planner.flags.block_size,
        "loss": planner.flags.loss,
        "hosts": cluster.hosts,
        "devices_per_host": cluster.devices_per_host,
        "device": {name: getattr(cluster.device, name) for name in ("name", "memory_gib", "source")},
        "network": {name: getattr(cluster.device, name) for name in ("network", "network_latency")},
    }


def _write(path: str, deepspeed: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(deepspeed, indent=2) + "\n")
    print(f"dstrain: wrote {path}", file=sys.stderr)
