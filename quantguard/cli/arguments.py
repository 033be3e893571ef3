"""The values of command-line options as the library's arguments.

Heavy imports are inside the functions: torch alone takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..core.errors import SpecError
from ..core.file_io import try_writing
from ..core.model_loading import model_spec

if TYPE_CHECKING:
    from torch import nn

    from ..core.specs import Threat
    from ..evaluation.results import Evaluation


def check_exists(*models: str) -> None:
    """Refuse model files that do not exist, before torch is imported.

    Raises:
        LoadError: there is no such file.
    """
    for model in models:
        file = model_spec.file_of(model)
        if file is not None and not Path(file).exists():
            raise model_spec.missing(file)


def load_model(model: str, arch: str | None, trust: bool) -> nn.Module:
    """Return the model that MODEL names."""
    from ..conversion.checkpoint import open_model
    return open_model(model, arch=arch, trust=trust)


def arch_of(model: str, arch: str | None) -> str | None:
    """Return the arch spec to write into a file; None: there is none."""
    return arch or (model if model_spec.is_arch_spec(model) else None)


def output_of(model: str, output: str | None, suffix: str, force: bool) -> Path:
    """Return the file to write, by default MODEL with a suffix, checked before any work."""
    path = Path(output) if output else Path(model_spec.default_name(model) + suffix)
    check_writable(path, force)
    return path


def check_outputs(inputs: Iterable[str], **files: str | Path | None) -> None:
    """Refuse files that cannot be written, or that would replace an input or each other.

    Args:
        inputs: MODEL and other files that are read.
        files: the files to write, by option name.

    Raises:
        SpecError: a file is an input, or two files are the same.
        WriteError: a folder does not take files.
    """
    taken: dict[Path, str] = {}
    named = [model_spec.file_of(name) or "" for name in inputs]
    read = {Path(name).resolve() for name in named if name and Path(name).exists()}
    for name, file in files.items():
        if file is None:
            continue
        option, place = f"--{name}", Path(file).resolve()
        if place in read:
            raise SpecError(f"{option} {file} would be written over an input file",
                            fix="Name another file.")
        if place in taken:
            raise SpecError(f"{option} and {taken[place]} name the same file, {file}",
                            fix="Name two files.")
        taken[place] = option
        check_writable(file)


def data_files(data: str) -> list[str]:
    """Return the files that ``--data`` names."""
    kind, _, file = data.partition(":")
    return [file] if kind == "npz" and file else []


def check_writable(path: Path | str, force: bool = True) -> None:
    """Refuse a file that cannot be written, before any work.

    Raises:
        SpecError: the file exists and force is not set, the path is not a file, or its folder does
            not exist.
        WriteError: its folder does not take files.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a file would replace a device
        raise SpecError(f"{path} is not a file", fix="Name another.")
    if path.exists() and not force:
        raise SpecError(f"{path} exists already", fix="Use --force to overwrite it, or -o FILE.")
    if not path.absolute().parent.is_dir():
        raise SpecError(f"the folder of {path} does not exist", fix="Make it first.")
    try_writing(path)


def check_folder(folder: str | None) -> None:
    """Refuse a folder in which no file can be written, whether it exists or not.

    Raises:
        WriteError: the folder, or the parent in which it would be made, does not take files.
    """
    if folder is not None:
        whole = Path(folder).absolute()
        try_writing(folder, next(p for p in (whole, *whole.parents) if p.exists()))


def threat_and_size(models: Mapping[str, nn.Module], eps: float | None, norm: str | None, mean: Any,
                    std: Any, size: int | None) -> tuple[Threat, int | None]:
    """Return the threat to pixels from 0 to 1, as ``--data`` yields them, and the image size.

    Missing options are those that the models were hardened with, and a note shows these.

    Raises:
        SpecError: an option contradicts a model, or two models contradict each other.
    """
    from ..core.metadata import annotate, metadata_of, shared
    from ..core.specs import Threat
    if eps is None and norm is None:
        shared(models.items(), None)  # raises if the models have different radii
    own = next((known.in_pixels_of(0, 1) for known in (
        metadata_of(model).threat for model in models.values()) if known is not None), None)
    if own is not None:
        norm = norm or own.norm
        eps = own.eps if eps is None and norm == own.norm else eps
    threat = Threat(norm or "linf", eps, (0, 1), mean, std)  # type: ignore[arg-type]
    used, side = shared(models.items(), threat), _side(models, size)
    for name, model in models.items():
        known = metadata_of(model)
        if known.threat is None:
            continue
        if is_main_process():
            other = known.threat.norm != used.norm or own is None or own.eps != used.eps
            click.echo(f"note: {name} is for {known.metadata_line()}; used here"
                       + (f": {used}" if other else ", too"), err=True)
        annotate(model, threat=used)  # so that the library does not print it again
    return used, side


