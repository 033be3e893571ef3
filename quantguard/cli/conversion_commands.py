"""Verbs that convert a model: inspect and convert."""

from __future__ import annotations

from typing import Any

import click

from . import arguments, options
from .output import save_model, show, write_json


@click.command()
@click.argument("model")
@options.MODEL
@options.CONVERSION
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write JSON.")
def inspect(model: str, arch: str | None, trust: bool, bits: tuple[tuple[str, int], ...],
            dynamic: bool, exclude: tuple[str, ...], gates: bool, per_channel: bool,
            input_bits: int | None, input_range: Any,
            input_shape: tuple[int, ...] | None, json_file: str | None) -> None:
    """List the activations of MODEL without converting it.

    The table shows which would be converted, which stay float, and why.
    """
    arguments.check_exists(model)
    from ..conversion.converter import conversion_of
    from ..conversion.converter import inspect as plan_of
    from ..core.metadata import metadata_of
    arguments.check_outputs([model], json=json_file)
    loaded = arguments.load_model(model, arch, trust)
    done = conversion_of(loaded)
    if done is not None:
        arguments.refuse_unused(
            ("bits", "dynamic", "exclude", "gates", "per_channel", "input_bits", "input_range",
             "input_shape"), f"{model} is converted already")
    known = metadata_of(loaded)
    plan = plan_of(loaded, arguments.bits_table(bits), dynamic,
                   example=arguments.example_of(input_shape), per_channel=per_channel,
                   exclude=exclude, gates=gates, input_bits=input_bits,
                   input_range=arguments.pairs(input_range))
    made_for = known.metadata_line()
    show(str(done or plan) + (f"\nmade for: {made_for}" if made_for else ""),
         (json_file, lambda file: write_json(
             file, {**plan.to_dict(), "metadata": known.metadata()})))


@click.command()
@click.argument("model")
@options.MODEL
@click.option("-o", "--output", type=click.Path(dir_okay=False),
              help="File to write, MODEL.qg by default.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@options.CONVERSION
@click.option("--data", metavar="DATA",
              help=f"Calibrate on these images (optional): {options.DATA}.")
@options.LOADING
@click.option("--quiet", is_flag=True, help="Print no table.")
def convert(model: str, arch: str | None, trust: bool, output: str | None, force: bool,
            bits: tuple[tuple[str, int], ...], dynamic: bool, exclude: tuple[str, ...], gates: bool,
            per_channel: bool, input_bits: int | None, input_range: Any,
            input_shape: tuple[int, ...] | None, data: str | None, batch_size: int,
            size: int | None, mean: Any, std: Any, quiet: bool) -> None:
    """Convert the activations of MODEL to low bits; needs no data."""
    arguments.check_exists(model)
    from ..conversion.converter import conversion_of
    from ..conversion.converter import convert as run
    target = arguments.output_of(model, output, ".qg", force)
    loaded, loader = arguments.load_model(model, arch, trust), None
    threat, size = arguments.threat_and_size({model: loaded}, None, None, mean, std, size)
    if data:
        loader = arguments.load_split(data, "train", batch_size, size, threat.mean, threat.std)
    known = mean is not None or std is not None
    converted = run(loaded, arguments.bits_table(bits), dynamic, threat=threat if known else None,
                    data=loader, example=arguments.example_of(input_shape),
                    per_channel=per_channel, exclude=exclude, gates=gates, input_bits=input_bits,
                    input_range=arguments.pairs(input_range))
    save_model(converted, target, arguments.arch_of(model, arch))
    done = conversion_of(converted)
    if done is not None:
        if not quiet:
            click.echo(str(done.plan))
        for place in done.audit.left if done.audit else ():
            click.echo(f"still float: {place}", err=True)
        click.echo(done.summary())
    click.echo(f"wrote {target}")
