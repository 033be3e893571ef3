"""From what a command is told to what the library takes; heavy imports wait until one is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import model_spec
from .errors import SpecError
from .files import try_writing

if TYPE_CHECKING:
    from torch import nn

    from .results import Evaluation
    from .spec import Threat


def there(*models: str) -> None:
    """Refuse files that do not exist before torch is imported, which takes seconds.

    Raises:
        LoadError: there is none of such a name.
    """
    for model in models:
        file = model_spec.file_of(model)
        if file is not None and not Path(file).exists():
            raise model_spec.missing(file)


def opened(model: str, arch: str | None, trust: bool) -> nn.Module:
    """Return the model that MODEL names."""
    from .checkpoint import open_model
    return open_model(model, arch=arch, trust=trust)


def arch_of(model: str, arch: str | None) -> str | None:
    """Return the arch spec that a file is to name, where there is one."""
    return arch or (model if model_spec.is_arch_spec(model) else None)


def output_of(model: str, output: str | None, suffix: str, force: bool) -> Path:
    """Return where to write, refusing a file that is there before any work is done."""
    path = Path(output) if output else Path(model_spec.default_name(model) + suffix)
    writable(path, force)
    return path


def outputs(inputs: Iterable[str], **files: str | Path | None) -> None:
    """Refuse files that could not be written in the end, or that would take another's place.

    Args:
        inputs: MODEL, and what else is read.
        files: what will be written, by its option.

    Raises:
        SpecError: one is an input, or two are the same.
        WriteError: a folder takes no files.
    """
    taken: dict[Path, str] = {}
    named = [model_spec.file_of(name) or "" for name in inputs]
    read = {Path(name).resolve() for name in named if name and Path(name).exists()}
    for name, file in files.items():
        if file is None:
            continue
        option, place = f"--{name}", Path(file).resolve()
        if place in read:
            raise SpecError(f"{option} {file} would be written over what is read",
                            fix="Name another file.")
        if place in taken:
            raise SpecError(f"{option} and {taken[place]} name the same file, {file}",
                            fix="Name two.")
        taken[place] = option
        writable(file)


def files_of(data: str) -> list[str]:
    """Return the files that ``--data`` names."""
    kind, _, file = data.partition(":")
    return [file] if kind == "npz" and file else []


def writable(path: Path | str, force: bool = True) -> None:
    """Refuse a path that could not be written in the end.

    Raises:
        SpecError: it is there already, and no force, or no file; or its folder is not there.
        WriteError: its folder takes no files.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device, which would be replaced by a file
        raise SpecError(f"{path} is no file", fix="Name another.")
    if path.exists() and not force:
        raise SpecError(f"{path} exists already", fix="Use --force to overwrite it, or -o FILE.")
    if not path.absolute().parent.is_dir():
        raise SpecError(f"the folder of {path} does not exist", fix="Make it first.")
    try_writing(path)


def keepable(folder: str | None) -> None:
    """Refuse a folder, there or still to be made, in which nothing could be written.

    Raises:
        WriteError: it, or what there is of the way to it, takes no files.
    """
    if folder is not None:
        whole = Path(folder).absolute()
        try_writing(folder, next(p for p in (whole, *whole.parents) if p.exists()))


def setting_of(models: Mapping[str, nn.Module], eps: float | None, norm: str | None, mean: Any,
               std: Any, size: int | None) -> tuple[Threat, int | None]:
    """Return the threat to pixels from 0 to 1, as ``--data`` yields them, and the images' side.

    What is not given is the models' own, which is told.

    Raises:
        SpecError: an option that contradicts a model, or models that contradict each other.
    """
    from .metadata import annotate, metadata_of, shared
    from .spec import Threat
    if eps is None and norm is None:
        shared(models.items(), None)  # the one radius that they have in common
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
        if is_first():
            other = known.threat.norm != used.norm or own is None or own.eps != used.eps
            click.echo(f"note: {name} is for {known.metadata_line()}"
                       + (f"; used here: {used}" if other else "; used here, too"), err=True)
        annotate(model, threat=used)  # told: the library need not say it again
    return used, side


def _side(models: Mapping[str, nn.Module], size: int | None) -> int | None:
    """Return the side that images are resized to: as asked, or as the models were hardened on.

    Raises:
        SpecError: ``--size`` contradicts a model, or two models each other.
    """
    from .metadata import metadata_of
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
                            f"{name} on {text}", why="They are to meet the same images.",
                            fix="Evaluate each alone.")
        first = name, shape
    if size is None and first is not None and first[1][1] == first[1][2]:
        return first[1][1]
    return size


def not_given(names: tuple[str, ...], why: str) -> None:
    """Refuse options that would not be looked at.

    Raises:
        SpecError: one of them stands on the command line.
    """
    ctx = click.get_current_context()
    for name in names:
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise SpecError(f"{option} would not be looked at", why=f"{why}.",
                            fix=f"Leave {option} out.")


def is_first() -> bool:
    """Return whether this process writes and speaks; of several only one does."""
    from .world import world
    return world().first


def loader_of(data: str, split: str, batch_size: int, size: int | None, mean: Any, std: Any,
              augment: bool = False) -> Any:
    """Return the loader that ``--data`` names."""
    from .data import load_data
    return load_data(data, split, batch_size=batch_size, size=size,  # type: ignore[arg-type]
                     mean=mean, std=std, augment=augment)


def measured_of(data: str, split: str, batch_size: int, size: int | None, threat: Threat,
                images: int | None, first: bool, again: Evaluation | None = None) -> Any:
    """Return the loader of what is measured of ``--data``: all of the split, or a sample of it.

    Args:
        again: take the images of this evaluation.
    """
    from .data import to_measure
    loader = loader_of(data, split, batch_size, size, threat.mean, threat.std)
    there = len(loader.dataset)
    if images is not None and there < images and is_first():
        click.echo(f"note: --images {images}, and {data} has {there}", err=True)
    if again is not None:
        return to_measure(loader, again.images, first=True, again=again.sample)
    return to_measure(loader, images, first)


def example_of(shape: tuple[int, ...] | None) -> Any:
    """Return a seeded batch of two inputs of a shape."""
    if shape is None:
        return None
    import torch
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def bits_of(given: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """Return bits by pattern, in the order given; where only some are named, others get 2."""
    table = {"*": 2}
    for pattern, bits in given:
        table.pop(pattern, None)  # a key that is there would keep its place
        table[pattern] = bits
    return table


def same_or_table(given: tuple[tuple[str, int], ...]) -> int | dict[str, int] | None:
    """Return the bits of all sites; where some are named, those by pattern; None without any."""
    if not given:
        return None
    return given[-1][1] if {pattern for pattern, _ in given} == {"*"} else bits_of(given)


def pairs(numbers: Any) -> list[tuple[float, ...]] | None:
    """Return LOW,HIGH,LOW,HIGH,... as pairs."""
    if numbers is None:
        return None
    return [tuple(numbers[i : i + 2]) for i in range(0, len(numbers), 2)]


def recipe_of(name: str, settings: tuple[str, ...]) -> Any:
    """Return a recipe from its name and ``--set``."""
    from . import recipes
    values = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise SpecError(f"--set {text!r} is not KEY=VALUE", fix="Write --set lr=1e-3.")
        values[key] = value
    return recipes.recipe_of(name, values)