def _side(models: Mapping[str, nn.Module], size: int | None) -> int | None:
    """Return the side to resize images to: ``--size``, or that of the models' own images.

    Raises:
        SpecError: ``--size`` contradicts a model, or two models contradict each other.
    """
    from ..core.metadata import metadata_of
    first: tuple[str, tuple[int, ...]] | None = None
    for name, model in models.items():
        shape = metadata_of(model).input_shape
        if shape is None or len(shape) != 3:
            continue
        text = "x".join(map(str, shape))
        if size is not None and shape[1:] != (size, size):
            raise SpecError(f"--size {size} contradicts {name}, which was hardened on {text}",
                            fix="Leave --size out.")
        if first is not None and first[1] != shape:
            raise SpecError(f"{first[0]} was hardened on {'x'.join(map(str, first[1]))}, and "
                            f"{name} on {text}", why="They must be measured on the same images.",
                            fix="Evaluate each alone.")
        first = name, shape
    if size is None and first is not None and first[1][1] == first[1][2]:
        return first[1][1]
    return size


def refuse_unused(names: tuple[str, ...], why: str) -> None:
    """Refuse options that have no effect.

    Raises:
        SpecError: one of them is on the command line.
    """
    ctx = click.get_current_context()
    for name in names:
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise SpecError(f"{option} has no effect here", why=f"{why}.",
                            fix=f"Leave {option} out.")


def is_main_process() -> bool:
    """Return whether this process writes files and prints: one of several does."""
    from ..core.distributed import distributed
    return distributed().is_main


def load_split(data: str, split: str, batch_size: int, size: int | None, mean: Any, std: Any,
               augment: bool = False) -> Any:
    """Return the loader that ``--data`` names."""
    from ..data.loader import load_data
    return load_data(data, split, batch_size=batch_size, size=size,  # type: ignore[arg-type]
                     mean=mean, std=std, augment=augment)


def load_sample(data: str, split: str, batch_size: int, size: int | None, threat: Threat,
                images: int | None, first: bool, replayed: Evaluation | None = None) -> Any:
    """Return a loader of the images to measure: the whole split of ``--data``, or a sample of it.

    Args:
        replayed: use the images of this evaluation.
    """
    from ..data.loader import to_measure
    loader = load_split(data, split, batch_size, size, threat.mean, threat.std)
    available = len(loader.dataset)
    if images is not None and available < images and is_main_process():
        click.echo(f"note: --images {images}, and {data} has {available}", err=True)
    if replayed is not None:
        return to_measure(loader, replayed.images, first=True, again=replayed.sample)
    return to_measure(loader, images, first)


def example_of(shape: tuple[int, ...] | None) -> Any:
    """Return a seeded batch of two inputs of a shape."""
    if shape is None:
        return None
    import torch
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def bits_table(values: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """Return bits by pattern, in the order of the options; sites without a match get 2."""
    table = {"*": 2}
    for pattern, bits in values:
        table.pop(pattern, None)  # a repeated pattern moves to the end: the last match counts
        table[pattern] = bits
    return table


def bits_or_table(values: tuple[tuple[str, int], ...]) -> int | dict[str, int] | None:
    """Return the bits of all sites, or bits by pattern if there are patterns; None: no option."""
    if not values:
        return None
    return values[-1][1] if {pattern for pattern, _ in values} == {"*"} else bits_table(values)


def pairs(numbers: Any) -> list[tuple[float, ...]] | None:
    """Return LOW,HIGH,LOW,HIGH,... as pairs."""
    if numbers is None:
        return None
    return [tuple(numbers[i : i + 2]) for i in range(0, len(numbers), 2)]


def recipe_of(name: str, settings: tuple[str, ...]) -> Any:
    """Return a recipe from its name and the values of ``--set``."""
    from ..training import recipes
    values = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise SpecError(f"--set {text!r} is not KEY=VALUE", fix="Write --set lr=1e-3.")
        values[key] = value
    return recipes.recipe_of(name, values)
