"""Option types, and the options that several verbs share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import click

DATA = "digits, fashion-mnist[:ROOT], mnist[:ROOT], cifar10[:ROOT], imagefolder:DIR or npz:FILE"


class _Eps(click.ParamType):  # type: ignore[type-arg]
    """A radius: 0.1 or 8/255."""

    name = "eps"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            return float(Fraction(str(value)))
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r} is not a number; write 0.1 or 8/255", param, ctx)


class _Numbers(click.ParamType):  # type: ignore[type-arg]
    """Numbers: 0.5 or 0.485,0.456,0.406."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(v) for v in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers; write 0.485,0.456,0.406", param, ctx)


class _Shape(click.ParamType):  # type: ignore[type-arg]
    """A shape: 3,224,224 or 3x224x224."""

    name = "shape"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            shape = tuple(int(v) for v in str(value).replace("x", ",").split(","))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1:
            self.fail(f"{value!r} is not a shape; write 3,224,224", param, ctx)
        return shape


class _Bits(click.ParamType):  # type: ignore[type-arg]
    """Bits of all sites or of some: 2 or PATTERN=BITS."""

    name = "bits"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        pattern, _, number = str(value).rpartition("=")
        if not number.isdigit():
            self.fail(f"{value!r} is neither a number of bits nor PATTERN=BITS", param, ctx)
        return pattern or "*", int(number)


def _options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Return one decorator that applies several."""
    return lambda f: functools.reduce(lambda g, d: d(g), reversed(decorators), f)


MODEL = _options(
    click.option("--arch", help="How to build the model if the file has only weights: "
                                "torchvision:NAME, timm:NAME, hf:DIR, package.module:factory or "
                                "file.py:factory."),
    click.option("--trust", is_flag=True, help="Import every class that the file names. This can "
                                               "run any code that is in the file."))
CONVERSION = _options(
    click.option("--bits", type=_Bits(), multiple=True, default=["2"], metavar="BITS",
                 help="Bits of every site, 2 by default; PATTERN=BITS for some sites (a name, a "
                      "pattern, a kind, first, last). May be repeated: the last match counts."),
    click.option("--dynamic/--fixed", default=False, help="Learned or constant thresholds."),
    click.option("--exclude", multiple=True,
                 help="Name, pattern or kind of activations that stay float. May be repeated."),
    click.option("--gates", is_flag=True, help="Also convert sigmoids that multiply something."),
    click.option("--per-channel", is_flag=True, help="Use separate thresholds for each channel."),
    click.option("--input-bits", type=click.IntRange(1, 8),
                 help="Also quantize the input, to so many bits; needs --input-range."),
    click.option("--input-range", type=_Numbers(), metavar="LOW,HIGH",
                 help="Range of the input quantizer, in the model's input units: two numbers, or "
                      "two for each channel."),
    click.option("--input-shape", type=_Shape(),
                 help="Shape of one image, for the audit: 3,224,224."))
BITS = click.option("--bits", type=_Bits(), multiple=True, metavar="BITS",
                    help="Bits, by default 2 or those of the converted model; 32: a float control; "
                         "PATTERN=BITS for some sites, as in convert.")
LOADING = _options(
    click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True,
                 help="Images in a batch."),
    click.option("--size", type=click.IntRange(1),
                 help="Resize images to this side. By default size, mean and std are those that a "
                      "hardened .qg was trained with."),
    click.option("--mean", type=_Numbers(),
                 help="Mean per channel; the model's input is (pixel - mean) / std."),
    click.option("--std", type=_Numbers(), help="Standard deviation per channel."))
THREAT = _options(
    click.option("--eps", type=_Eps(), help="Radius in [0,1] pixel units: 0.1 or 8/255. By default "
                                            "that of a hardened model, else 8/255 in Linf."),
    click.option("--norm", type=click.Choice(["linf", "l2"]),
                 help="By default that of a hardened model, else linf."))
IMAGES = _options(
    click.option("--images", type=click.IntRange(1),
                 help="Number of images, drawn from the split with a fixed seed, so that they are "
                      "the same for every model and command; all by default."),
    click.option("--first", is_flag=True,
                 help="With --images: take the first images of the split instead."))
BARE_RUNNING = _options(
    click.option("--run-dir", type=click.Path(file_okay=False),
                 help="Folder for the state; the same command again resumes there."),
    click.option("--device", help="cpu, cuda, …; by default the model's device."),
    click.option("--quiet", is_flag=True, help="Show no progress."))
SEED = click.option("--seed", type=click.IntRange(0, (1 << 32) - 1), default=0, show_default=True,
                    help="Seed of all random numbers.")
RUNNING = _options(SEED, BARE_RUNNING)
EVALUATION = _options(
    click.option("--suite", default="standard", show_default=True,
                 help="Attacks: quick, standard, full or paper."),
    click.option("--split", type=click.Choice(["train", "test"]), default="test",
                 show_default=True, help="Split of the data."),
    IMAGES,
    click.option("--certify", is_flag=True,
                 help="First prove which images no attack can break, which gives a lower bound."),
    click.option("--budget", help="Time limit for each model: 90s, 5m or 2h. Attacks that do not "
                                  "fit are listed as skipped."),
    click.option("--report", type=click.Path(dir_okay=False), help="Write an HTML page."),
    click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write JSON."),
    click.option("--strict", is_flag=True,
                 help="Exit with 1 unless the result is resolved, that is, no check speaks against "
                      "the figure, whether it is high or low."))
TRAINING = _options(
    click.option("--recipe", default="pgd", show_default=True,
                 help="pgd, trades, nfgsm, clean, or ibp (certified training)."),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
                 help="Set a field of the recipe: lr=1e-3. May be repeated."),
    click.option("--epochs", type=click.IntRange(1), default=3, show_default=True,
                 help="Passes over the training images."),
    click.option("--train", type=click.Choice(["all", "thresholds"]), default="all",
                 show_default=True, help="Parameters to train."),
    click.option("--augment", is_flag=True,
                 help="Augment the training images by random crops, and by flips if the data set "
                      "allows them."))
DATA_OPTION = click.option("--data", required=True, metavar="DATA", help=f"Images: {DATA}.")
