"""The command line: one thin command a verb."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from . import given, options
from .errors import QuantguardError, SpecError
from .files import write_text


class _Group(click.Group):
    """Turn our errors into one clear message, and Ctrl-C into 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _notes():
                return super().invoke(ctx)
        except QuantguardError as error:
            lines = str(error).splitlines()
            click.echo("\n  ".join(["Error: " + lines[0], *lines[1:]]), err=True)
            ctx.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)
        except OSError as error:
            said = (error.filename, error.strerror or error)
            click.echo(": ".join(["Error", *(str(part) for part in said if part)]), err=True)
            ctx.exit(1)


class _Notes(logging.Handler):
    """Show what is logged of how a model was read; of several processes the first does."""

    def emit(self, record: logging.LogRecord) -> None:
        if given.is_first():
            click.echo(f"note: {record.getMessage()}", err=True)


@contextmanager
def _notes() -> Iterator[None]:
    log, notes = logging.getLogger("quantguard.models"), _Notes()
    before = log.level, log.propagate
    log.addHandler(notes)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(notes)
        log.level, log.propagate = before


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="torch-quantguard", prog_name="quantguard")
def main() -> None:
    """Low-bit activations for a trained classifier, and a robustness figure to trust.

    MODEL is a file (torch.save of a module or, with --arch, of weights; our own .qg), a folder of
    transformers (hf:DIR) or an arch spec: torchvision:NAME, timm:NAME, package.module:factory,
    file.py:factory; ?num_classes=3 behind it says what it is built with. FILE?weights=KEY names
    one of several sets of weights.
    """


@main.command()
@click.argument("model")
@options.MODEL
@options.CONVERSION
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write JSON.")
def inspect(model: str, arch: str | None, trust: bool, bits: tuple[tuple[str, int], ...],
            dynamic: bool, keep: tuple[str, ...], gates: bool, per_channel: bool,
            input_bits: int | None, input_range: Any,
            input_shape: tuple[int, ...] | None, json_file: str | None) -> None:
    """Show every activation of MODEL, converted or kept and why, without converting."""
    given.there(model)
    from .conversion import conversion_of
    from .conversion import inspect as plan_of
    from .metadata import metadata_of
    given.outputs([model], json=json_file)
    opened = given.opened(model, arch, trust)
    done = conversion_of(opened)
    if done is not None:
        given.not_given(("bits", "dynamic", "keep", "gates", "per_channel", "input_bits",
                         "input_range", "input_shape"), f"{model} is converted already")
    known = metadata_of(opened)
    plan = plan_of(opened, given.bits_of(bits), dynamic, example=given.example_of(input_shape),
                   per_channel=per_channel, keep=keep, gates=gates, input_bits=input_bits,
                   input_range=given.pairs(input_range))
    made_for = known.metadata_line()
    _tell(str(done or plan) + (f"\nmade for: {made_for}" if made_for else ""),
          (json_file, lambda file: write_text(file, json.dumps(
              {**plan.to_dict(), "metadata": known.metadata()}, indent=1))))


@main.command()
@click.argument("model")
@options.MODEL
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="MODEL.qg by default.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@options.CONVERSION
@click.option("--data", metavar="DATA", help=f"Calibrate on it; not needed. {options.DATA}.")
@options.LOADING
@click.option("--quiet", is_flag=True, help="No table.")
def convert(model: str, arch: str | None, trust: bool, output: str | None, force: bool,
            bits: tuple[tuple[str, int], ...], dynamic: bool, keep: tuple[str, ...], gates: bool,
            per_channel: bool, input_bits: int | None, input_range: Any,
            input_shape: tuple[int, ...] | None, data: str | None, batch_size: int,
            size: int | None, mean: Any, std: Any, quiet: bool) -> None:
    """Swap every activation of MODEL for a low-bit staircase; needs no data."""
    given.there(model)
    from .conversion import conversion_of
    from .conversion import convert as carry_out
    target = given.output_of(model, output, ".qg", force)
    opened, loader = given.opened(model, arch, trust), None
    threat, size = given.setting_of({model: opened}, None, None, mean, std, size)
    if data:
        loader = given.loader_of(data, "train", batch_size, size, threat.mean, threat.std)
    known = mean is not None or std is not None
    converted = carry_out(opened, given.bits_of(bits), dynamic, threat=threat if known else None,
                          data=loader, example=given.example_of(input_shape),
                          per_channel=per_channel, keep=keep, gates=gates, input_bits=input_bits,
                          input_range=given.pairs(input_range))
    _save(converted, target, given.arch_of(model, arch))
    done = conversion_of(converted)
    if done is not None:
        if not quiet:
            click.echo(str(done.plan))
        for place in done.audit.left if done.audit else ():
            click.echo(f"still float: {place}", err=True)
        click.echo(done.summary())
    click.echo(f"wrote {target}")


