"""The planner's answers for people."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dstrain.planner.memory import Needs
from dstrain.planner.strategy import Option


def show_needs(needs: Needs, seconds: float, rate: float, setting: dict[str, Any], reason: str | None) -> None:
    """One configuration, part by part."""
    console = Console()
    console.print(_title(setting))
    table = Table("part", "GiB a device", "GiB a host", header_style="bold")
    names = [*needs.device, *(name for name in needs.host if name not in needs.device)]
    names.remove("total")
    for name in [*names, "total"]:
        device, host = needs.device.get(name), needs.host.get(name)
        if device or host:
            table.add_row(name, _gib(device), _gib(host), style="bold" if name == "total" else None)
    console.print(table)
    where = f" of pipeline stage {needs.stage}" if needs.stage else ""
    console.print(f"The peak is in the {needs.phase.replace('_', ' ')}{where}.", highlight=False)
    console.print(
        f"pinned {needs.pinned_gib:.2f} GiB, NVMe {needs.nvme_gib:.2f} GiB a host, checkpoint "
        f"{needs.checkpoint_gib:.2f} GiB, {seconds:.3g} s a step, {rate:,.0f} tokens/s",
        highlight=False,
    )
    console.print("It fits." if reason is None else f"It does not fit: {reason}.", highlight=False)


def show_options(options: Sequence[Option], setting: dict[str, Any], rows: int, written: str | None) -> None:
    """The best that fit, and why the others do not."""
    console = Console()
    console.print(_title(setting))
    fitting = [option for option in options if option.reason is None]
    table = Table("", "configuration", "GiB a device", "GiB a host", "s a step", "tokens/s", header_style="bold")
    for place, option in enumerate(fitting[:rows], 1):
        assert option.needs is not None and option.step_time_s is not None and option.tokens_per_second is not None
        needs = option.needs
        table.add_row(
            str(place),
            str(option.choice),
            f"{needs.device['total']:.2f}",
            f"{needs.host['total']:.2f}",
            f"{option.step_time_s:.3g}",
            f"{option.tokens_per_second:,.0f}",
        )
    console.print(table)
    if written:
        flags = " --gradient_checkpointing" if fitting[0].choice.gradient_checkpointing else ""
        console.print(f"Start it with --deepspeed_config {written}{flags}", highlight=False)
    others = [option for option in options if option.reason is not None]
    for option in others[:rows]:
        console.print(f"no: {option.choice}: {option.reason}", highlight=False, markup=False)
    if len(others) > rows:
        console.print(f"and {len(others) - rows} more (--json has all)", highlight=False)


def _gib(value: float | None) -> str:
    return f"{value:.2f}" if value else ""


def _title(setting: dict[str, Any]) -> str:
    device, network = setting["device"], setting["network"]
    links = f", network {network['network'] / 1e6:,.0f} MB/s" if setting["hosts"] > 1 else ""
    whole, trained = setting["num_parameters"], setting["num_trainable_parameters"]
    adapters = f" ({trained / 1e6:.3g} million trained)" if trained < whole else ""
    return (
        f"{setting['model_type']} of {whole / 1e9:.3g} billion parameters{adapters}, blocks of "
        f"{setting['block_size']}, {setting['hosts']} x {setting['devices_per_host']} {device['name']} "
        f"({device['memory_gib']:.1f} GiB; {device['source']}{links})"
    )
