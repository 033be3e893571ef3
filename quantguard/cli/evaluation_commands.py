"""Verbs that measure: evaluate, compare, certify and sensitivity."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..core.errors import SpecError
from . import arguments, options
from .output import show, show_comparison, write_json


@click.command()
@click.argument("model")
@options.MODEL
@options.DATA_OPTION
@options.THREAT
@options.EVALUATION
@click.option("--adversarials", type=click.Path(dir_okay=False),
              help="Save every image, adversarial if it is broken, as FILE.npz (x, y, broken).")
@click.option("--replay", type=click.Path(exists=True, dir_okay=False),
              help="Repeat the evaluation of this JSON file, with its threat, suite, seed and "
                   "number of images.")
@options.LOADING
@options.RUNNING
def evaluate(model: str, arch: str | None, trust: bool, data: str, eps: float | None,
             norm: str | None, suite: str, split: str, images: int | None, first: bool,
             certify: bool, budget: str | None, report: str | None, json_file: str | None,
             strict: bool, adversarials: str | None, replay: str | None, batch_size: int,
             size: int | None, mean: Any, std: Any, seed: int, run_dir: str | None,
             device: str | None, quiet: bool) -> None:
    """Measure how many images of DATA survive all attacks on MODEL."""
    arguments.check_exists(model)
    from ..evaluation.comparison import Comparison
    from ..evaluation.evaluator import evaluate as run
    from ..evaluation.results import Evaluation
    inputs = [model, *arguments.data_files(data), *([replay] if replay else [])]
    arguments.check_outputs(inputs, report=report, json=json_file, adversarials=adversarials)
    arguments.check_folder(run_dir)
    if adversarials and not adversarials.endswith(".npz"):
        raise SpecError(f"--adversarials {adversarials} must end in .npz")
    replayed = Evaluation.load(replay) if replay else None
    if replayed is not None:
        arguments.refuse_unused(
            ("eps", "norm", "suite", "images", "first", "seed", "budget", "certify", "mean",
             "std"), f"--replay takes it from {replay}")
        own = replayed.threat.in_pixels_of(0, 1)
        eps, norm, mean, std = own.eps, own.norm, own.mean, own.std
    loaded = arguments.load_model(model, arch, trust)
    threat, size = arguments.threat_and_size({model: loaded}, eps, norm, mean, std, size)
    loader = arguments.load_sample(data, split, batch_size, size, threat, images, first, replayed)
    result = run(loaded, loader, threat, suite=suite, run_dir=run_dir, seed=seed, device=device,
                 progress=not quiet, budget=budget, certify=certify, replay=replayed)
    show(str(result), (json_file, result.save), (adversarials, result.save_adversarials),
          (report, Comparison({Path(model).name: result}).save_page))
    if strict and not result.reliable:
        sys.exit(1)


@click.command()
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
    """Evaluate several models on the same images and attacks."""
    arguments.check_exists(*models)
    from ..evaluation.comparison import compare as run
    arguments.check_outputs([*models, *arguments.data_files(data)], report=report, json=json_file)
    arguments.check_folder(run_dir)
    if len(set(models)) < len(models):
        raise SpecError("a model is named twice", fix="Name each model once.")
    loaded = {name: arguments.load_model(name, arch, trust) for name in models}
    threat, size = arguments.threat_and_size(loaded, eps, norm, mean, std, size)
    loader = arguments.load_sample(data, split, batch_size, size, threat, images, first)
    result = run(loaded, loader, threat, suite=suite, run_dir=run_dir, seed=seed, device=device,
                 progress=not quiet, certify=certify, budget=budget)
    show_comparison(result, report, json_file, strict)


@click.command()
@click.argument("model")
@options.MODEL
@options.DATA_OPTION
@options.THREAT
@click.option("--method", default="auto", show_default=True,
              help="ibp (intervals), crown (linear bounds), or auto: crown for the images that ibp "
                   "leaves undecided.")
@click.option("--splits", type=click.IntRange(0), default=0, show_default=True,
              help="Split the ball around an undecided image into at most so many parts.")
@click.option("--split", type=click.Choice(["train", "test"]), default="test", show_default=True,
              help="Split of the data.")
@options.IMAGES
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write JSON.")
@click.option("--budget", help="Time limit: 90s, 5m or 2h. Images that do not fit count as not "
                               "certified.")
@options.LOADING
@options.BARE_RUNNING
def certify(model: str, arch: str | None, trust: bool, data: str, eps: float | None,
            norm: str | None, method: str, splits: int, split: str, images: int | None,
            first: bool, json_file: str | None, budget: str | None, batch_size: int,
            size: int | None, mean: Any, std: Any, run_dir: str | None, device: str | None,
            quiet: bool) -> None:
    """Prove how many images of DATA no attack can break."""
    arguments.check_exists(model)
    from ..certification.certifier import certify as run
    arguments.check_outputs([model, *arguments.data_files(data)], json=json_file)
    arguments.check_folder(run_dir)
    loaded = arguments.load_model(model, arch, trust)
    threat, size = arguments.threat_and_size({model: loaded}, eps, norm, mean, std, size)
    loader = arguments.load_sample(data, split, batch_size, size, threat, images, first)
    result = run(loaded, loader, threat, method=method, splits=splits, budget=budget,
                 run_dir=run_dir, device=device, progress=not quiet)
    show(str(result), (json_file, lambda file: write_json(file, result.to_dict())))


@click.command()
@click.argument("model")
@options.MODEL
@options.DATA_OPTION
@options.THREAT
@click.option("--suite", default="quick", show_default=True,
              help="Attacks: quick, standard, full or paper.")
@click.option("--split", type=click.Choice(["train", "test"]), default="train", show_default=True,
              help="Split of the data. Bits that are chosen on the test split make its accuracy "
                   "optimistic.")
@options.IMAGES
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write JSON.")
@options.LOADING
@options.RUNNING
def sensitivity(model: str, arch: str | None, trust: bool, data: str, eps: float | None,
                norm: str | None, suite: str, split: str, images: int | None, first: bool,
                json_file: str | None, batch_size: int, size: int | None, mean: Any, std: Any,
                seed: int, run_dir: str | None, device: str | None, quiet: bool) -> None:
    """Measure the accuracy that quantizing each site of MODEL costs."""
    arguments.check_exists(model)
    from ..evaluation.site_sensitivity import sensitivity as run
    arguments.check_outputs([model, *arguments.data_files(data)], json=json_file)
    arguments.check_folder(run_dir)
    loaded = arguments.load_model(model, arch, trust)
    threat, size = arguments.threat_and_size({model: loaded}, eps, norm, mean, std, size)
    loader = arguments.load_sample(data, split, batch_size, size, threat, images, first)
    result = run(loaded, loader, threat, suite=suite, run_dir=run_dir, seed=seed, device=device,
                 progress=not quiet)
    show(str(result), (json_file, lambda file: write_json(file, result.to_dict())))