@main.command()
@click.argument("model")
@options.MODEL
@options.DATA_OPTION
@click.option("-o", "--output", type=click.Path(dir_okay=False),
              help="MODEL.hardened.qg by default.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@options.BITS
@click.option("--dynamic/--fixed", default=None,
              help="Learned or constant thresholds; constant by default, or as converted.")
@click.option("--max-clean-drop", type=click.FloatRange(0, 1), metavar="SHARE",
              help="Walk down in bits while clean accuracy falls by no more (0.02: 2 points).")
@options.THREAT
@options.TRAINING
@options.LOADING
@options.RUNNING
def harden(model: str, arch: str | None, trust: bool, data: str, output: str | None, force: bool,
           bits: tuple[tuple[str, int], ...], dynamic: bool | None,
           max_clean_drop: float | None, eps: float | None, norm: str | None, recipe: str,
           settings: tuple[str, ...], epochs: int, train: str, augment: bool, batch_size: int,
           size: int | None, mean: Any, std: Any, seed: int, run_dir: str | None,
           device: str | None, quiet: bool) -> None:
    """Quantize MODEL where it is not yet, and fine-tune it adversarially."""
    given.there(model)
    from .hardening import harden as run
    chosen = given.recipe_of(recipe, settings)
    target = given.output_of(model, output, ".hardened.qg", force)
    given.keepable(run_dir)
    opened = given.opened(model, arch, trust)
    threat, size = given.setting_of({model: opened}, eps, norm, mean, std, size)
    loader = given.loader_of(data, "train", batch_size, size, threat.mean, threat.std, augment)
    hardened = run(opened, loader, threat,
                   bits=given.same_or_table(bits), dynamic=dynamic, recipe=chosen, epochs=epochs,
                   train=train, max_clean_drop=max_clean_drop, run_dir=run_dir, seed=seed,
                   device=device, progress=not quiet)
    _tell("", (target, lambda file: _save(hardened, file, given.arch_of(model, arch))))


@main.command()
@click.argument("model")
@options.MODEL
@options.DATA_OPTION
@options.THREAT
@options.EVALUATION
@click.option("--adversarials", type=click.Path(dir_okay=False),
              help="Save what broke each image as FILE.npz (x, y, broken).")
@click.option("--replay", type=click.Path(exists=True, dir_okay=False),
              help="Run what this JSON of an evaluation ran; its threat, suite, seed and number of "
                   "images count.")
@options.LOADING
@options.RUNNING
def evaluate(model: str, arch: str | None, trust: bool, data: str, eps: float | None,
             norm: str | None, suite: str, split: str, images: int | None, first: bool,
             certify: bool, budget: str | None, report: str | None, json_file: str | None,
             strict: bool, adversarials: str | None, replay: str | None, batch_size: int,
             size: int | None, mean: Any, std: Any, seed: int, run_dir: str | None,
             device: str | None, quiet: bool) -> None:
    """Measure how many images of DATA survive every attack on MODEL."""
    given.there(model)
    from .evaluation import evaluate as run
    from .pipeline import Comparison
    from .results import Evaluation
    given.outputs([model, *given.files_of(data), *([replay] if replay else [])], report=report,
                  json=json_file, adversarials=adversarials)
    given.keepable(run_dir)
    if adversarials and not adversarials.endswith(".npz"):
        raise SpecError(f"--adversarials {adversarials} must end in .npz")
    again = Evaluation.load(replay) if replay else None
    if again is not None:
        given.not_given(("eps", "norm", "suite", "images", "first", "seed", "budget", "certify",
                         "mean", "std"), f"--replay takes it from {replay}")
        told = again.threat.in_pixels_of(0, 1)
        eps, norm, mean, std = told.eps, told.norm, told.mean, told.std
    opened = given.opened(model, arch, trust)
    threat, size = given.setting_of({model: opened}, eps, norm, mean, std, size)
    loader = given.measured_of(data, split, batch_size, size, threat, images, first, again)
    result = run(opened, loader, threat, suite=suite,
                 run_dir=run_dir, seed=seed, device=device, progress=not quiet, budget=budget,
                 certify=certify, replay=again)
    _tell(str(result), (json_file, result.save), (adversarials, result.save_adversarials),
          (report, Comparison({Path(model).name: result}).save_page))
    if strict and not result.reliable:
        sys.exit(1)


@main.command()
@click.argument("model")
@options.MODEL
@options.DATA_OPTION
@options.THREAT
@click.option("--method", default="auto", show_default=True,
              help="ibp (intervals), crown (linear bounds), or auto: those where it pays.")
@click.option("--splits", type=click.IntRange(0), default=0, show_default=True,
              help="Cut the surroundings of what stays undecided into so many parts, at most.")
@click.option("--split", type=click.Choice(["train", "test"]), default="test", show_default=True)
@options.IMAGES
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write JSON.")
@click.option("--budget", help="Time that it may take, as 90s, 5m or 2h; images that there is no "
                               "time for count as not certified.")
@options.LOADING
@options.BARE_RUNNING
def certify(model: str, arch: str | None, trust: bool, data: str, eps: float | None,
            norm: str | None, method: str, splits: int, split: str, images: int | None,
            first: bool, json_file: str | None, budget: str | None, batch_size: int,
            size: int | None, mean: Any, std: Any, run_dir: str | None, device: str | None,
            quiet: bool) -> None:
    """Prove for how many images of DATA no attack on MODEL can succeed."""
    given.there(model)
    from .certification import certify as run
    given.outputs([model, *given.files_of(data)], json=json_file)
    given.keepable(run_dir)
    opened = given.opened(model, arch, trust)
    threat, size = given.setting_of({model: opened}, eps, norm, mean, std, size)
    loader = given.measured_of(data, split, batch_size, size, threat, images, first)
    result = run(opened, loader, threat, method=method,
                 splits=splits, budget=budget, run_dir=run_dir, device=device, progress=not quiet)
    _tell(str(result), (json_file, _json(result)))


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL MODEL...")
@options.MODEL
@options.DATA_OPTION
@options.THREAT
@options.EVALUATION
@options.LOADING
@options.RUNNING
def compare(models: tuple[str, ...], arch: str | None, trust: bool, data: str, eps: float | None,
            norm: str | None, suite: str, split: str, images: int | None, first: bool,
            certify: bool, budget: str | None, report: str | None, json_file: str | None,
            strict: bool, batch_size: int, size: int | None, mean: Any, std: Any, seed: int,
            run_dir: str | None, device: str | None, quiet: bool) -> None:
    """Evaluate several models on the same images by the same attacks."""
    given.there(*models)
    from .pipeline import compare as run
    given.outputs([*models, *given.files_of(data)], report=report, json=json_file)
    given.keepable(run_dir)
    if len(set(models)) < len(models):
        raise SpecError("a model is named twice", fix="Name each model once.")
    opened = {name: given.opened(name, arch, trust) for name in models}
    threat, size = given.setting_of(opened, eps, norm, mean, std, size)
    loader = given.measured_of(data, split, batch_size, size, threat, images, first)
    result = run(opened, loader, threat, suite=suite, run_dir=run_dir, seed=seed, device=device,
                 progress=not quiet, certify=certify, budget=budget)
    _show(result, report, json_file, strict)


@main.command()
@click.argument("model")
@options.MODEL
@options.DATA_OPTION
@click.option("-o", "--output", type=click.Path(dir_okay=False),
              help="Write the hardened model, too.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option("--bits", type=int, default=2, show_default=True)
@click.option("--dynamic/--fixed", default=None,
              help="Learned or constant thresholds (constant by default).")
@options.THREAT
@options.TRAINING
@options.EVALUATION
@options.LOADING
@options.RUNNING
def ablate(model: str, arch: str | None, trust: bool, data: str, output: str | None, force: bool,
           bits: int, dynamic: bool | None, eps: float | None, norm: str | None, recipe: str,
           settings: tuple[str, ...], epochs: int, train: str, augment: bool, suite: str,
           split: str, images: int | None, first: bool, certify: bool, budget: str | None,
           report: str | None, json_file: str | None, strict: bool, batch_size: int,
           size: int | None, mean: Any, std: Any, seed: int, run_dir: str | None,
           device: str | None, quiet: bool) -> None:
    """Compare float, float + fine-tune, converted, and converted + the same fine-tune."""
    given.there(model)
    from .pipeline import ablate as run
    target = None if output is None else given.output_of(model, output, ".qg", force)
    given.outputs([model, *given.files_of(data)], output=target, report=report, json=json_file)
    given.keepable(run_dir)
    chosen = given.recipe_of(recipe, settings)
    opened = given.opened(model, arch, trust)
    threat, size = given.setting_of({model: opened}, eps, norm, mean, std, size)
    loaders = (given.loader_of(data, "train", batch_size, size, threat.mean, threat.std, augment),
               given.measured_of(data, split, batch_size, size, threat, images, first))
    result = run(opened, *loaders, threat, bits=bits, dynamic=dynamic,
                 recipe=chosen, epochs=epochs, train=train, suite=suite,
                 run_dir=run_dir, seed=seed, device=device, progress=not quiet,
                 certify=certify, budget=budget)
    result.settings.update(model=model, arch=arch, data=data, augment=augment, size=size)
    _show(result, report, json_file, strict, (target, lambda file: _save(
        list(result.models.values())[-1], file, given.arch_of(model, arch))))


@main.command()
@click.argument("model")
@options.MODEL
@options.DATA_OPTION
@options.THREAT
@click.option("--suite", default="quick", show_default=True,
              help="quick, standard, full or paper.")
@click.option("--split", type=click.Choice(["train", "test"]), default="train", show_default=True,
              help="Which images; what is chosen by the test set is no longer measured by it.")
@options.IMAGES
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write JSON.")
@options.LOADING
@options.RUNNING
def sensitivity(model: str, arch: str | None, trust: bool, data: str, eps: float | None,
                norm: str | None, suite: str, split: str, images: int | None, first: bool,
                json_file: str | None, batch_size: int, size: int | None, mean: Any, std: Any,
                seed: int, run_dir: str | None, device: str | None, quiet: bool) -> None:
    """Measure what the quantization of each site of MODEL costs, clean and attacked."""
    given.there(model)
    from .sensitive import sensitivity as run
    given.outputs([model, *given.files_of(data)], json=json_file)
    given.keepable(run_dir)
    opened = given.opened(model, arch, trust)
    threat, size = given.setting_of({model: opened}, eps, norm, mean, std, size)
    loader = given.measured_of(data, split, batch_size, size, threat, images, first)
    result = run(opened, loader, threat, suite=suite,
                 run_dir=run_dir, seed=seed, device=device, progress=not quiet)
    _tell(str(result), (json_file, _json(result)))


@main.command()
@click.option("-o", "--output", type=click.Path(file_okay=False), default="quantguard-demo",
              show_default=True, help="Folder for the model and the report.")
@options.SEED
@click.option("--quiet", is_flag=True, help="No progress.")
def demo(output: str, seed: int, quiet: bool) -> None:
    """Train, convert, harden and compare on real handwritten digits, in minutes."""
    from .demo import run
    given.keepable(output)
    result = run(output, seed=seed, progress=not quiet)
    click.echo(str(result))
    click.echo(f"wrote {output}/model.hardened.qg, {output}/model.certified.qg, "
               f"{output}/report.json and {output}/report.html")


def _save(model: Any, target: Path, arch: str | None) -> None:
    """Write a model, and say so where the command line could not read it again as it is."""
    from .checkpoint import rebuilds, save
    save(model, target, arch=arch)
    if not rebuilds(target):
        click.echo(f"note: {target} holds a {type(model).__name__}, which your own code builds: "
                   "give --arch "
                   f"{shlex.quote(arch or 'package.module:factory')} to the commands that read "
                   "it, or --trust, or "
                   "quantguard.load(path, model=...) in Python", err=True)


def _json(result: Any) -> Callable[[Any], None]:
    return lambda file: write_text(file, json.dumps(result.to_dict(), indent=1))


def _tell(said: str, *files: tuple[Any, Callable[[Any], None]]) -> None:
    """Write files, then say what there is to say; of several processes the first does.

    In this order, so that who closes the output in the middle loses nothing; and where one of them
    cannot be written, the others are, and all is said.
    """
    if not given.is_first():
        return
    written: list[Any] = []
    failed: Exception | None = None
    for file, write in files:
        if file is None:
            continue
        try:
            write(file)
            written.append(file)
        except Exception as error:  # whatever a file system makes of a name, too
            failed = failed or error
    if said:
        click.echo(said)
    for file in written:
        click.echo(f"wrote {file}")
    if failed is not None:
        raise failed


def _show(result: Any, report: str | None, json_file: str | None, strict: bool,
          *others: tuple[Any, Callable[[Any], None]]) -> None:
    _tell(str(result), *others, (json_file, _json(result)), (report, result.save_page))
    if strict and not all(e.reliable for e in result.rows.values()):
        sys.exit(1)
