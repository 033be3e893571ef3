"""Verbs that train: harden, ablate and the demo."""

from __future__ import annotations

from typing import Any

import click

from . import arguments, options
from .output import save_model, show, show_comparison


@click.command()
@click.argument("model")
@options.MODEL
@options.DATA_OPTION
@click.option("-o", "--output", type=click.Path(dir_okay=False),
              help="File to write, MODEL.hardened.qg by default.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@options.BITS
@click.option("--dynamic/--fixed", default=None,
              help="Learned or constant thresholds; by default those of a converted model, else "
                   "constant.")
@click.option("--max-clean-drop", type=click.FloatRange(0, 1), metavar="SHARE",
              help="Search for the lowest bits whose clean accuracy is at most this much below the "
                   "float control's (0.02: 2 points).")
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
    """Convert MODEL and fine-tune it adversarially.

    A converted MODEL is fine-tuned as it is.
    """
    arguments.check_exists(model)
    from ..training.hardening import harden as run
    chosen = arguments.recipe_of(recipe, settings)
    target = arguments.output_of(model, output, ".hardened.qg", force)
    arguments.check_folder(run_dir)
    loaded = arguments.load_model(model, arch, trust)
    threat, size = arguments.threat_and_size({model: loaded}, eps, norm, mean, std, size)
    loader = arguments.load_split(data, "train", batch_size, size, threat.mean, threat.std, augment)
    hardened = run(loaded, loader, threat, bits=arguments.bits_or_table(bits), dynamic=dynamic,
                   recipe=chosen, epochs=epochs, train=train, max_clean_drop=max_clean_drop,
                   run_dir=run_dir, seed=seed, device=device, progress=not quiet)
    show("", (target, lambda file: save_model(hardened, file, arguments.arch_of(model, arch))))


@click.command()
@click.argument("model")
@options.MODEL
@options.DATA_OPTION
@click.option("-o", "--output", type=click.Path(dir_okay=False),
              help="File to write the hardened model to, if it is wanted.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option("--bits", type=int, default=2, show_default=True, help="Bits of every site.")
@click.option("--dynamic/--fixed", default=None,
              help="Learned or constant thresholds; constant by default.")
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
    """Compare float and converted models, before and after training.

    The four rows are float and converted, each with and without the same fine-tune.
    """
    arguments.check_exists(model)
    from ..training.ablation import ablate as run
    target = None if output is None else arguments.output_of(model, output, ".qg", force)
    arguments.check_outputs([model, *arguments.data_files(data)], output=target, report=report,
                            json=json_file)
    arguments.check_folder(run_dir)
    chosen = arguments.recipe_of(recipe, settings)
    loaded = arguments.load_model(model, arch, trust)
    threat, size = arguments.threat_and_size({model: loaded}, eps, norm, mean, std, size)
    training = arguments.load_split(data, "train", batch_size, size, threat.mean, threat.std,
                                    augment)
    testing = arguments.load_sample(data, split, batch_size, size, threat, images, first)
    result = run(loaded, training, testing, threat, bits=bits, dynamic=dynamic, recipe=chosen,
                 epochs=epochs, train=train, suite=suite, run_dir=run_dir, seed=seed,
                 device=device, progress=not quiet, certify=certify, budget=budget)
    result.settings.update(model=model, arch=arch, data=data, augment=augment, size=size)
    show_comparison(result, report, json_file, strict, (target, lambda file: save_model(
        list(result.models.values())[-1], file, arguments.arch_of(model, arch))))


@click.command()
@click.option("-o", "--output", type=click.Path(file_okay=False), default="quantguard-demo",
              show_default=True, help="Folder for the models and the reports.")
@options.SEED
@click.option("--quiet", is_flag=True, help="Show no progress.")
def demo(output: str, seed: int, quiet: bool) -> None:
    """Train, harden and compare models of handwritten digits.

    This takes some minutes.
    """
    from .demo import run
    arguments.check_folder(output)
    result = run(output, seed=seed, progress=not quiet)
    click.echo(str(result))
    click.echo(f"wrote {output}/model.hardened.qg, {output}/model.certified.qg, "
               f"{output}/report.json and {output}/report.html")
