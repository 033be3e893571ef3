"""What the commands are told: types of values, and the options that several of them share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import click

DATA = "digits, fashion-mnist[:ROOT], mnist[:ROOT], cifar10[:ROOT], imagefolder:DIR or npz:FILE"


class _Eps(click.ParamType):  # type: ignore[type-arg]
    """Read 0.1 or 8/255."""

    name = "eps"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            return float(Fraction(str(value)))
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r} is no number; write 0.1 or 8/255", param, ctx)


class _Numbers(click.ParamType):  # type: ignore[type-arg]
    """Read 0.5 or 0.485,0.456,0.406."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(v) for v in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers; write 0.485,0.456,0.406", param, ctx)


class _Shape(click.ParamType):  # type: ignore[type-arg]
    """Read 3,224,224 or 3x224x224."""

    name = "shape"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            shape = tuple(int(v) for v in str(value).replace("x", ",").split(","))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1:
            self.fail(f"{value!r} is no shape; write 3,224,224", param, ctx)
        return shape


class _Bits(click.ParamType):  # type: ignore[type-arg]
    """Read 2, or PATTERN=BITS."""

    name = "bits"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        pattern, _, number = str(value).rpartition("=")
        if not number.isdigit():
            self.fail(f"{value!r} is neither a number of bits nor PATTERN=BITS", param, ctx)
        return pattern or "*", int(number)


def _options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    return lambda f: functools.reduce(lambda g, d: d(g), reversed(decorators), f)


MODEL = _options(
    click.option("--arch", help="Builds the model that weights are for: torchvision:NAME, "
                                "timm:NAME, hf:DIR, package.module:factory or file.py:factory."),
    click.option("--trust", is_flag=True, help="Import whatever classes the file names: this runs "
                                               "code of its choice."))
CONVERSION = _options(
    click.option("--bits", type=_Bits(), multiple=True, default=["2"], metavar="BITS",
                 help="2 by default; PATTERN=BITS for some sites (a name, a pattern, a kind, "
                      "first, last), given several times: the last that matches counts."),
    click.option("--dynamic/--fixed", default=False, help="Learned or constant thresholds."),
    click.option("--keep", multiple=True, help="Name, pattern or kind that stays float; may be "
                                               "given several times."),
    click.option("--gates", is_flag=True, help="Convert sigmoids that multiply something, too."),
    click.option("--per-channel", is_flag=True, help="Thresholds per channel."),
    click.option("--input-bits", type=click.IntRange(1, 8),
                 help="A staircase on the input, too; needs --input-range."),
    click.option("--input-range", type=_Numbers(), metavar="LOW,HIGH",
                 help="Its ends, in what MODEL eats: two numbers, or two for each channel."),
    click.option("--input-shape", type=_Shape(), help="Of one image, for the audit: 3,224,224."))
BITS = click.option("--bits", type=_Bits(), multiple=True, metavar="BITS",
                    help="2 by default, or as converted; 32: a float control; PATTERN=BITS for "
                         "some sites, as in convert.")
LOADING = _options(
    click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True),
    click.option("--size", type=click.IntRange(1),
                 help="Resize images to this side. Size, mean and std of a hardened .qg are used "
                      "without being given."),
    click.option("--mean", type=_Numbers(), help="Per channel; MODEL eats (pixel - mean) / std."),
    click.option("--std", type=_Numbers(), help="Per channel."))
THREAT = _options(
    click.option("--eps", type=_Eps(), help="Radius in [0,1] pixel units: 0.1 or 8/255. By default "
                                            "MODEL's own, else 8/255 in Linf."),
    click.option("--norm", type=click.Choice(["linf", "l2"]),
                 help="By default MODEL's own, else linf."))
IMAGES = _options(
    click.option("--images", type=click.IntRange(1),
                 help="How many, drawn from all of the split by one fixed seed, the same for every "
                      "MODEL and command; all by default."),
    click.option("--first", is_flag=True, help="With --images: the first ones instead."))
BARE_RUNNING = _options(
    click.option("--run-dir", type=click.Path(file_okay=False),
                 help="Keeps the state; the same command again goes on from there."),
    click.option("--device", help="cpu, cuda, …; where the model is by default."),
    click.option("--quiet", is_flag=True, help="No progress."))
SEED = click.option("--seed", type=click.IntRange(0, (1 << 32) - 1), default=0, show_default=True)
RUNNING = _options(SEED, BARE_RUNNING)
EVALUATION = _options(
    click.option("--suite", default="standard", show_default=True,
                 help="quick, standard, full or paper."),
    click.option("--split", type=click.Choice(["train", "test"]), default="test",
                 show_default=True),
    IMAGES,
    click.option("--certify", is_flag=True, help="Prove first which images no attack can break: "
                                                  "the truth is bracketed."),
    click.option("--budget", help="Time that all of it may take on a model, as 90s, 5m or 2h; "
                                  "what does not fit is listed."),
    click.option("--report", type=click.Path(dir_okay=False), help="Write an HTML page."),
    click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write JSON."),
    click.option("--strict", is_flag=True,
                 help="Exit with 1 unless the figure is resolved: nothing that was found speaks "
                      "against it, be it high or low."))
TRAINING = _options(
    click.option("--recipe", default="pgd", show_default=True,
                 help="pgd, trades, nfgsm, clean, or ibp (trains for a certificate)."),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
                 help="A field of the recipe: lr=1e-3; may be given several times."),
    click.option("--epochs", type=click.IntRange(1), default=3, show_default=True),
    click.option("--train", type=click.Choice(["all", "thresholds"]), default="all",
                 show_default=True),
    click.option("--augment", is_flag=True, help="Random crops (and flips where they keep the "
                                                 "meaning) of the training images."))
DATA_OPTION = click.option("--data", required=True, metavar="DATA", help=f"{DATA}.")
